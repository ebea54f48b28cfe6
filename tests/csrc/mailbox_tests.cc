// Messages beside a program's calls: in any order, of any shape, and ranks that do not send or take.
#include <string.h>

#include <chrono>
#include <thread>

#include "core_tests.h"
#include "transport/mailbox.h"

namespace gingham {
namespace {

// A call of the program in which every rank tells where its mailbox lies, and the others open it; and as the last one before it goes.
void meet(Job& job, Program& program, Mailbox& box) {
  auto axis = job.axis(program, 0, everyone(program.size()));
  program.begin(named("mailboxes"));
  Shape shape{1, {static_cast<int64_t>(box.offset())}};
  axis->board().post({}, -1, true, shape);
  for (int peer = 0; peer < program.size(); peer++)
    if (peer != program.rank()) box.open(peer, static_cast<uint64_t>(axis->board().shape(peer).dims[0]));
  axis->board().finish();
  axis->board().retire();
}

void letters_are_taken_in_any_order() {
  constexpr int kLetters = 24, kRounds = 50;
  run_ranks(3, As::threads, [](Job& job, Program& program) -> Row {
    Mailbox box(job, program, kLetters);
    meet(job, program, box);
    const Scratch room(job.stream(), kLetters * sizeof(int64_t));
    auto* values = reinterpret_cast<int64_t*>(room.data());
    const int me = program.rank(), to = (me + 1) % 3, from = (me + 2) % 3;
    for (int round = 0; round < kRounds; round++) {
      for (int i = 0; i < kLetters; i++) {
        const int letter = (i * 7 + round) % kLetters;
        values[letter] = 1000 * me + 100000 * round + letter;
        box.send(to, letter, values + letter, "int64", std::vector<int64_t>(static_cast<size_t>(letter % 3), 1));
      }
      for (int i = kLetters; i-- > 0;) {
        const int letter = (i * 5 + round) % kLetters;
        const Letter& found = box.await(from, letter);
        EXPECT(found.shape.ndim == letter % 3 && strcmp(found.dtype, "int64") == 0);
        int64_t got = 0;
        box.take(letter, &got, sizeof(got));
        EXPECT(got == 1000 * from + 100000 * round + letter);
      }
      for (int letter = 0; letter < kLetters; letter++) box.await_taken(to, letter);
    }
    meet(job, program, box);
    return {};
  });
}

// What a sender writes into its memory once a message was taken does not reach the receiver; before that it waits.
void a_letter_waits_until_its_last_message_was_taken() {
  run_ranks(2, As::threads, [](Job& job, Program& program) -> Row {
    Mailbox box(job, program, 1);
    meet(job, program, box);
    const Scratch room(job.stream(), 2 * sizeof(int64_t));
    auto* values = reinterpret_cast<int64_t*>(room.data());
    for (int64_t number = 0; number < 200; number++) {
      if (program.rank() == 0) {
        values[number % 2] = number;
        box.send(1, 0, values + number % 2, "int64", {});
      } else {
        if (number % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        box.await(0, 0);
        int64_t got = -1;
        box.take(0, &got, sizeof(got));
        EXPECT(got == number);
      }
    }
    if (program.rank() == 0) box.await_taken(1, 0);
    meet(job, program, box);
    return {};
  });
}

// Of what travels another way the letter alone, and the next one waits until it was heard.
void a_letter_tells_what_comes_another_way() {
  run_ranks(2, As::threads, [](Job& job, Program& program) -> Row {
    Mailbox box(job, program, 1);
    meet(job, program, box);
    for (int64_t number = 0; number < 50; number++) {
      if (program.rank() == 0) {
        box.tell(1, 0, "bfloat16", {number, 3});
      } else {
        const Letter& found = box.await(0, 0);
        EXPECT(found.shape.ndim == 2 && found.shape.dims[0] == number && found.shape.dims[1] == 3 && strcmp(found.dtype, "bfloat16") == 0);
        box.take(0, nullptr, 0);
      }
    }
    if (program.rank() == 0) box.await_taken(1, 0);
    meet(job, program, box);
    return {};
  });
}

void messages_without_elements_have_a_shape() {
  run_ranks(2, As::threads, [](Job& job, Program& program) -> Row {
    Mailbox box(job, program, 1);
    meet(job, program, box);
    if (program.rank() == 0) {
      box.send(1, 0, nullptr, "float32", {4, 0, 3});
      box.await_taken(1, 0);
    } else {
      const Letter& found = box.await(0, 0);
      EXPECT(found.shape.ndim == 3 && found.shape.dims[0] == 4 && found.shape.dims[1] == 0 && found.shape.dims[2] == 3);
      box.take(0, nullptr, 0);
    }
    meet(job, program, box);
    return {};
  });
}

void wrong_messages_are_refused() {
  run_ranks(2, As::threads, [](Job& job, Program& program) -> Row {
    Mailbox box(job, program, 2);
    const auto refused = [](const char* part, const std::function<void()>& call) {
      std::string text;
      try {
        call();
      } catch (const Error& error) {
        text = error.what();
      }
      CHECK(Failure, has(text, part), "expected ", part, ", got ", text);
    };
    const int other = 1 - program.rank();
    int64_t outside = 0;
    refused("has not opened", [&] { box.send(other, 0, &outside, "int64", {}); });
    meet(job, program, box);
    refused("does not lie in the memory", [&] { box.send(other, 0, &outside, "int64", {}); });
    refused("letter 2 of a mailbox of 2", [&] { box.send(other, 2, &outside, "int64", {}); });
    refused("letter -1", [&] { box.await(other, -1); });
    refused("9 dims", [&] { box.send(other, 0, &outside, "int64", std::vector<int64_t>(9, 1)); });
    refused("expected at least 1", [&] { Mailbox(job, program, 0); });
    refused("got member 5", [&] { box.open(5, 0); });
    return {};
  });
}

// Rank 2 waits for rank 1, which waits for rank 0, which sleeps.
void who_holds_up_those_that_wait_for_each_other_is_named() {
  const auto errors = errors_of(
      3,
      [](Job& job, Program& program) -> Row {
        Mailbox box(job, program, 1);
        meet(job, program, box);
        if (program.rank() == 0)
          std::this_thread::sleep_for(std::chrono::milliseconds(1200));
        else
          box.await(program.rank() - 1, 0);
        return {};
      },
      0.4);
  for (size_t rank : {1, 2}) EXPECT(has(errors[rank], "rank 0 did not answer") && has(errors[rank], "in a message between stages"));
}

void a_rank_that_takes_no_message_and_leaves_is_named() {
  const auto errors = errors_of(2, [](Job& job, Program& program) -> Row {
    Mailbox box(job, program, 1);
    meet(job, program, box);
    if (program.rank() == 1) {
      program.close();
      job.close();
      return {};
    }
    const Scratch room(job.stream(), 8);
    box.send(1, 0, room.data(), "int64", {});
    box.await_taken(1, 0);
    return {};
  });
  EXPECT(has(errors[0], "rank 1 left the job"));
}

}  // namespace

std::vector<Test> mailbox_tests() {
  return {{"letters are taken in any order", letters_are_taken_in_any_order},
          {"a letter waits until its last message was taken", a_letter_waits_until_its_last_message_was_taken},
          {"messages without elements have a shape", messages_without_elements_have_a_shape},
          {"a letter tells what comes another way", a_letter_tells_what_comes_another_way},
          {"wrong messages are refused", wrong_messages_are_refused},
          {"who holds up those that wait for each other is named", who_holds_up_those_that_wait_for_each_other_is_named},
          {"a rank that takes no message and leaves is named", a_rank_that_takes_no_message_and_leaves_is_named}};
}

}  // namespace gingham
