// cuBLASLt beside gingham's own product on a GPU: found at run time (libcublasLt.so, CUDA 12 or 13), never needed. GINGHAM_CUBLASLT names it.
#pragma once
#include "base/stream.h"

namespace gingham {

// C = A B in the dtype of A and B (fp32 accumulation for 16-bit, C in that dtype too); tf32 where the stream allows it. Throws Error
// where there is no cuBLASLt.
class CublasLt {
 public:
  CublasLt();
  void gemm(const Matrix& a, const Matrix& b, const Matrix& c, const Stream& stream);

 private:
  void* handle_ = nullptr;
};

}  // namespace gingham
