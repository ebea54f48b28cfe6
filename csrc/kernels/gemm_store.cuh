// How gemm's kernels take their operands and put their sums away: C (+)= A B, and the tail of epilogue.h fused behind it.
#pragma once
#include "kernels/tail.cuh"

namespace gingham::cuda {

// A's lines are its rows where K is contiguous, else its columns; B's likewise. Block z sums k in [z piece, (z + 1) piece).
struct Operands {
  const void *a, *b;
  int lda, ldb;                        // elements from line to line
  bool a_along_k, b_along_k, aligned;  // aligned: 16-byte copies may be used
  int64_t m, n, k, piece;
};

// T: the layer's dtype; sums are in Wide<T>. With pieces of K summed apart, c is their store, one matrix [m, n] behind the other.
template <class T>
struct Store {
  using Sum = Wide<T>;
  View<Sum> c;                    // no data: left out
  bool add = false, keep = true;  // keep: store the sum in c; else c is read only, or left out
  bool aligned = false;           // every view allows 16-byte words
  int64_t piece_stride = 0;
  TailViews<T> tail;

  template <int W>
  __device__ void put(int64_t i, int64_t j, Pack<Sum, W> sum) const {
    if (c.data) {
      View<Sum> out = c;
      out.data += blockIdx.z * piece_stride;
      if (add) {
        const Pack<Sum, W> old = out.template load<W>(i, j);
        for (int k = 0; k < W; k++) sum.at[k] += old.at[k];
      }
      if (keep) out.template store<W>(i, j, sum);
    }
    tail.template write<W>(i, j, sum);
  }

  // W sums of row i from column j on, of which those before column n exist.
  template <int W>
  __device__ void put_row(int64_t i, int64_t j, int64_t n, const Pack<Sum, W>& sum) const {
    if (aligned && j + W <= n) {
      put<W>(i, j, sum);
    } else {
      for (int k = 0; k < W; k++)
        if (j + k < n) put<1>(i, j + k, Pack<Sum, 1>{{sum.at[k]}});
    }
  }
};

// Where a tile of C begins. Tiles go down 8 tiles of rows before they step to the next tile of columns, so that those that are computed at one time
// share their panels in L2.
struct TileAt {
  int64_t row, col;
};

__device__ inline TileAt tile_at(uint32_t tile, int64_t m, int64_t n, int high, int wide) {
  const uint32_t down = static_cast<uint32_t>((m + high - 1) / high), across = static_cast<uint32_t>((n + wide - 1) / wide), group = 8 * across;
  const uint32_t first = tile / group * 8, in = tile % group, height = down - first < 8 ? down - first : 8;
  return {static_cast<int64_t>(first + in % height) * high, static_cast<int64_t>(in / height) * wide};
}

// What is left of an operand from here on, as far as a tile of `most` goes.
__device__ inline int left_of(int64_t count, int most) { return count < most ? static_cast<int>(count) : most; }

enum class TileSize { small, large };

// One file each: gemm_bf16.cu, gemm_f16.cu, gemm_tf32.cu, gemm_plain.cu.
void gemm_bf16(const Operands& operands, const Store<Bf16>& store, TileSize size, const Stream& stream);
void gemm_f16(const Operands& operands, const Store<F16>& store, TileSize size, const Stream& stream);
void gemm_tf32(const Operands& operands, const Store<float>& store, TileSize size, const Stream& stream);
void gemm_plain(const Operands& operands, const Store<float>& store, const Stream& stream);
void gemm_plain(const Operands& operands, const Store<double>& store, const Stream& stream);

}  // namespace gingham::cuda
