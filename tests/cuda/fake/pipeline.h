// What the tests of the host side share: the fake runtime's own calls, cases with exact integer data, and what is expected of them.
#pragma once
#include <stdlib.h>

#include <chrono>
#include <thread>

#include "base/cuda.h"
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
  With(const char* name, const char* value) : name_(name) { set(name, value); }
  ~With() { set(name_, nullptr); }

 private:
  const char* name_;
};

// Work of that length on a stream; one length at a time.
inline void sleep_on(cudaStream_t stream, int milliseconds) {
  static int length = 0;
  length = milliseconds;
  CUDA_CHECK(fake_enqueue(stream, [](void* p) { std::this_thread::sleep_for(std::chrono::milliseconds(*static_cast<int*>(p))); }, &length));
}

// Longer than the watch of transport/nccl sleeps.
inline void watched() { std::this_thread::sleep_for(std::chrono::milliseconds(120)); }

// Of pipeline_faults.cc.
void a_late_hang_is_named();
void long_kernels_are_no_stall();
void a_refused_send_closes_its_group();
void an_abort_waits_for_a_call();
void memory_outlasts_messages();
void a_scope_gives_the_device_back();
void slots_of_copies_are_taken_in_turn();
void some_shares_are_empty();

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
