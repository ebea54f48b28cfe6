#include "yardstick.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>

namespace gingham {
namespace {

// Numbers of cublasLt.h and library_types.h (the same in CUDA 12 and 13).
enum : int { kTransA = 3, kTransB = 4, kOpN = 0, kOpT = 1, kCompute32 = 68, kCompute64 = 70, kComputeTf32 = 77 };
enum : int { kReal32 = 0, kReal64 = 1, kHalf = 2, kBfloat = 14 };

enum : int { kMostWorkspace = 1 };  // of a preference
constexpr size_t kWorkspace = size_t{64} << 20;

struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

using Opaque = void*;
struct Api {
  int (*Create)(Opaque*);
  int (*Destroy)(Opaque);
  int (*MatmulPreferenceCreate)(Opaque*);
  int (*MatmulPreferenceDestroy)(Opaque);
  int (*MatmulPreferenceSetAttribute)(Opaque, int, const void*, size_t);
  int (*MatmulAlgoGetHeuristic)(Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, int, Heuristic*, int*);
  int (*MatmulDescCreate)(Opaque*, int compute, int scale);
  int (*MatmulDescSetAttribute)(Opaque, int, const void*, size_t);
  int (*MatrixLayoutCreate)(Opaque*, int type, uint64_t rows, uint64_t cols, int64_t ld);
  int (*MatmulDescDestroy)(Opaque);
  int (*MatrixLayoutDestroy)(Opaque);
  int (*Matmul)(Opaque, Opaque, const void*, const void*, Opaque, const void*, Opaque, const void*, const void*, Opaque, void*, Opaque, const void*,
                void*, size_t, void*);
};

const Api& api() {
  static const Api found = [] {
    void* handle = nullptr;
    const char* wanted = getenv("GINGHAM_CUBLASLT");
    for (const char* name : {wanted ? wanted : "libcublasLt.so.13", "libcublasLt.so.13", "libcublasLt.so.12"})
      if (!handle) handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    CHECK(Error, handle, "no cuBLASLt: put libcublasLt.so.13 or .12 on LD_LIBRARY_PATH or name it in GINGHAM_CUBLASLT (", dlerror(), ")");
    Api out{};
    const auto take = [&](auto* fn, const char* name) {
      *reinterpret_cast<void**>(fn) = dlsym(handle, name);
      CHECK(Error, *fn, "cuBLASLt without ", name);
    };
    take(&out.Create, "cublasLtCreate");
    take(&out.Destroy, "cublasLtDestroy");
    take(&out.MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate");
    take(&out.MatmulPreferenceDestroy, "cublasLtMatmulPreferenceDestroy");
    take(&out.MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute");
    take(&out.MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic");
    take(&out.MatmulDescCreate, "cublasLtMatmulDescCreate");
    take(&out.MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute");
    take(&out.MatrixLayoutCreate, "cublasLtMatrixLayoutCreate");
    take(&out.MatmulDescDestroy, "cublasLtMatmulDescDestroy");
    take(&out.MatrixLayoutDestroy, "cublasLtMatrixLayoutDestroy");
    take(&out.Matmul, "cublasLtMatmul");
    return out;
  }();
  return found;
}

void check(int status, const char* what) { CHECK(Error, status == 0, what, " returned ", status); }

int type_of(DType dtype) { return dtype == DType::f64 ? kReal64 : dtype == DType::f16 ? kHalf : dtype == DType::bf16 ? kBfloat : kReal32; }

int operation_of(const Matrix& m) { return m.row_stride == 1 ? kOpN : kOpT; }

// A view as cuBLAS sees it, column by column: stored as it is, or transposed.
Opaque layout_of(const Matrix& m) {
  const Matrix stored = operation_of(m) == kOpN ? m : m.t();
  Opaque layout = nullptr;
  check(
      api().MatrixLayoutCreate(&layout, type_of(m.dtype), static_cast<uint64_t>(stored.rows), static_cast<uint64_t>(stored.cols), stored.col_stride),
      "cublasLtMatrixLayoutCreate");
  return layout;
}

}  // namespace

CublasLt::CublasLt(const Matrix& a, const Matrix& b, const Matrix& c, const Stream& stream)
    : stream_(stream), turned_(c.row_stride != 1), wide_(a.dtype == DType::f64), workspace_(stream, kWorkspace) {
  check(api().Create(&handle_), "cublasLtCreate");
  if (turned_)
    choose(b.t(), a.t(), c.t());
  else
    choose(a, b, c);
}

CublasLt::~CublasLt() {
  for (Opaque layout : {left_, right_, out_})
    if (layout) api().MatrixLayoutDestroy(layout);
  if (description_) api().MatmulDescDestroy(description_);
  api().Destroy(handle_);
}

void CublasLt::choose(const Matrix& a, const Matrix& b, const Matrix& c) {
  const int compute = wide_ ? kCompute64 : a.dtype == DType::f32 && stream_.math == Math::tf32 ? kComputeTf32 : kCompute32;
  check(api().MatmulDescCreate(&description_, compute, wide_ ? kReal64 : kReal32), "cublasLtMatmulDescCreate");
  const int left = operation_of(a), right = operation_of(b);
  check(api().MatmulDescSetAttribute(description_, kTransA, &left, sizeof(int)), "TRANSA");
  check(api().MatmulDescSetAttribute(description_, kTransB, &right, sizeof(int)), "TRANSB");
  left_ = layout_of(a);
  right_ = layout_of(b);
  out_ = layout_of(c);
  Opaque preference = nullptr;
  check(api().MatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  const uint64_t workspace = kWorkspace;
  int status = api().MatmulPreferenceSetAttribute(preference, kMostWorkspace, &workspace, sizeof(workspace)), found = 0;
  Heuristic best{};
  if (status == 0) status = api().MatmulAlgoGetHeuristic(handle_, description_, left_, right_, out_, out_, preference, 1, &best, &found);
  api().MatmulPreferenceDestroy(preference);
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  CHECK(Error, found == 1 && best.state == 0, "cuBLASLt has no algorithm for this product (found ", found, ", state ", best.state, ")");
  std::copy_n(best.algorithm, 8, algorithm_);
}

void CublasLt::gemm(const Matrix& a, const Matrix& b, const Matrix& c) {
  const double one64 = 1, zero64 = 0;
  const float one = 1, zero = 0;
  const void *alpha = wide_ ? static_cast<const void*>(&one64) : &one, *beta = wide_ ? static_cast<const void*>(&zero64) : &zero;
  const void *left = turned_ ? b.data : a.data, *right = turned_ ? a.data : b.data;
  check(api().Matmul(handle_, description_, alpha, left, left_, right, right_, beta, c.data, out_, c.data, out_, algorithm_, workspace_.data(),
                     kWorkspace, stream_.native()),
        "cublasLtMatmul");
}

}  // namespace gingham
