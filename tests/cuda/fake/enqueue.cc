// Kernels of the shim run as work of the fake runtime's streams.
#include <functional>

#include "cuda_runtime_api.h"

extern "C" void fake_enqueue(cudaStream_t stream, void (*work)(void*), void* data);

void shim_enqueue(cudaStream_t stream, std::function<void()> work) {
  fake_enqueue(
      stream,
      [](void* data) {
        auto* held = static_cast<std::function<void()>*>(data);
        (*held)();
        delete held;
      },
      new std::function<void()>(std::move(work)));
}
