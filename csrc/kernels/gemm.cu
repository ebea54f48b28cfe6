// Chooses the kernel: Hopper's own for 16-bit types where it is on; tensor cores as of sm_80 for them and, where the stream allows tf32, for fp32;
// the plain kernel else. Few tiles and a long K: pieces of K are summed apart, each into its own matrix of workspace, and added in order, so that
// every run gives the same bits.
#include <algorithm>

#include "kernels/cast.h"
#include "kernels/gemm.h"
#include "kernels/gemm_sm90.cuh"
#include "kernels/gemm_store.cuh"

namespace gingham::cuda {
namespace {

struct Job {
  Matrix a, b, c, bias;
  Tail tail;
};

// C's rows (or, without C, those of what the tail writes) are made contiguous: C^T = B^T A^T.
void turn(Job& job) {
  const Matrix& out = job.c.data ? job.c : (job.tail.z.data ? job.tail.z : job.tail.y);
  if (!column_major(out)) return;
  std::swap(job.a, job.b);
  for (Matrix* m : {&job.a, &job.b, &job.c, &job.bias, &job.tail.residual, &job.tail.slope_at, &job.tail.z, &job.tail.y})
    if (m->data) *m = m->t();
}

Operands operands_of(const Matrix& a, const Matrix& b) {
  Operands p{};
  p.a = a.data;
  p.b = b.data;
  p.a_along_k = a.col_stride == 1;
  p.b_along_k = b.row_stride == 1 && b.col_stride != 1;
  const int64_t lda = p.a_along_k ? a.row_stride : a.col_stride, ldb = p.b_along_k ? b.col_stride : b.row_stride;
  CHECK(ShapeError, lda <= INT32_MAX && ldb <= INT32_MAX, "gemm of lines ", std::max(lda, ldb), " elements apart, at most ", INT32_MAX);
  p.lda = static_cast<int>(lda);
  p.ldb = static_cast<int>(ldb);
  const int width = 16 / static_cast<int>(size_of(a.dtype));
  const Matrix a_lines = p.a_along_k ? a : a.t(), b_lines = p.b_along_k ? b.t() : b;
  p.aligned = movable({&a_lines, &b_lines}, width);
  p.m = a.rows;
  p.n = b.cols;
  p.k = p.piece = a.cols;
  return p;
}

template <class T>
Store<T> store_of(const Job& job, bool add) {
  Store<T> store;
  store.c = View<Wide<T>>(job.c);
  store.add = add;
  store.keep = job.tail.keeps_sum;
  store.tail = TailViews<T>(job.tail, job.bias);
  store.aligned = movable({&job.c, &job.bias, &job.tail.residual, &job.tail.slope_at, &job.tail.z, &job.tail.y}, 16 / static_cast<int>(sizeof(T)));
  return store;
}

void run(const Operands& p, const Store<Bf16>& store, TileSize size, const Stream& stream) { gemm_bf16(p, store, size, stream); }
void run(const Operands& p, const Store<F16>& store, TileSize size, const Stream& stream) { gemm_f16(p, store, size, stream); }
void run(const Operands& p, const Store<double>& store, TileSize, const Stream& stream) { gemm_plain(p, store, stream); }
void run(const Operands& p, const Store<float>& store, TileSize size, const Stream& stream) {
  if (stream.math == Math::tf32)
    gemm_tf32(p, store, size, stream);
  else
    gemm_plain(p, store, stream);
}

// Adds the pieces in order, then does what the kernel would have done.
template <class T>
struct AddPieces {
  const Wide<T>* pieces;
  int64_t count, stride, cols;
  Store<T> store;

  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    Pack<Wide<T>, W> sum = load_pack<W>(pieces + i * cols + j);
    for (int64_t p = 1; p < count; p++) {
      const Pack<Wide<T>, W> piece = load_pack<W>(pieces + p * stride + i * cols + j);
      for (int k = 0; k < W; k++) sum.at[k] += piece.at[k];
    }
    store.template put<W>(i, j, sum);
  }
};

// run(operands, store) computes them. Their matrices begin `multiple` rows apart, or a multiple of that.
template <class T, class Run>
void run_pieces(Operands p, int64_t pieces, int64_t multiple, const Job& job, bool add, const Stream& stream, const Run& run) {
  p.piece = ceil_div(ceil_div(p.k, pieces), 64) * 64;
  pieces = ceil_div(p.k, p.piece);
  const int64_t cols = ceil_div(p.n, 4) * 4, stride = ceil_div(p.m, multiple) * multiple * cols;
  const Scratch room(stream, static_cast<size_t>(pieces * stride) * sizeof(Wide<T>));
  Job part{job.a, job.b, dense(room.data(), p.m, p.n, accumulator(job.a.dtype)), {}, {}};
  part.c.row_stride = cols;
  Store<T> store = store_of<T>(part, false);
  store.piece_stride = stride;
  run(p, store);
  const AddPieces<T> op{reinterpret_cast<const Wide<T>*>(room.data()), pieces, stride, cols, store_of<T>(job, add)};
  sweep<16 / static_cast<int>(sizeof(T))>(op, p.m, p.n,
                                          {&part.c, &job.c, &job.bias, &job.tail.residual, &job.tail.slope_at, &job.tail.z, &job.tail.y}, stream);
}

constexpr int64_t kLeastPiece = 512, kMostPieces = 16;

// Large tiles where they occupy at least half of the multiprocessors. With fewer small tiles than multiprocessors, pieces of K.
template <class T>
void choose(const Job& job, bool add, const Stream& stream) {
  Operands p = operands_of(job.a, job.b);
  if constexpr (sizeof(T) == 2)
    if (const int64_t pieces = sm90_pieces(p, stream)) {
      const auto product = [&](const Operands& operands, const Store<T>& store) { gemm_sm90(operands, store, stream); };
      if (pieces == 1) return product(p, store_of<T>(job, add));
      return run_pieces<T>(p, pieces, kSm90Rows, job, add, stream, product);
    }
  const bool tensor = sizeof(T) == 2 || stream.math == Math::tf32;
  const TileSize size = ceil_div(p.m, 128) * ceil_div(p.n, sizeof(T) == 2 ? 256 : 128) >= kMultiprocessors / 2 ? TileSize::large : TileSize::small;
  const int64_t edge = tensor || sizeof(T) == 8 ? 64 : 128, tiles = ceil_div(p.m, edge) * ceil_div(p.n, edge);
  int64_t pieces = 1;
  if (2 * tiles <= kMultiprocessors) pieces = std::min({int64_t{kMultiprocessors} / tiles, p.k / kLeastPiece, kMostPieces});
  const auto product = [&](const Operands& operands, const Store<T>& store) { run(operands, store, size, stream); };
  if (pieces <= 1) return product(p, store_of<T>(job, add));
  run_pieces<T>(p, pieces, 1, job, add, stream, product);
}

}  // namespace

