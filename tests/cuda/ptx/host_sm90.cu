// gemm_sm90 without the choices of gemm.cu: a row-major C, tiles of a given width, blocks of at most `most` tiles, pieces of K where `piece` is less
// than K.
#include "host.h"
#include "kernels/gemm_sm90.cuh"
#include "kernels/gemm_sm90_launch.cuh"

using namespace gingham;

namespace {

cuda::Operands operands_of(const Matrix& a, const Matrix& b, int64_t piece) {
  cuda::Operands p{};
  p.a = a.data;
  p.b = b.data;
  p.a_along_k = a.col_stride == 1;
  p.b_along_k = b.row_stride == 1;
  p.lda = p.a_along_k ? a.row_stride : a.col_stride;
  p.ldb = p.b_along_k ? b.col_stride : b.row_stride;
  p.m = a.rows;
  p.n = b.cols;
  p.k = a.cols;
  p.piece = piece;
  return p;
}

template <class T>
void run(const Matrix& a, const Matrix& b, const Matrix& c, const Tail& tail, bool add, int64_t piece, cuda::Tiling tiling, const Stream& stream) {
  cuda::Store<T> store;
  store.c = cuda::View<float>(c);
  store.add = add;
  store.piece_stride = c.rows * c.cols / ((a.cols + piece - 1) / piece);  // the pieces' matrices lie one below the other in c
  const Matrix bias = tail.bias.empty() ? Matrix{} : cuda::repeated(tail.bias, a.rows);
  store.tail = cuda::TailViews<T>(tail, bias);
  store.aligned = cuda::movable({&c, &bias, &tail.residual, &tail.slope_at, &tail.z, &tail.y}, 8);
  cuda::run_sm90(operands_of(a, b, piece), store, tiling, nullptr, stream);
}

}  // namespace

extern "C" {

int host_sm90_takes(const Matrix* a, const Matrix* b) { return cuda::sm90_takes(operands_of(*a, *b, a->cols)); }

int host_sm90(const Matrix* a, const Matrix* b, const Matrix* c, const Tail* tail, int add, int64_t piece, int wide, int wave, int most) {
  const cuda::Tiling tiling{wide, {wave, most}};
  return guarded(false, [&](const Stream& stream) {
    if (a->dtype == DType::bf16)
      run<cuda::Bf16>(*a, *b, *c, *tail, add, piece, tiling, stream);
    else
      run<cuda::F16>(*a, *b, *c, *tail, add, piece, tiling, stream);
  });
}

int host_sm90_blocks(int tiles, int wave, int most) { return cuda::blocks_of(tiles, {wave, most}); }
void host_sm90_chunk(int block, int tiles, int wave, int most, int* chunk) {
  const cuda::Chunk found = cuda::chunk_of(block, tiles, {wave, most});
  chunk[0] = found.first;
  chunk[1] = found.count;
  chunk[2] = found.step;
}

}  // extern "C"
