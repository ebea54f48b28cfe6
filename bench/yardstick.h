// cuBLASLt beside gingham's own product on a GPU: found at run time (libcublasLt.so, CUDA 12 or 13), never needed. GINGHAM_CUBLASLT names it.
#pragma once
#include "base/stream.h"

namespace gingham {

// C = A B for operands like those given (fp32 sums for 16-bit ones; tf32 where the stream allows it), C in any type that cuBLASLt has for them:
// descriptors, 64 MB of workspace and the first choice of its heuristic are made once. Throws Error where there is no cuBLASLt.
class CublasLt {
 public:
  CublasLt(const Matrix& a, const Matrix& b, const Matrix& c, const Stream& stream);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  void gemm(const Matrix& a, const Matrix& b, const Matrix& c);

 private:
  void choose(const Matrix& a, const Matrix& b, const Matrix& c);

  const Stream& stream_;
  bool turned_, wide_;
  void *handle_ = nullptr, *description_ = nullptr, *left_ = nullptr, *right_ = nullptr, *out_ = nullptr;
  Scratch workspace_;
  uint64_t algorithm_[8] = {};
};

}  // namespace gingham
