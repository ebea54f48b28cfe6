// What the tests of the host side share: the fake runtime's own calls, cases with exact integer data, and what is expected of them.
#pragma once
#include <stdlib.h>

#include <chrono>
#include <optional>
#include <string>
#include <thread>

#include "base/cuda_stream.h"
#include "cases.h"

extern "C" {
int fake_unjoined(void* stream);
unsigned long long fake_host_waits();
unsigned long long fake_pool_keeps();
unsigned long long fake_legacy_uses();
unsigned long long fake_legacy_joins();
unsigned long long fake_nccl_received();
int fake_nccl_open_groups();
int fake_nccl_under_way();
cudaError_t fake_enqueue(void* stream, void (*work)(void*), void* data);
}

namespace gingham {
struct Failure : Error {
  using Error::Error;
};
#define EXPECT(cond, ...) CHECK(Failure, cond, "line ", __LINE__, ": " #cond " ", __VA_ARGS__)

inline Options options(Carrier carrier, std::array<int, 3> grid) {
  Options o;
  o.device = Device::cuda;
  o.source = Source::ring;
  o.carrier = carrier;
  o.as = carrier == Carrier::copy ? As::threads : As::processes;
  o.grid = grid;
  o.m = 37;
  o.k = 41;
  o.n = 53;
  o.rounds = 2;
  o.warmup = 1;
  o.check = true;
  return o;
}

inline Measured measure(const Options& o) {
  if (o.name == "attention") return run_attention(o);
  return o.ranks ? run_collective(o) : run_matmul(o);
}

inline void expect_right(const Options& o) {
  const Measured m = measure(o);
  EXPECT(m.wrong == 0, o.name, " grid ", o.grid[0], o.grid[1], o.grid[2], " ranks ", o.ranks, " m ", o.m, " ", name_of(o.dtype), " slices ",
         o.slices);
  EXPECT(m.bytes == m.formula, o.name, " moved ", m.bytes, " bytes, formula ", m.formula);
}

inline void set(const char* name, const char* value) {
  if (value)
    setenv(name, value, 1);
  else
    unsetenv(name);
}

class With {
 public:
  With(const char* name, const char* value) : name_(name) {
    if (const char* before = getenv(name)) before_ = before;
    set(name, value);
  }
  ~With() { set(name_, before_ ? before_->c_str() : nullptr); }

 private:
  const char* name_;
  std::optional<std::string> before_;
};

// Work of that length on a stream; one length at a time.
inline void sleep_on(cudaStream_t stream, int milliseconds) {
  static int length = 0;
  length = milliseconds;
  CUDA_CHECK(fake_enqueue(stream, [](void* p) { std::this_thread::sleep_for(std::chrono::milliseconds(*static_cast<int*>(p))); }, &length));
}

// Longer than the watch of transport/nccl sleeps.
inline void watched() { std::this_thread::sleep_for(std::chrono::milliseconds(120)); }

inline const char* const kCases[] = {"matmul", "dx", "dw", "backward"};
inline const char* const kCollectives[] = {"all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"};

inline void every_product(Carrier carrier, const std::vector<std::array<int, 3>>& grids, DType dtype = DType::f32) {
  for (const auto& grid : grids)
    for (const char* name : kCases)
      for (int slices : {1, 3})
        for (bool swapped : {false, true}) {
          Options o = options(carrier, grid);
          o.name = name;
          o.dtype = dtype;
          o.slices = slices;
          o.swapped = swapped;
          expect_right(o);
        }
}

inline void every_collective(Carrier carrier) {
  for (int ranks : {2, 4})
    for (const char* name : kCollectives)
      for (int64_t n : {1, 53, 5000}) {
        Options o = options(carrier, {1, 1, 1});
        o.name = name;
        o.ranks = ranks;
        o.n = n;
        expect_right(o);
      }
}

inline Options ring_of(Carrier carrier, int ranks, int64_t time, DType dtype = DType::f32) {
  Options o = options(carrier, {1, 1, 1});
  o.name = "attention";
  o.ranks = ranks;
  o.m = time;
  o.k = 5;
  o.n = 2;
  o.dtype = dtype;
  return o;
}

// Pieces that differ, some without a place.
inline void every_ring(Carrier carrier) {
  for (int ranks : {2, 3, 4})
    for (int64_t time : {3, 37})
      for (DType dtype : {DType::f32, DType::bf16}) expect_right(ring_of(carrier, ranks, time, dtype));
}

// 2d, 2.5d or 3d, 1d and an uneven grid.
inline const std::vector<std::array<int, 3>> kGrids{{2, 2, 1}, {2, 2, 2}, {1, 4, 1}, {1, 2, 1}, {4, 1, 2}};

// Eager rounds and captured ones in turn, as torch.cuda.graph does it after a warm-up; the last result is a captured round's.
inline void expect_captured(Options o, cudaStreamCaptureMode mode) {
  int round = 0;
  bool captures = false;
  o.rounds = 3;
  o.before = [&](Job& job) {
    captures = round++ % 2;
    if (!captures) return;
    if (round > 2) watched();  // the eager groups are seen to end before the capture, in it the first time
    CUDA_CHECK(cudaStreamBeginCapture(native(job.stream()), mode));
  };
  o.after = [&](Job& job) {
    if (!captures) return;
    watched();  // an event of the capture that the watch asks for breaks it
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamEndCapture(native(job.stream()), &graph));
    CUDA_CHECK(cudaGraphDestroy(graph));
  };
  expect_right(o);
}

// What the case's ranks said when it failed; empty where it did not. Each rank is a process, which `looked` sees at its end.
inline std::string failure_of(Options o, double timeout, const std::function<void()>& looked) {
  o.start = [&](const RankBody& body) {
    return run_ranks(
        o.size(), As::processes,
        [&](Job& job, Program& program) {
          try {
            return body(job, program);
          } catch (const Error&) {
            looked();
            throw;
          }
        },
        timeout);
  };
  try {
    expect_right(o);
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

// Of pipeline_faults.cc.
void a_late_hang_is_named();
void long_kernels_are_no_stall();
void a_refused_send_closes_its_group();
void an_abort_waits_for_a_call();
void memory_outlasts_messages();
void a_scope_gives_the_device_back();
void slots_of_copies_are_taken_in_turn();
void some_shares_are_empty();

// Of pipeline_push.cc.
void messages_by_copy_engines();
void what_copy_engines_sent_is_written_over();
void copy_engines_behind_each_other();
void copy_engines_in_a_graph();
void what_copy_engines_wait_for_is_let_go();
void a_replay_is_let_go();
void copy_engines_that_cannot();

// Of pipeline_early.cc.
void weights_gathered_early();
void early_weights_change_no_bits();
void early_weights_come_while_the_caller_computes();

// Of pipeline_beside.cc.
void sums_beside_the_caller();
void sums_beside_are_captured();
void what_an_error_left_is_not_sent();
void sums_beside_run_while_the_caller_does();

}  // namespace gingham
