#include "kernels/gemm.h"

#include <algorithm>

#include "kernels/accumulate.h"
#include "kernels/blas.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

// A view as BLAS sees it, column-major: 'N' when columns are contiguous. A single row or column may claim either order, and its stride
// is of no use to anyone.
struct BlasOrder {
  char trans;
  int64_t ld;
};

BlasOrder order_of(const Matrix& m) {
  const bool column_major = m.row_stride == 1 && (m.col_stride >= m.rows || m.cols == 1);
  const int64_t lines = column_major ? m.cols : m.rows, ld = column_major ? m.col_stride : m.row_stride;
  const int64_t least = std::max(column_major ? m.rows : m.cols, int64_t{1});
  return {column_major ? 'N' : 'T', lines > 1 ? std::max(ld, least) : least};
}

// How much of dim 0 or 1 of the view one call may take: BLAS counts in 32 bits, also the distance of two rows or columns.
int64_t most_of(const Matrix& m, int dim) {
  const BlasOrder order = order_of(m);
  return dim == (order.trans == 'T' ? 0 : 1) && order.ld > blas_most ? 1 : blas_most;
}

template <class T, class Fn>
void call_once(Fn fn, const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate) {
  const BlasOrder oc = order_of(c);
  // C must be column-major for BLAS; a row-major C is computed as its transpose, B^T A^T.
  if (oc.trans == 'T') return call_once<T>(fn, b.t(), a.t(), c.t(), accumulate);
  const BlasOrder oa = order_of(a), ob = order_of(b);
  const int m = static_cast<int>(c.rows), n = static_cast<int>(c.cols), k = static_cast<int>(a.cols);
  const int lda = static_cast<int>(oa.ld), ldb = static_cast<int>(ob.ld), ldc = static_cast<int>(oc.ld);
  const T one = 1, beta = accumulate ? T(1) : T(0);
  fn(&oa.trans, &ob.trans, &m, &n, &k, &one, static_cast<const T*>(a.data), &lda, static_cast<const T*>(b.data), &ldb, &beta, static_cast<T*>(c.data),
     &ldc);
}

template <class T, class Fn>
void call(Fn fn, const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate) {
  const int64_t m = std::min(most_of(a, 0), most_of(c, 0)), n = std::min(most_of(b, 1), most_of(c, 1)), k = std::min(most_of(a, 1), most_of(b, 0));
  if (c.rows <= m && c.cols <= n && a.cols <= k) return call_once<T>(fn, a, b, c, accumulate);
  for (int64_t i = 0; i < c.rows; i += m)
    for (int64_t j = 0; j < c.cols; j += n)
      for (int64_t p = 0; p < a.cols; p += k) {
        const int64_t i_end = std::min(c.rows, i + m), j_end = std::min(c.cols, j + n), p_end = std::min(a.cols, p + k);
        call<T>(fn, a.slice(0, i, i_end).slice(1, p, p_end), b.slice(0, p, p_end).slice(1, j, j_end), c.slice(0, i, i_end).slice(1, j, j_end),
                accumulate || p > 0);
      }
}

// BLAS kernels for a tiny C add all of K in one chain, whose rounding grows as sqrt(K): 1.2e-6 at K = 4096. Pieces of K summed apart and
// added keep it at that of a large product, 3e-7; C is so small that it costs nothing.
constexpr int64_t kTinyCount = 1024, kLongChain = 512, kPiece = 256;

// Slices of K add to C call by call: there the chain would go on through C.
bool tiny(const Matrix& a, const Matrix& c, bool accumulate) {
  return (c.count() <= kTinyCount || c.rows == 1 || c.cols == 1) && (a.cols > kLongChain || accumulate);
}

