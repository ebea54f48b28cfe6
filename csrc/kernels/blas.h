// The BLAS under gemm: the one torch carries, found at run time in the running process; else GINGHAM_BLAS (a path, or "plain" for three
// loops, which the sanitizer builds use). load_blas finds it once; a process without any gets a typed error at its first gemm.
#pragma once
#include <cstdint>
#include <string>

namespace gingham {

using SgemmFn = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
                         const int*, const float*, float*, const int*);
using DgemmFn = void (*)(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*, const double*,
                         const int*, const double*, double*, const int*);

struct Blas {
  SgemmFn sgemm = nullptr;
  DgemmFn dgemm = nullptr;
  std::string from;
};

const Blas& blas();
// The largest size and stride that it counts in: gemm makes larger products of pieces. Tests lower it.
extern int64_t blas_most;
void set_blas_threads(int threads);  // of the calling thread where the library can, else of the process

}  // namespace gingham