void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Tail& tail, const Stream& stream) {
  check_gemm(a, b, c, tail);
  CHECK(ShapeError, std::max({a.rows, a.cols, b.cols}) <= INT32_MAX, "gemm of [", a.rows, ",", a.cols, "] and [", b.rows, ",", b.cols, "]: at most ",
        INT32_MAX, " a dim on a GPU; cut it into pieces");
  if (a.rows == 0 || b.cols == 0) return;
  if (a.cols == 0) {
    if (!accumulate && c.data) gingham::fill_zero(c, stream);
    if (tail.empty()) return;
    // Nothing to add: a product over one k, both sides zero.
    const Scratch room(stream, static_cast<size_t>(a.rows + b.cols) * size_of(a.dtype));
    const Matrix zero_a = dense(room.data(), a.rows, 1, a.dtype);
    const Matrix zero_b = dense(room.data() + static_cast<size_t>(a.rows) * size_of(a.dtype), 1, b.cols, a.dtype);
    gingham::fill_zero(dense(room.data(), 1, a.rows + b.cols, a.dtype), stream);
    return cuda::gemm(zero_a, zero_b, c, accumulate, tail, stream);
  }
  with_real(a.dtype, "gemm", [&](auto tag) {
    Job job{a, b, c, tail.bias.empty() ? Matrix{} : repeated(tail.bias, a.rows), tail};
    turn(job);
    choose<typename decltype(tag)::type>(job, accumulate, stream);
  });
}

void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Stream& stream) {
  cuda::gemm(a, b, c, accumulate, Tail{}, stream);
}

}  // namespace gingham::cuda
