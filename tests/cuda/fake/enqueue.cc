// Kernels of the shim run as work of the fake runtime's streams.
#include <functional>
#include <memory>

#include "base/check.h"
#include "cuda_runtime_api.h"

extern "C" cudaError_t fake_enqueue(cudaStream_t stream, void (*work)(void*), void* data);

void shim_enqueue(cudaStream_t stream, std::function<void()> work) {
  auto held = std::make_unique<std::function<void()>>(std::move(work));
  const cudaError_t status = fake_enqueue(
      stream,
      [](void* data) {
        const std::unique_ptr<std::function<void()>> held(static_cast<std::function<void()>*>(data));
        (*held)();
      },
      held.get());
  CHECK(gingham::DeviceError, status == cudaSuccess, "a kernel's launch: ", cudaGetErrorString(status));
  held.release();
}
