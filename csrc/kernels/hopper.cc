#include "kernels/hopper.h"

#include "kernels/gemm_sm90.cuh"

namespace gingham {

bool check_hopper([[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, sm90_checked(stream));
  return false;
}

std::string hopper_status() { return IF_CUDA(sm90_status(), "not built"); }

}  // namespace gingham
