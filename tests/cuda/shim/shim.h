// Runs CUDA kernels on a CPU to find their mistakes: one fiber per CUDA thread, scheduled in a seeded random order; shared memory starts as
// NaNs; warps meet at .sync instructions and blocks at barriers, and threads that meet at different ones are an error; accesses of shared
// memory are checked for bounds and races and their bank conflicts are counted; cp.async lands at its issue or only at its wait. What this
// cannot see: the compiler's output (the inline PTX has a body of its own here), memory order between blocks, speed.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

// Queues work on a stream: runs it at once, or with a fake runtime that has streams when its stream gets there.
void shim_enqueue(cudaStream_t stream, std::function<void()> work);

namespace gingham::shim {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What holds for launches from now on. Defaults come from GINGHAM_SHIM_SEED and GINGHAM_SHIM_COPY=early|late.
struct Settings {
  uint64_t seed = 1;
  bool early = false;  // cp.async lands when issued; else when waited for, its target being NaN until then
};
void set(const Settings& settings);

// Bank conflicts: 32 banks of 4 bytes; a request of a warp is served in phases of 128 bytes, each in as many passes as the fullest bank has
// different words.
enum class Access { load, store, copy, matrix };
struct Conflicts {
  uint64_t phases = 0, passes = 0;
  int worst = 0;  // passes of one phase
};
Conflicts conflicts(Access access);
void reset_conflicts();

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
};
// Runs every block to its end; throws Error with the first mistake found.
void run(const Launch& launch, const std::function<void()>& thread_body);

// The shared memory that a launch of this kernel may ask for, as cudaFuncSetAttribute grants it.
cudaError_t grant(const void* kernel, int bytes);
bool may_use(const void* kernel, size_t bytes);

// What shim_device.h is made of.
struct Lane {
  const void* in;
  void* out;
};
using Action = void (*)(Lane (&lanes)[32]);
// All 32 lanes meet, the last to come runs the action for all.
void meet_warp(Action action, const char* name, const void* in, void* out);
void meet_warp_memory();  // __syncwarp: orders the lanes' accesses too
void meet_block();
char* block_memory();  // the running block's shared memory
void touch(const void* shared, size_t bytes, Access access);
void issue_copy(void* shared, const void* global, int bytes, int valid);
void commit_copies();
void wait_copies(int pending);
void count_matrix_phase(const void* const (&rows)[8]);

}  // namespace gingham::shim
