// The shim's own tests: kernels with one fault each, which must be found, and named rightly.
#include <vector>

#include "kernel_tests.h"
#include "kernels/launch.cuh"
#include "shim.h"

namespace gingham::tests {
namespace {

using namespace gingham::cuda;

__global__ void no_barrier(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared_store(shared + threadIdx.x, static_cast<int>(threadIdx.x));
  out[threadIdx.x] = shared_load(shared + (threadIdx.x + 32) % 64);
}

__global__ void no_warp_barrier(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared_store(shared + threadIdx.x, static_cast<int>(threadIdx.x));
  out[threadIdx.x] = shared_load(shared + (threadIdx.x ^ 1));
}

__global__ void right(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared_store(shared + threadIdx.x, static_cast<int>(threadIdx.x));
  warp_barrier();
  const int near = shared_load(shared + (threadIdx.x ^ 1));
  block_barrier();
  out[threadIdx.x] = near + shared_load(shared + (threadIdx.x + 32) % 64) + shuffle_xor(1, 1);
}

__global__ void overwritten_too_soon(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared_store(shared + threadIdx.x, 1);
  block_barrier();
  out[threadIdx.x] = shared_load(shared + (threadIdx.x + 32) % 64);
  shared_store(shared + threadIdx.x, 2);
}

__global__ void split_barrier(int*) {
  if (threadIdx.x < 40) block_barrier();
}

__global__ void split_warp(int* out) {
  if (threadIdx.x % 32 < 16)
    out[threadIdx.x] = shuffle_xor(1, 1);
  else
    warp_barrier();
}

__global__ void outside(int* out) { out[threadIdx.x] = shared_load(reinterpret_cast<int*>(shared_memory()) + threadIdx.x + 1); }

__global__ void misaligned(int* out) { out[threadIdx.x] = shared_load(reinterpret_cast<int*>(shared_memory() + 2)); }

__global__ void copied(int* out, const int* in, bool wait) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  cp_async<4>(shared + threadIdx.x, in + threadIdx.x, 4);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  out[threadIdx.x] = shared_load(shared + threadIdx.x);
}

__global__ void conflicting(int* out) {
  out[threadIdx.x] = shared_load(reinterpret_cast<int*>(shared_memory()) + threadIdx.x % 32 * 4 + threadIdx.x / 32);
}

template <class Kernel, class... Args>
std::string fault_of(Kernel kernel, size_t bytes, Args... args) {
  try {
    launch(DeviceStream(), kernel, dim3(1), 64, bytes, args...);
  } catch (const shim::Error& error) {
    return error.what();
  }
  return "";
}

void faults() {
  std::vector<int> out(64, 0), in(64, 7);
  const auto found = [&](auto kernel, const char* part, size_t bytes = 256) {
    const std::string what = fault_of(kernel, bytes, out.data());
    expect(what.find(part) != std::string::npos, std::string("the shim said \"") + what + "\", expected " + part);
  };
  found(no_barrier, "race with another thread's");
  found(no_warp_barrier, "race with another thread's");
  found(overwritten_too_soon, "race with another thread's");
  found(split_barrier, "threads wait for others that never come");
  found(split_warp, "lanes of one warp meet at");
  found(outside, "outside of what the launch asked for");
  found(misaligned, "misaligned");
  expect(fault_of(right, 256, out.data()).empty() && out[0] == 1 + 32 + 1, "the shim refused a right kernel");
  for (const bool early : {false, true})
    for (const bool wait : {false, true}) {
      shim::set({1, early});
      fault_of(copied, 256, out.data(), in.data(), wait);
      expect((out[5] == 7) == (wait || early), "cp.async landed at the wrong time");
    }
  shim::reset_conflicts();
  fault_of(conflicting, 1024, out.data());
  expect(shim::conflicts(shim::Access::load).worst == 4, "a stride of 4 words is a 4-way conflict");
  shim::reset_conflicts();
}

__global__ void racing(int* out) {
  out[threadIdx.x] = 1;
  out[(threadIdx.x + 1) % 64] += 1;
}

// For ThreadSanitizer alone: a race in global memory, which the shim does not watch.
void race() {
  std::vector<int> out(64, 0);
  launch(DeviceStream(), racing, dim3(1), 64, 0, out.data());
}

const Register all[] = {{"shim", faults}, {"provoked race", race}};

}  // namespace
}  // namespace gingham::tests