void tiny_gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Stream& stream) {
  const Scratch room(stream, c.bytes());
  const Matrix part = c.col_stride == 1 ? dense(room.data(), c.rows, c.cols, c.dtype) : dense(room.data(), c.cols, c.rows, c.dtype).t();
  for (int64_t k = 0; k < a.cols; k += kPiece) {
    const int64_t end = std::min(a.cols, k + kPiece);
    const bool first = k == 0 && !accumulate;
    call<float>(blas().sgemm, a.slice(1, k, end), b.slice(0, k, end), first ? c : part, false);
    if (!first) gingham::accumulate(part, c, stream);
  }
}

void sgemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Stream& stream) {
  if (tiny(a, c, accumulate)) return tiny_gemm(a, b, c, accumulate, stream);
  call<float>(blas().sgemm, a, b, c, accumulate);
}

}  // namespace

void check_gemm(const Matrix& a, const Matrix& b, const Matrix& c, const Tail& tail) {
  CHECK(ShapeError, a.cols == b.rows && a.dtype == b.dtype, "gemm of [", a.rows, ",", a.cols, "] ", name_of(a.dtype), " and [", b.rows, ",", b.cols,
        "] ", name_of(b.dtype));
  const auto fits = [&](const Matrix& m, DType dtype, const char* name) {
    CHECK(ShapeError, !m.data || (m.rows == a.rows && m.cols == b.cols && m.dtype == dtype), "gemm of [", a.rows, ",", a.cols, "] ", name_of(a.dtype),
          " and [", b.rows, ",", b.cols, "] into ", name, " [", m.rows, ",", m.cols, "] ", name_of(m.dtype), ", expected ", name_of(dtype));
  };
  fits(c, accumulator(a.dtype), "C");
  fits(tail.z, a.dtype, "Z");
  fits(tail.y, a.dtype, "Y");
  fits(tail.residual, a.dtype, "the residual");
  fits(tail.slope_at, a.dtype, "the activation's argument");
  CHECK(ShapeError, tail.bias.empty() || (tail.bias.cols == b.cols && tail.bias.dtype == a.dtype), "bias of ", tail.bias.cols, " for ", b.cols,
        " columns");
  CHECK(ShapeError, c.data || !tail.empty() || a.rows == 0 || b.cols == 0, "gemm without an output");
}

void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Tail& tail, const Stream& stream) {
  DISPATCH_DEVICE(stream, gemm(a, b, c, accumulate, tail, stream));
  check_gemm(a, b, c, tail);
  if (c.data) {
    gemm(a, b, c, accumulate, stream);
    return epilogue(c, tail, stream);
  }
  const DType dtype = accumulator(a.dtype);
  const Scratch room(stream, static_cast<size_t>(a.rows * b.cols) * size_of(dtype));
  const Matrix sum = dense(room.data(), a.rows, b.cols, dtype);
  gemm(a, b, sum, false, stream);
  epilogue(sum, tail, stream);
}

void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Stream& stream) {
  DISPATCH_DEVICE(stream, gemm(a, b, c, accumulate, stream));
  check_gemm(a, b, c, {});
  if (c.empty()) return;
  if (a.cols == 0) {
    if (!accumulate) fill_zero(c, stream);
    return;
  }
  if (size_of(a.dtype) == 2) {
    Scratch wide_a(stream, static_cast<size_t>(a.count()) * 4), wide_b(stream, static_cast<size_t>(b.count()) * 4);
    // Widened in the operand's own order, so that the copy runs along contiguous memory.
    const bool ta = a.row_stride == 1, tb = b.row_stride == 1;
    const Matrix va = ta ? dense(wide_a.data(), a.cols, a.rows, DType::f32).t() : dense(wide_a.data(), a.rows, a.cols, DType::f32);
    const Matrix vb = tb ? dense(wide_b.data(), b.cols, b.rows, DType::f32).t() : dense(wide_b.data(), b.rows, b.cols, DType::f32);
    cast(a, va, stream);
    cast(b, vb, stream);
    return sgemm(va, vb, c, accumulate, stream);
  }
  if (a.dtype == DType::f32)
    sgemm(a, b, c, accumulate, stream);
  else
    call<double>(blas().dgemm, a, b, c, accumulate);
}

}  // namespace gingham
