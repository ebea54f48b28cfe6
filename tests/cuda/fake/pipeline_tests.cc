// Rung 5: the CUDA backend's host side (streams, events, groups of messages) on fake devices, by the microbenchmark's cases with exact
// integer data. Ranks are processes over the fake NCCL or threads over device copies.
//   pipeline_tests            runs all and prints one line a test; exit 1 when one fails.   pipeline_tests NAME   runs one
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <functional>
#include <mutex>

#include "pipeline.h"

namespace gingham {
namespace {

// In 16 bits the last product rounds as it stores: what no rank adds to has no sum in fp32 beside it, and the same bits.
void sums_of_16_bits() {
  for (const char* name : kCases)
    for (DType dtype : {DType::bf16, DType::f16})
      for (const std::array<int, 3>& grid : {std::array{1, 1, 1}, {2, 1, 1}, {1, 2, 1}, {2, 2, 1}, {2, 2, 2}})
        for (int slices : {1, 3}) {
          Options o = options(Carrier::nccl, grid);
          o.name = name;
          o.dtype = dtype;
          o.slices = slices;
          expect_right(o);
          if (o.size() > 1 || slices > 1) continue;
          const double workspace = run_matmul(o).workspace;
          EXPECT(workspace == 0, o.name, " of one product kept ", workspace, " bytes beside its result");
        }
  // Long enough for sums that bfloat16 has to round, which it may do once.
  for (const char* name : {"matmul", "dx", "dw"})
    for (const std::array<int, 3>& grid : {std::array{1, 1, 1}, {2, 1, 1}, {2, 2, 2}})
      for (const bool swapped : {false, true}) {
        Options o = options(Carrier::nccl, grid);
        o.name = name;
        o.dtype = DType::bf16;
        o.slices = 3;
        o.swapped = swapped;
        (name[0] == 'm' ? o.k : name[1] == 'x' ? o.n : o.m) = 3000;
        expect_right(o);
      }
}

void products_over_nccl() {
  every_product(Carrier::nccl, kGrids);
  every_product(Carrier::nccl, {{2, 2, 2}}, DType::bf16);
}
void products_over_copies() {
  every_product(Carrier::copy, {{2, 2, 1}, {2, 2, 2}, {1, 2, 1}});
  every_product(Carrier::copy, {{2, 2, 2}}, DType::f16);
}
void collectives() {
  every_collective(Carrier::nccl);
  every_collective(Carrier::copy);
}
// Messages that are cut into pieces.
void collectives_in_pieces() {
  const With small("GINGHAM_CHUNK_BYTES", "64");
  every_collective(Carrier::copy);
  const With jitter("FAKE_CUDA_JITTER", "500");
  every_collective(Carrier::nccl);
}
void attention() {
  every_ring(Carrier::nccl);
  every_ring(Carrier::copy);
}
void attention_over_copies() { every_ring(Carrier::copy); }
void one_communicator_at_a_time() {
  const With alone("FAKE_NCCL_ONE_AT_A_TIME", "1"), jitter("FAKE_CUDA_JITTER", "200");
  every_ring(Carrier::nccl);
  every_product(Carrier::nccl, {{2, 2, 1}, {2, 2, 2}});
  every_collective(Carrier::nccl);
}
void with_buffering() {
  const With buffered("FAKE_NCCL_BUFFERED", "1"), jitter("FAKE_CUDA_JITTER", "200");
  every_product(Carrier::nccl, {{2, 2, 2}});
}
void with_jitter() {
  for (const char* seed : {"1", "2", "3"}) {
    const With jitter("FAKE_CUDA_JITTER", "500"), seeded("FAKE_CUDA_SEED", seed);
    every_ring(Carrier::nccl);
    every_product(Carrier::copy, {{2, 2, 1}});
    every_product(Carrier::nccl, {{2, 2, 2}});
  }
}

// What a graph capture asks: all streams come back to the caller's, the host waits for none, none is the default stream.
void expect_capturable(Options o) {
  unsigned long long waited = 0;
  int rounds = 0;
  o.after = [&](Job& job) {
    const int left = fake_unjoined(job.stream().native());
    EXPECT(left == 0, left, " streams not joined after ", o.name);
    const unsigned long long now = fake_host_waits();
    // between two rounds the benchmark itself waits: once for the end, and for each matrix that it fills
    EXPECT(rounds++ == 0 || now <= waited + (o.ranks ? 3 : 1), "the host waited ", now - waited, " times");
    EXPECT(fake_legacy_uses() == 0, "default stream used");
    EXPECT(fake_pool_keeps() == UINT64_MAX, "the pool gives memory back in every round, it keeps ", fake_pool_keeps());
    waited = now;
  };
  expect_right(o);
}

void a_step_could_be_captured() {
  for (const char* name : kCases)
    for (int slices : {1, 3}) {
      Options o = options(Carrier::nccl, {2, 2, 2});
      o.name = name;
      o.slices = slices;
      expect_capturable(o);
    }
  for (const char* name : kCollectives) {
    Options o = options(Carrier::nccl, {1, 1, 1});
    o.name = name;
    o.ranks = 4;
    expect_capturable(o);
  }
  expect_capturable(ring_of(Carrier::nccl, 4, 37));
}

void a_step_is_captured() {
  for (const char* name : {"matmul", "backward"})
    for (int slices : {1, 3}) {
      Options o = options(Carrier::nccl, {2, 2, 2});
      o.name = name;
      o.slices = slices;
      expect_captured(o, slices == 1 ? cudaStreamCaptureModeGlobal : cudaStreamCaptureModeThreadLocal);
    }
  for (const char* name : kCollectives) {
    Options o = options(Carrier::nccl, {1, 1, 1});
    o.name = name;
    o.ranks = 4;
    expect_captured(o, cudaStreamCaptureModeGlobal);
  }
  expect_captured(ring_of(Carrier::nccl, 4, 37), cudaStreamCaptureModeGlobal);
}

// Ranks that are threads: who comes first is told why, the others that it left.
void captures_of_copies_are_refused() {
  std::mutex mutex;
  std::string said;
  Options o = options(Carrier::copy, {1, 2, 1});
  o.start = [&](const RankBody& body) {
    return run_ranks(2, As::threads, [&](Job& job, Program& program) {
      try {
        return body(job, program);
      } catch (const Error& error) {
        cudaGraph_t graph = nullptr;
        cudaStreamEndCapture(native(job.stream()), &graph);  // it may not outlive the test
        const std::lock_guard lock(mutex);
        said += error.what();
        throw;
      }
    });
  };
  try {
    expect_captured(o, cudaStreamCaptureModeThreadLocal);
  } catch (const Error&) {
    EXPECT(said.find("cannot be captured in a CUDA graph") != std::string::npos, "it said: ", said);
    return;
  }
  EXPECT(false, "nothing was refused");
}

// Each call goes to the stream on which the caller computes, also where that is CUDA's default stream, as torch's is: what the caller queued
// before a step comes before it, what it queues afterwards comes after.
void on_the_callers_stream() {
  const With jitter("FAKE_CUDA_JITTER", "200");
  for (const bool legacy : {true, false})
    for (const char* name : {"matmul", "backward", "attention", "all_reduce"}) {
      Options o = strcmp(name, "attention") == 0 ? ring_of(Carrier::nccl, 4, 37) : options(Carrier::nccl, {2, 2, 1});
      o.name = name;
      if (strcmp(name, "all_reduce") == 0) o.ranks = 4;
      cudaStream_t mine = nullptr;  // each rank is a process
      o.entered = [&](Job& job) {
        void* const own = job.stream().native();
        job.gpu()->begin(std::nullopt);
        EXPECT(job.stream().native() == own, "it left its stream without being told");
        if (!legacy) CUDA_CHECK(cudaStreamCreateWithFlags(&mine, cudaStreamNonBlocking));
        job.gpu()->begin(static_cast<void*>(mine));
        EXPECT(job.stream().native() == static_cast<void*>(mine), "it stayed on a stream of its own");
      };
      o.after = [&](Job& job) {
        EXPECT(job.stream().native() == static_cast<void*>(mine), "it left the caller's stream");
        EXPECT(fake_unjoined(mine) == 0, "streams not joined to the caller's after ", o.name);
        EXPECT(fake_legacy_joins() == 0, "messages and kernels wait for each other ", fake_legacy_joins(),
               " times, as streams do that are not non-blocking");
      };
      expect_right(o);
    }
}

// What NCCL moved is what the transport counted, and the formula of docs/theory.md: forward and backward, summed over the ranks.
void bytes_are_nccls() {
  auto* received = static_cast<std::atomic<uint64_t>*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  for (const char* name : {"matmul", "dx", "dw", "backward", "attention"}) {
    *received = 0;
    Options o = strcmp(name, "attention") == 0 ? ring_of(Carrier::nccl, 4, 37, DType::bf16) : options(Carrier::nccl, {2, 2, 2});
    o.name = name;
    o.rounds = 1;
    o.warmup = 0;
    o.after = [&](Job& job) {
      job.gpu()->synchronize();
      *received += fake_nccl_received();
    };
    const Measured m = measure(o);
    EXPECT(static_cast<double>(received->load()) == m.formula && m.bytes == m.formula, name, ": NCCL moved ", received->load(), " bytes, counted ",
           m.bytes, ", formula ", m.formula);
  }
  munmap(received, 4096);
}

struct Test {
  const char* name;
  void (*run)();
};
const Test kTests[] = {{"products over nccl", products_over_nccl},
                       {"products over copies", products_over_copies},
                       {"sums of 16 bits", sums_of_16_bits},
                       {"collectives", collectives},
                       {"collectives in pieces", collectives_in_pieces},
                       {"attention", attention},
                       {"attention over copies", attention_over_copies},
                       {"one communicator at a time", one_communicator_at_a_time},
                       {"with buffering", with_buffering},
                       {"with jitter", with_jitter},
                       {"a step could be captured", a_step_could_be_captured},
                       {"a step is captured", a_step_is_captured},
                       {"captures of copies are refused", captures_of_copies_are_refused},
                       {"on the caller's stream", on_the_callers_stream},
                       {"sums beside the caller", sums_beside_the_caller},
                       {"sums beside are captured", sums_beside_are_captured},
                       {"sums beside run while the caller does", sums_beside_run_while_the_caller_does},
                       {"weights gathered early", weights_gathered_early},
                       {"early weights change no bits", early_weights_change_no_bits},
                       {"early weights come while the caller computes", early_weights_come_while_the_caller_computes},
                       {"messages by copy engines", messages_by_copy_engines},
                       {"what copy engines sent is written over", what_copy_engines_sent_is_written_over},
                       {"copy engines behind each other", copy_engines_behind_each_other},
                       {"copy engines in a graph", copy_engines_in_a_graph},
                       {"what copy engines wait for is let go", what_copy_engines_wait_for_is_let_go},
                       {"a replay is let go", a_replay_is_let_go},
                       {"copy engines that cannot", copy_engines_that_cannot},
                       {"a late hang is named", a_late_hang_is_named},
                       {"long kernels are no stall", long_kernels_are_no_stall},
                       {"a refused send closes its group", a_refused_send_closes_its_group},
                       {"an abort waits for a call", an_abort_waits_for_a_call},
                       {"memory outlasts messages", memory_outlasts_messages},
                       {"what an error left is not sent", what_an_error_left_is_not_sent},
                       {"a scope gives the device back", a_scope_gives_the_device_back},
                       {"slots of copies are taken in turn", slots_of_copies_are_taken_in_turn},
                       {"some shares are empty", some_shares_are_empty},
                       {"bytes are nccl's", bytes_are_nccls}};

}  // namespace
}  // namespace gingham

int main(int argc, char** argv) {
  int passed = 0, failed = 0;
  for (const auto& test : gingham::kTests) {
    if (argc > 1 && strcmp(argv[1], test.name) != 0) continue;
    try {
      test.run();
      printf("ok   %s\n", test.name);
      passed++;
    } catch (const std::exception& error) {
      printf("FAIL %s: %s\n", test.name, error.what());
      failed++;
    }
    fflush(stdout);
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}
