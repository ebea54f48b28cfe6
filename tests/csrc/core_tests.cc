// The core's own tests, ranks as threads, so that the sanitizers see every access: heap, waits, errors, messages, and the fused step over
// grids, sources and slices with exact integer data (through the microbenchmark's cases).
//   core_tests [words]    runs all, or those that have the words in their name, and prints one line a test; exit 1 when one fails
#include "core_tests.h"

#include <stdio.h>
#include <string.h>

#include <atomic>
#include <functional>
#include <thread>

#include "base/crc32c.h"
#include "collectives/all_gather.h"
#include "collectives/resident.h"
#include "kernels/dropout.h"
#include "ops/step.h"

namespace gingham {

std::vector<int> everyone(int n) {
  std::vector<int> out;
  for (int i = 0; i < n; i++) out.push_back(i);
  return out;
}

Call named(const char* name, int64_t k, int64_t rows) {
  Call call;
  call.set_name(name);
  call.k = k;
  call.rows = rows;
  return call;
}

std::vector<std::string> errors_of(int size, const RankBody& body, double timeout) {
  std::vector<std::string> errors(static_cast<size_t>(size));
  run_ranks(
      size, As::threads,
      [&](Job& job, Program& program) -> Row {
        try {
          body(job, program);
        } catch (const Error& error) {
          errors[static_cast<size_t>(job.rank())] = error.what();
        }
        return {};
      },
      timeout);
  return errors;
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

namespace {

void heap_reuses_blocks() {
  run_ranks(1, As::threads, [](Job& job, Program&) -> Row {
    void* a = job.heap().allocate(1000, Heap::Kind::tensor);
    job.heap().free(a);
    void* b = job.heap().allocate(990, Heap::Kind::workspace);
    EXPECT(a == b);
    EXPECT(job.heap().usage().workspace >= 990 && job.heap().usage().tensors == 0);
    job.heap().free(b);
    const uint64_t grown = job.heap().usage().grown;
    for (int i = 0; i < 1000; i++) job.heap().free(job.heap().allocate(5000, Heap::Kind::tensor));
    EXPECT(job.heap().usage().grown == grown);
    bool refused = false;
    try {
      job.heap().allocate(size_t{1} << 50, Heap::Kind::tensor);
    } catch (const OutOfMemory& error) {
      refused = has(error.what(), "bytes");
    }
    EXPECT(refused);
    return {};
  });
}

void odd_rank_is_named_before_a_byte_moves() {
  uint64_t received[4] = {};
  const auto errors = errors_of(4, [&](Job& job, Program& program) -> Row {
    auto axis = job.axis(program, 0, everyone(4));
    program.begin(named("call", job.rank() == 2 ? 7 : 5));
    const Scratch room(job.stream(), 64);
    std::vector<Scratch> rooms;
    std::vector<Matrix> blocks;
    for (int i = 0; i < 4; i++) {
      rooms.emplace_back(job.stream(), 64);
      blocks.push_back(dense(rooms.back().data(), 1, 16, DType::f32));
    }
    memset(room.data(), 0, 64);
    try {
      all_gather(*axis, dense(room.data(), 1, 16, DType::f32), blocks, job.stream());
    } catch (const Error&) {
      received[job.rank()] = axis->traffic(false).bytes_received;
      throw;
    }
    return {};
  });
  for (int r = 0; r < 4; r++) {
    EXPECT(has(errors[static_cast<size_t>(r)], "rank 2 got call(dtype=float32, K=7") && has(errors[static_cast<size_t>(r)], "K=5"));
    EXPECT(r != 2 || received[r] == 0);
  }
}

void refusal_reaches_the_peers() {
  const auto errors = errors_of(3, [](Job& job, Program& program) -> Row {
    auto axis = job.axis(program, 0, everyone(3));
    Call call = named("linear");
    if (job.rank() == 1) {
      call.invalid = 1;
      strcpy(call.note, "input has 5 features, expected 4");
    }
    program.begin(call);
    CHECK(ShapeError, job.rank() != 1, "refused here");
    axis->board().post({}, -1, true, {});
    for (int peer = 0; peer < 3; peer++) axis->board().rows(peer);
    return {};
  });
  EXPECT(has(errors[0], "rank 1 got linear refused: input has 5 features") && has(errors[2], "rank 1 got linear refused"));
}

void stalled_rank_is_named() {
  const auto errors = errors_of(
      3,
      [](Job& job, Program& program) -> Row {
        auto axis = job.axis(program, 0, everyone(3));
        program.begin(named("step"));
        if (job.rank() == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1200));
          return {};
        }
        axis->board().post({}, -1, true, {});
        axis->board().rows(1);
        return {};
      },
      0.4);
  EXPECT(has(errors[0], "rank 1 did not answer") && has(errors[2], "rank 1 did not answer"));
}

// Rank 1 does what rank 0 waits for and leaves, after rank 0 has looked for it and before rank 0 looks who has left.
void what_a_rank_did_before_it_left_counts() {
  std::atomic<bool> leave{false};
  struct Arrival : Condition {
    bool met() override {
      if (arrived || slept == 0) return arrived;
      leave = true;
      while (!job.control().left(1)) std::this_thread::yield();
      arrived = true;
      return false;
    }
    void sleep(int milliseconds) override {
      std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
      slept++;
    }
    Arrival(Job& job, std::atomic<bool>& leave) : job(job), leave(leave) {}
    Job& job;
    std::atomic<bool>& leave;
    bool arrived = false;
    int slept = 0;
  };
  const auto errors = errors_of(2, [&](Job& job, Program& program) -> Row {
    program.begin(named("last"));
    if (job.rank() == 0) {
      Arrival arrival(job, leave);
      program.wait(arrival, 1);
    } else {
      while (!leave) std::this_thread::yield();
      program.close();
      job.close();
    }
    return {};
  });
  EXPECT(errors[0].empty() && errors[1].empty());
}

void failure_message_reaches_the_peers() {
  const auto errors = errors_of(2, [](Job& job, Program& program) -> Row {
    auto axis = job.axis(program, 0, everyone(2));
    program.begin(named("step"));
    if (job.rank() == 0) {
      job.control().fail(Control::Kind::died, 0, "rank 0 raised ValueError: bad");
      return {};
    }
    axis->board().post({}, -1, true, {});
    axis->board().rows(0);
    return {};
  });
  EXPECT(has(errors[1], "rank 0 raised ValueError: bad"));
}

void lanes_keep_their_order() {
  run_ranks(2, As::threads, [](Job& job, Program& program) -> Row {
    auto axis = job.axis(program, 0, everyone(2));
    program.begin(named("messages"));
    const Scratch room(job.stream(), 400 * sizeof(int64_t));
    int64_t* values = reinterpret_cast<int64_t*>(room.data());
    if (job.rank() == 0) {
      for (int i = 0; i < 200; i++) {
        values[i] = i;
        values[200 + i] = 1000 + i;
      }
      // Lane 1 first, then lane 2: the receiver takes them the other way round, so at most kSlots may be on their way.
      for (int i = 0; i < 200; i += 4) {
        for (int j = i; j < i + 4; j++) axis->ring().send(1, values + j, 8, 1);
        for (int j = i; j < i + 4; j++) axis->ring().send(1, values + 200 + j, 8, 2);
      }
      axis->ring().drain(1, 1);
      axis->ring().drain(1, 2);
    } else {
      for (int i = 0; i < 200; i += 4) {
        int64_t got = 0;
        for (int j = i; j < i + 4; j++) {
          axis->ring().recv(0, &got, 8, 2);
          EXPECT(got == 1000 + j);
        }
        for (int j = i; j < i + 4; j++) {
          axis->ring().recv(0, &got, 8, 1);
          EXPECT(got == j);
        }
      }
    }
    return {};
  });
}

void checksums_are_crc_32c_in_any_pieces() {
  EXPECT(crc32c(0, "123456789", 9) == 0xe3069283 && crc32c_by_tables(0, "123456789", 9) == 0xe3069283 && crc32c(5, nullptr, 0) == 5);
  std::vector<unsigned char> bytes(100003);
  uint32_t state = 1;
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>((state = state * 1664525 + 1013904223) >> 24);
  for (size_t size : {size_t{0}, size_t{1}, size_t{7}, size_t{8}, size_t{4096}, size_t{12287}, size_t{12288}, size_t{12289}, bytes.size() - 3}) {
    const uint32_t whole = crc32c(0, bytes.data() + 3, size);  // not aligned
    EXPECT(whole == crc32c_by_tables(0, bytes.data() + 3, size));
    EXPECT(whole == crc32c(crc32c(0, bytes.data() + 3, size / 3), bytes.data() + 3 + size / 3, size - size / 3));
  }
}

void dropout_is_the_same_in_pieces() {
  const std::vector<int64_t> whole{5, 6, 7};
  std::vector<float> x(5 * 6 * 7, 1.0f), y(x.size()), piece(2 * 3 * 7), out(piece.size());
  const DropoutKey key{3, 4, 5, 0.3};
  dropout(x.data(), y.data(), DType::f32, whole, whole, {0, 0, 0}, key, CpuStream());
  std::fill(piece.begin(), piece.end(), 1.0f);
  dropout(piece.data(), out.data(), DType::f32, {2, 3, 7}, whole, {3, 2, 0}, key, CpuStream());
  double kept = 0;
  for (float v : y) kept += v > 0;
  EXPECT(kept / static_cast<double>(y.size()) > 0.5 && kept / static_cast<double>(y.size()) < 0.9);
  for (size_t i = 0; i < 2; i++)
    for (size_t j = 0; j < 3; j++)
      for (size_t k = 0; k < 7; k++) EXPECT(out[(i * 3 + j) * 7 + k] == y[((i + 3) * 6 + j + 2) * 7 + k]);
}

void step_is_exact_on(std::array<int, 3> grid) {
  for (const char* name : {"matmul", "dx", "dw", "backward"})
    for (Source source : {Source::window, Source::ring})
      for (int slices : {1, 3})
        for (bool swapped : {false, true})
          for (std::array<int64_t, 3> shape : {std::array<int64_t, 3>{12, 24, 8}, {37, 19, 53}, {3, 1, 2}}) {
            Options o;
            o.name = name;
            o.grid = grid;
            o.source = source;
            o.slices = slices;
            o.swapped = swapped;
            o.m = shape[0];
            o.k = shape[1];
            o.n = shape[2];
            o.rounds = 1;
            o.warmup = 1;
            o.check = true;
            o.as = As::threads;
            const Measured m = run_matmul(o);
            CHECK(Failure, m.wrong == 0 && m.bytes == m.formula, name, " ", source == Source::ring ? "ring" : "window", " slices ", slices,
                  " swapped ", swapped, " ", o.m, "x", o.k, "x", o.n, ": ", m.wrong, " wrong, ", m.bytes, " bytes, expected ", m.formula);
          }
}

void collectives_are_exact() {
  for (const char* name : {"all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"})
    for (Source source : {Source::window, Source::ring})
      for (int64_t n : {1, 7, 1000, 200000}) {
        Options o;
        o.name = name;
        o.ranks = 3;
        o.source = source;
        o.n = n;
        o.rounds = 2;
        o.check = true;
        o.as = As::threads;
        o.latency = n == 7 ? 1e-5 : 0;
        const Measured m = run_collective(o);
        CHECK(Failure, m.wrong == 0 && m.bytes == m.formula, name, " n=", n, ": ", m.wrong, " wrong, ", m.bytes, " bytes, expected ", m.formula);
      }
}

int run_all(const std::string& words) {
  std::vector<Test> tests{{"heap reuses blocks", heap_reuses_blocks},
                          {"odd rank is named before a byte moves", odd_rank_is_named_before_a_byte_moves},
                          {"refusal reaches the peers", refusal_reaches_the_peers},
                          {"stalled rank is named", stalled_rank_is_named},
                          {"what a rank did before it left counts", what_a_rank_did_before_it_left_counts},
                          {"failure message reaches the peers", failure_message_reaches_the_peers},
                          {"lanes keep their order", lanes_keep_their_order},
                          {"checksums are CRC-32C in any pieces", checksums_are_crc_32c_in_any_pieces},
                          {"dropout is the same in pieces", dropout_is_the_same_in_pieces},
                          {"collectives are exact", collectives_are_exact}};
  for (std::array<int, 3> grid : {std::array<int, 3>{1, 1, 1}, {2, 2, 1}, {2, 1, 2}, {1, 3, 2}, {3, 2, 1}, {2, 2, 2}})
    tests.push_back({"step is exact", [grid] { step_is_exact_on(grid); }});
  for (const auto& more :
       {attention_tests(), engine_tests(), hosts_tests(), hosts_error_tests(), kernel_tests(), mailbox_tests(), memory_tests(), verdict_tests()})
    tests.insert(tests.end(), more.begin(), more.end());
  std::erase_if(tests, [&](const Test& test) { return !has(test.name, words.c_str()); });
  int failed = 0;
  for (const Test& test : tests) {
    std::string error;
    try {
      test.body();
    } catch (const std::exception& e) {
      error = e.what();
      failed++;
    }
    printf("%s %s%s%s\n", error.empty() ? "ok  " : "FAIL", test.name, error.empty() ? "" : ": ", error.c_str());
    fflush(stdout);
  }
  printf("%d passed, %d failed\n", static_cast<int>(tests.size()) - failed, failed);
  return failed || tests.empty() ? 1 : 0;
}

}  // namespace
}  // namespace gingham

int main(int count, char** words) { return gingham::run_all(count > 1 ? words[1] : ""); }
