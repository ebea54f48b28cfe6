// What the fake CUDA runtime and the fake NCCL share: both are one library, which the tests link and also name as GINGHAM_NCCL.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <random>
#include <thread>
#include <vector>

namespace fake {

void enqueue(cudaStream_t stream, std::function<void()> work);
int device_of(cudaStream_t stream);
void nap(int microseconds);
extern std::atomic<uint64_t> host_waits;         // calls that made the host wait for a device
bool under_way(const void* data, size_t bytes);  // whether a message that is queued or moves reads or writes there; of nccl.cc

// Sleeps now and then, so that pieces of work meet in another order in every run.
class Jitter {
 public:
  Jitter();
  void pause();

 private:
  int limit_;
  std::minstd_rand engine_;
};

}  // namespace fake
