// Errors of a job whose ranks are on several hosts: all ranks are told of the same one, before anything wrong is used.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "collectives/all_reduce.h"
#include "collectives/resident.h"
#include "virtual_hosts.h"

namespace gingham {
namespace {

// What every rank does in the tests of errors: all_reduce of `count` ones over all ranks.
void sum(Job& job, Program& program, Axis& axis, int64_t count, const char* name = "all_reduce") {
  Room room(job, 1, count, DType::f32);
  for (int64_t i = 0; i < count; i++) static_cast<float*>(room.view().data)[i] = 1;
  program.begin(named(name, count));
  all_reduce(axis, room.view(), job.stream());
  for (int64_t i = 0; i < count; i++) EXPECT(static_cast<const float*>(room.view().data)[i] == kRanks);
}

// Calls body on every layout and both engines; how the ranks ended goes to `judge`.
void on_all_layouts(const RankBody& body, const std::function<void(const Layout&, const std::vector<Ending>&)>& judge, double timeout = 20) {
  for (const Layout& hosts : kLayouts)
    for (Via via : {Via::queues, Via::handed}) judge(hosts, run_on_hosts(hosts, via, body, timeout));
}

void all_ended(const Layout& hosts, const std::vector<Ending>& endings, const char* kind, int odd, const char* part) {
  for (size_t r = 0; r < endings.size(); r++) {
    const Ending& e = endings[r];
    const bool right = e.kind == kind && has(e.text, part) && (odd < 0 || e.rank == odd);
    CHECK(Failure, right, "rank ", r, " on ", name_of(hosts), ": ", e.kind.empty() ? "no error" : e.kind, " of rank ", e.rank, ": ", e.text,
          "; expected ", kind, " of rank ", odd, " with: ", part);
  }
}

// The odd rank's call must move nothing, and what comes later must fail as it did.
Row differs(Job& job, Program& program, const char* odd_name, int64_t odd_count) {
  const auto axis = job.axis(program, 0, everyone(kRanks));
  sum(job, program, *axis, 40000);
  const uint64_t before = axis->traffic(true).bytes_received;
  EXPECT(before > 0);
  const bool odd = job.rank() == 3;
  std::string first;
  try {
    sum(job, program, *axis, odd ? odd_count : 5, odd ? odd_name : "all_reduce");
  } catch (const Error& error) {
    first = error.what();
  }
  EXPECT(axis->traffic(true).bytes_received == 0);
  try {
    sum(job, program, *axis, 5);
  } catch (const Error& error) {
    EXPECT(first == error.what());
    throw;
  }
  return {};
}

void other_shapes_are_told_before_a_byte_moves() {
  on_all_layouts([](Job& job, Program& program) { return differs(job, program, "all_reduce", 7); },
                 [](const Layout& hosts, const std::vector<Ending>& endings) {
                   all_ended(hosts, endings, "ShapeError", -1, "rank 3 got all_reduce(dtype=float32, K=7");
                 });
}

void another_call_is_told_before_a_byte_moves() {
  on_all_layouts([](Job& job, Program& program) { return differs(job, program, "all_gather", 5); },
                 [](const Layout& hosts, const std::vector<Ending>& endings) {
                   all_ended(hosts, endings, "MeshError", -1, "rank 3 got all_gather(dtype=float32, K=5");
                 });
}

void a_rank_that_refuses_its_arguments_is_told() {
  on_all_layouts(
      [](Job& job, Program& program) -> Row {
        const auto axis = job.axis(program, 0, everyone(kRanks));
        sum(job, program, *axis, 100);
        Call call = named("all_reduce", 100);
        if (job.rank() == 3) {
          call.invalid = 1;
          strcpy(call.note, "input has 5 features, expected 4");
          program.begin(call);
          program.check();
          throw Failure("nobody was told");
        }
        sum(job, program, *axis, 100);
        return {};
      },
      [](const Layout& hosts, const std::vector<Ending>& endings) {
        all_ended(hosts, endings, "ShapeError", -1, "rank 3 got all_reduce refused: input has 5 features");
      });
}

void a_rank_that_dies_is_named_by_all(int who) {
  on_all_layouts(
      [who](Job& job, Program& program) -> Row {
        const auto axis = job.axis(program, 0, everyone(kRanks));
        for (int call = 0; call < 4; call++) {
          if (call == 3 && job.rank() == who) throw Dies();
          sum(job, program, *axis, 40000);
        }
        return {};
      },
      [who](const Layout& hosts, std::vector<Ending> endings) {
        EXPECT(endings[static_cast<size_t>(who)].kind.empty());
        endings.erase(endings.begin() + who);
        all_ended(hosts, endings, "PeerDied", who, concat("rank ", who, " on h").c_str());
      });
}

void a_rank_that_leaves_is_named_by_all() {
  on_all_layouts(
      [](Job& job, Program& program) -> Row {
        const auto axis = job.axis(program, 0, everyone(kRanks));
        for (int call = 0; call < 3; call++)
          if (job.rank() != 1 || call < 2) sum(job, program, *axis, 1000);
        return {};
      },
      [](const Layout& hosts, std::vector<Ending> endings) {
        EXPECT(endings[1].kind.empty());
        endings.erase(endings.begin() + 1);
        all_ended(hosts, endings, "PeerDied", 1, "left the job (destroy or exit) while others wait for it");
      });
}

void a_rank_that_stalls_is_named_by_all() {
  for (const Layout& hosts : {kLayouts[0], kLayouts[3]}) {
    std::vector<Ending> endings = run_on_hosts(
        hosts, Via::queues,
        [](Job& job, Program& program) -> Row {
          const auto axis = job.axis(program, 0, everyone(kRanks));
          sum(job, program, *axis, 1000);
          if (job.rank() == 2) std::this_thread::sleep_for(std::chrono::milliseconds(1000));
          sum(job, program, *axis, 1000);
          return {};
        },
        0.4);
    all_ended(hosts, endings, "PeerStalled", 2, "rank 2 did not answer for 0.4 s (in all_reduce)");
  }
}

void memory_that_ran_out_is_told_to_all() {
  on_all_layouts(
      [](Job& job, Program& program) -> Row {
        const auto axis = job.axis(program, 0, everyone(kRanks));
        sum(job, program, *axis, 1000);
        if (job.rank() == 2) job.heap().fail_after(1);  // of two allocations
        try {
          sum(job, program, *axis, 1000);
        } catch (const OutOfMemory&) {
          EXPECT(job.rank() == 2);
        }
        program.check();
        sum(job, program, *axis, 1000);
        return {};
      },
      [](const Layout& hosts, const std::vector<Ending>& endings) {
        all_ended(hosts, endings, "PeerOutOfMemory", 2, "over several hosts the mesh must be made anew");
      });
}

// A rank waits for a message of its first call; the sender has made as many calls since then as are kept of it, and more.
void a_rank_far_ahead_is_not_the_odd_one() {
  for (const Layout& hosts : {kOne, kLayouts[0]}) {
    const auto pause = std::chrono::milliseconds(hosts.size() > 1 ? 600 : 200);  // until the one that waits looks, or asks
    rows_on_hosts(hosts, Via::queues, [&](Job& job, Program& program) -> Row {
      const auto axis = job.axis(program, 0, everyone(kRanks));
      program.begin(named("first"));
      Room room(job, 1, 8, DType::f32);
      if (job.rank() == 0) {
        for (uint32_t call = 0; call < kHistory; call++) program.begin(named("later", call));
        std::this_thread::sleep_for(pause);
        axis->ring().send(3, room.view().data, 32);
        axis->ring().drain(3);
      } else if (job.rank() == 3) {
        axis->ring().recv(0, room.view().data, 32);
      }
      return {};
    });
  }
}

// Rank 1 dies while rank 0 waits for a message of rank 3, which sends it after rank 0 has raised, and has new data where it would have gone.
void what_comes_after_an_error_writes_into_nothing_new() {
  for (const Layout& hosts : {kOne, kLayouts[0], kLayouts[3]})
    for (Via via : {Via::queues, Via::handed}) {
      constexpr int64_t kCount = 50000;
      const std::vector<Ending> endings = run_on_hosts(hosts, via, [&](Job& job, Program& program) -> Row {
        const auto axis = job.axis(program, 0, everyone(kRanks));
        program.begin(named("late"));
        if (job.rank() == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(20));
          job.control().fail(Control::Kind::died, 1, "rank 1 died");  // as one that shares its host would say
          throw Dies();
        }
        Room sent(job, 1, kCount, DType::f32);
        if (job.rank() == 3) {
          std::this_thread::sleep_for(std::chrono::milliseconds(200));
          axis->ring().send(0, sent.view().data, sent.view().bytes());
          axis->ring().drain(0);
        }
        if (job.rank() != 0) return {};
        const auto wait = [&] {
          Room room(job, 1, kCount, DType::f32);
          axis->ring().recv(3, room.view().data, room.view().bytes());
        };
        std::string error;
        try {
          wait();
        } catch (const PeerDied& died) {
          error = died.what();
        }
        EXPECT(has(error, "rank 1 died"));
        const Room room(job, 1, kCount, DType::f32);
        float* const data = static_cast<float*>(room.view().data);
        std::fill_n(data, kCount, 7.0f);
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        for (int64_t i = 0; i < kCount; i++) EXPECT(data[i] == 7.0f);
        return {};
      });
      CHECK(Failure, endings[0].kind.empty(), endings[0].text, " on ", name_of(hosts));
    }
}

// Others ask what a rank's calls were while it makes them: each call that they are told of is whole.
void what_is_told_of_calls_is_whole() {
  run_ranks(1, As::threads, [](Job& job, Program& program) -> Row {
    std::atomic<bool> over{false};
    std::atomic<int> asked{0}, torn{0};
    std::thread asks([&] {
      while (!over) {
        const std::string told = job.told(program.id());
        Told mine;
        memcpy(static_cast<void*>(&mine), told.data(), sizeof(mine));
        for (uint32_t number = mine.log.sequence; number > 0 && mine.log.remembers(number); number--) {
          const Call& call = mine.log.at(number);
          torn += call.k != number || call.n != number || call.rows != number || call.name != concat("call ", number);
        }
        asked++;
      }
    });
    for (uint32_t number = 1; number <= 20000 || asked < 100; number++) {
      Call call = named(concat("call ", number).c_str(), number, number);
      call.n = number;
      program.begin(call);
      if (number % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    over = true;
    asks.join();
    EXPECT(torn == 0);
    return {};
  });
}

}  // namespace

std::vector<Test> hosts_error_tests() {
  std::vector<Test> tests{{"over hosts: other shapes are told before a byte moves", other_shapes_are_told_before_a_byte_moves},
                          {"over hosts: another call is told before a byte moves", another_call_is_told_before_a_byte_moves},
                          {"over hosts: a rank that refuses its arguments is told", a_rank_that_refuses_its_arguments_is_told},
                          {"over hosts: a rank that leaves is named by all", a_rank_that_leaves_is_named_by_all},
                          {"over hosts: a rank that stalls is named by all", a_rank_that_stalls_is_named_by_all},
                          {"over hosts: memory that ran out is told to all", memory_that_ran_out_is_told_to_all},
                          {"over hosts: a rank far ahead is not the odd one", a_rank_far_ahead_is_not_the_odd_one},
                          {"over hosts: what comes after an error writes into nothing new", what_comes_after_an_error_writes_into_nothing_new},
                          {"over hosts: what is told of calls is whole", what_is_told_of_calls_is_whole}};
  for (int who : {0, 3}) tests.push_back({"over hosts: a rank that dies is named by all", [who] { a_rank_that_dies_is_named_by_all(who); }});
  return tests;
}

}  // namespace gingham
