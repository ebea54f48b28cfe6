#include "kernels/blas.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <initializer_list>

#include "base/check.h"

namespace gingham {
namespace {

template <class T>
void plain_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k, const T*, const T* a, const int* lda, const T* b,
                const int* ldb, const T* beta, T* c, const int* ldc) {
  for (int j = 0; j < *n; j++)
    for (int i = 0; i < *m; i++) {
      T sum = 0;
      for (int p = 0; p < *k; p++) {
        const int64_t ia = *ta == 'N' ? i + static_cast<int64_t>(p) * *lda : p + static_cast<int64_t>(i) * *lda;
        const int64_t ib = *tb == 'N' ? p + static_cast<int64_t>(j) * *ldb : j + static_cast<int64_t>(p) * *ldb;
        sum += a[ia] * b[ib];
      }
      T& out = c[i + static_cast<int64_t>(j) * *ldc];
      out = *beta == 0 ? sum : *beta * out + sum;
    }
}

void* library() {
  const char* named = getenv("GINGHAM_BLAS");
  if (named && *named) {
    void* handle = dlopen(named, RTLD_NOW | RTLD_GLOBAL);
    CHECK(Error, handle, "GINGHAM_BLAS=", named, " cannot be loaded: ", dlerror());
    return handle;
  }
  for (const char* name : {"libtorch_cpu.so", "libmkl_rt.so.2", "libopenblas.so.0", "libblas.so.3"})
    if (void* handle = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return handle;
  for (const char* name : {"libopenblas.so.0", "libblas.so.3"})
    if (void* handle = dlopen(name, RTLD_NOW)) return handle;
  throw Error("no BLAS found: import torch first, or name one in GINGHAM_BLAS (a path such as .../torch/lib/libtorch_cpu.so, or \"plain\")");
}

Blas find() {
  Blas out;
  const char* named = getenv("GINGHAM_BLAS");
  if (named && std::string(named) == "plain") {
    out.sgemm = plain_gemm<float>;
    out.dgemm = plain_gemm<double>;
    out.from = "plain loops";
    return out;
  }
  void* handle = library();
  out.sgemm = reinterpret_cast<SgemmFn>(dlsym(handle, "sgemm_"));
  out.dgemm = reinterpret_cast<DgemmFn>(dlsym(handle, "dgemm_"));
  CHECK(Error, out.sgemm && out.dgemm, "the BLAS found has no sgemm_ and dgemm_; name another in GINGHAM_BLAS");
  Dl_info info;
  out.from = dladdr(reinterpret_cast<void*>(out.sgemm), &info) && info.dli_fname ? info.dli_fname : "?";
  return out;
}

}  // namespace

int64_t blas_most = INT32_MAX;

const Blas& blas() {
  static const Blas found = find();
  return found;
}

void set_blas_threads(int threads) {
  Dl_info info;
  if (blas().from == "plain loops" || !dladdr(reinterpret_cast<void*>(blas().sgemm), &info)) return;
  void* handle = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  if (!handle) return;
  if (auto local = reinterpret_cast<int (*)(int)>(dlsym(handle, "MKL_Set_Num_Threads_Local"))) {
    local(threads);
  } else if (auto global = reinterpret_cast<void (*)(int)>(dlsym(handle, "openblas_set_num_threads"))) {
    global(threads);
  }
}

}  // namespace gingham
