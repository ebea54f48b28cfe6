// C = A B on the tensor cores of sm_80 and later: a block computes a tile of C from panels of A and B that cp.async brings into a ring of
// `stages` buffers in shared memory, each line of 128 bytes along K (64 elements of 16 bits, 32 of fp32), or BK lines where K is not the
// contiguous dim; ldmatrix turns either order into the fragments of mma.sync. 16-byte chunk c of line r stands at chunk c ^ twist(r), so
// that the 8 rows of an ldmatrix phase lie in different banks.
#pragma once
#include "kernels/gemm_store.cuh"
#include "kernels/panel.cuh"

namespace gingham::cuda {

template <int high, int wide, int warp_high, int warp_wide, int ring, int resident>
struct Tile {
  static constexpr int m = high, n = wide, warp_m = warp_high, warp_n = warp_wide, stages = ring, blocks = resident;
  static constexpr int warps_n = wide / warp_wide, threads = 32 * (high / warp_high) * warps_n;
  static constexpr int mt = warp_high / 16, nt = warp_wide / 8;  // mma tiles of a warp
};

// A warp's share of one stage.
template <class T, bool a_along_k, bool b_along_k, class Shape, class PA, class PB>
__device__ inline void multiply_stage(float (&sum)[Shape::mt][Shape::nt][4], const char* a, const char* b, int row, int col, int lane) {
#pragma unroll
  for (int kc = 0; kc < kLineBytes / 16; kc += 2) {
    uint32_t fa[Shape::mt][4], fb[Shape::nt / 2][4];
#pragma unroll
    for (int i = 0; i < Shape::mt; i++) {
      load_a<T, a_along_k, PA>(fa[i], a, row + i * 16, kc, lane);
      round_operands<T>(fa[i]);
    }
#pragma unroll
    for (int j = 0; j < Shape::nt / 2; j++) {
      load_b<T, b_along_k, PB>(fb[j], b, col + j * 16, kc, lane);
      round_operands<T>(fb[j]);
    }
#pragma unroll
    for (int i = 0; i < Shape::mt; i++)
#pragma unroll
      for (int j = 0; j < Shape::nt; j++) multiply<T>(sum[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
  }
}

// mma leaves two sums side by side in a lane; through a slab of shared memory per warp, 16 rows at a time, they become 16-byte words.
template <class T, class Shape>
__device__ inline void store_sums(const float (&sum)[Shape::mt][Shape::nt][4], const Store<T>& store, int64_t row, int64_t col, int64_t m, int64_t n,
                                  char* memory, int warp, int lane) {
  constexpr int width = 16 / static_cast<int>(sizeof(T)), groups = Shape::warp_n / width, pitch = Shape::warp_n + 8;
  float* slab = reinterpret_cast<float*>(memory) + warp * 16 * pitch;
#pragma unroll
  for (int i = 0; i < Shape::mt; i++) {
    warp_barrier();
#pragma unroll
    for (int j = 0; j < Shape::nt; j++) {
      float* at = slab + (lane >> 2) * pitch + j * 8 + (lane & 3) * 2;
      shared_store(reinterpret_cast<float2*>(at), make_float2(sum[i][j][0], sum[i][j][1]));
      shared_store(reinterpret_cast<float2*>(at + 8 * pitch), make_float2(sum[i][j][2], sum[i][j][3]));
    }
    warp_barrier();
#pragma unroll 1
    for (int index = lane; index < 16 * groups; index += 32) {
      const int r = index / groups, q = index % groups;
      const float4* from = reinterpret_cast<const float4*>(slab + r * pitch + q * width);
      Words<16 * (width / 4)> words;
      // Lanes 4..7 of 8 read their halves in the other order: 8 lanes, 8 groups of banks.
      if constexpr (width == 8) {
        const int half = (lane >> 2) & 1;
        const uint4 one = bits_as<uint4>(shared_load(from + half)), two = bits_as<uint4>(shared_load(from + 1 - half));
        words.at[0] = half ? two : one;
        words.at[1] = half ? one : two;
      } else {
        words.at[0] = bits_as<uint4>(shared_load(from));
      }
      const int64_t at_row = row + i * 16 + r, at_col = col + q * width;
      if (at_row < m) store.template put_row<width>(at_row, at_col, n, bits_as<Pack<float, width>>(words));
    }
  }
}

template <class T, bool a_along_k, bool b_along_k, class Shape, bool aligned>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) tile_kernel(Operands p, Store<T> store) {
  using PA = Panel<T, a_along_k, Shape::m, Shape::threads, aligned>;
  using PB = Panel<T, b_along_k, Shape::n, Shape::threads, aligned>;
  char* memory = shared_memory();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = warp / Shape::warps_n * Shape::warp_m, warp_col = warp % Shape::warps_n * Shape::warp_n;
  const TileAt tile = tile_at(blockIdx.x, p.m, p.n, Shape::m, Shape::n);
  const int64_t k_begin = blockIdx.z * p.piece, k_end = k_begin + p.piece < p.k ? k_begin + p.piece : p.k;
  const int steps = static_cast<int>((k_end - k_begin + PA::depth - 1) / PA::depth);
  const T* a = static_cast<const T*>(p.a) + (a_along_k ? tile.row * p.lda + k_begin : k_begin * p.lda + tile.row);
  const T* b = static_cast<const T*>(p.b) + (b_along_k ? tile.col * p.ldb + k_begin : k_begin * p.ldb + tile.col);
  const int rows = left_of(p.m - tile.row, Shape::m), cols = left_of(p.n - tile.col, Shape::n);
  const auto fetch = [&](int step) {
    if (step < steps) {
      char* stage = memory + step % Shape::stages * (PA::bytes + PB::bytes);
      const int left = left_of(k_end - k_begin - static_cast<int64_t>(step) * PA::depth, PA::depth);
      PA::load(stage, a, p.lda, a_along_k ? rows : left, a_along_k ? left : rows);
      PB::load(stage + PA::bytes, b, p.ldb, b_along_k ? cols : left, b_along_k ? left : cols);
      a += a_along_k ? PA::depth : static_cast<int64_t>(PA::depth) * p.lda;
      b += b_along_k ? PB::depth : static_cast<int64_t>(PB::depth) * p.ldb;
    }
    cp_async_commit();  // empty ones too: the wait below counts groups
  };

  for (int step = 0; step < Shape::stages - 1; step++) fetch(step);
  float sum[Shape::mt][Shape::nt][4] = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait<Shape::stages - 2>();
    block_barrier();  // this stage has come for all, and all are done with the one fetched into next
    fetch(step + Shape::stages - 1);
    const char* stage = memory + step % Shape::stages * (PA::bytes + PB::bytes);
    multiply_stage<T, a_along_k, b_along_k, Shape, PA, PB>(sum, stage, stage + PA::bytes, warp_row, warp_col, lane);
  }
  cp_async_wait<0>();
  block_barrier();
  store_sums<T, Shape>(sum, store, tile.row + warp_row, tile.col + warp_col, p.m, p.n, memory, warp, lane);
}

template <class T, bool a_along_k, bool b_along_k, class Shape, bool aligned>
void run_tile(const Operands& p, const Store<T>& store, const Stream& stream) {
  const int64_t tiles = ceil_div(p.m, Shape::m) * ceil_div(p.n, Shape::n);
  const size_t bytes = static_cast<size_t>(Shape::stages) * (Shape::m + Shape::n) * kLineBytes;
  launch(stream, tile_kernel<T, a_along_k, b_along_k, Shape, aligned>, dim3(blocks(tiles), 1, blocks(ceil_div(p.k, p.piece))), Shape::threads, bytes,
         p, store);
}

template <class T, class Large, class Small, bool a_along_k, bool b_along_k>
void run_size(const Operands& p, const Store<T>& store, TileSize size, const Stream& stream) {
  if (!p.aligned)
    run_tile<T, a_along_k, b_along_k, Small, false>(p, store, stream);
  else if (size == TileSize::large)
    run_tile<T, a_along_k, b_along_k, Large, true>(p, store, stream);
  else
    run_tile<T, a_along_k, b_along_k, Small, true>(p, store, stream);
}

template <class T, class Large, class Small>
void run_tiles(const Operands& p, const Store<T>& store, TileSize size, const Stream& stream) {
  if (p.a_along_k && p.b_along_k) return run_size<T, Large, Small, true, true>(p, store, size, stream);
  if (p.a_along_k) return run_size<T, Large, Small, true, false>(p, store, size, stream);
  if (p.b_along_k) return run_size<T, Large, Small, false, true>(p, store, size, stream);
  run_size<T, Large, Small, false, false>(p, store, size, stream);
}

// Large: 8 warps of 64x64, 144 KiB of 3 stages, one block a multiprocessor; small: 4 warps of 32x32, 48 KiB, four blocks.
using LargeTile16 = Tile<128, 256, 64, 64, 3, 1>;
using LargeTile32 = Tile<128, 128, 64, 32, 3, 1>;
using SmallTile = Tile<64, 64, 32, 32, 3, 4>;

}  // namespace gingham::cuda
