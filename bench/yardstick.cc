#include "yardstick.h"

#include <dlfcn.h>

#include <cstdlib>

namespace gingham {
namespace {

// Numbers of cublasLt.h and library_types.h (the same in CUDA 12 and 13).
enum : int { kTransA = 3, kTransB = 4, kOpN = 0, kOpT = 1, kCompute32 = 68, kCompute64 = 70, kComputeTf32 = 77 };
enum : int { kReal32 = 0, kReal64 = 1, kHalf = 2, kBfloat = 14 };

using Opaque = void*;
struct Api {
  int (*Create)(Opaque*);
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

// A view as cuBLAS sees it, column by column: stored as it is, or transposed.
struct Side {
  Opaque layout = nullptr;
  int op;
  explicit Side(const Matrix& m) : op(m.row_stride == 1 ? kOpN : kOpT) {
    const Matrix stored = op == kOpN ? m : m.t();
    check(api().MatrixLayoutCreate(&layout, type_of(m.dtype), static_cast<uint64_t>(stored.rows), static_cast<uint64_t>(stored.cols),
                                   stored.col_stride),
          "cublasLtMatrixLayoutCreate");
  }
  ~Side() { api().MatrixLayoutDestroy(layout); }
};

}  // namespace

CublasLt::CublasLt() { check(api().Create(&handle_), "cublasLtCreate"); }

void CublasLt::gemm(const Matrix& a, const Matrix& b, const Matrix& c, const Stream& stream) {
  if (c.row_stride != 1) return gemm(b.t(), a.t(), c.t(), stream);
  const bool wide = a.dtype == DType::f64;
  const int compute = wide ? kCompute64 : a.dtype == DType::f32 && stream.math == Math::tf32 ? kComputeTf32 : kCompute32;
  Opaque description = nullptr;
  check(api().MatmulDescCreate(&description, compute, wide ? kReal64 : kReal32), "cublasLtMatmulDescCreate");
  const Side left(a), right(b), out(c);
  check(api().MatmulDescSetAttribute(description, kTransA, &left.op, sizeof(int)), "TRANSA");
  check(api().MatmulDescSetAttribute(description, kTransB, &right.op, sizeof(int)), "TRANSB");
  const double one64 = 1, zero64 = 0;
  const float one = 1, zero = 0;
  const void *alpha = wide ? static_cast<const void*>(&one64) : &one, *beta = wide ? static_cast<const void*>(&zero64) : &zero;
  const int status = api().Matmul(handle_, description, alpha, a.data, left.layout, b.data, right.layout, beta, c.data, out.layout, c.data,
                                  out.layout, nullptr, nullptr, 0, stream.native());
  api().MatmulDescDestroy(description);
  check(status, "cublasLtMatmul");
}

}  // namespace gingham
