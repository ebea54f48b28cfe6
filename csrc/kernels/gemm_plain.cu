// C = A B in fp32 or fp64 on the ordinary units: each of 256 threads keeps (2 G) x (2 G) sums, G = 16 bytes of elements, as four GxG squares
// half a tile apart, so that the lanes of a warp read neighbouring words. cp.async moves single elements, which turns either order of the
// operands into panels [k][row] and needs no alignment: 16 copies a thread against 1024 multiply-adds.
#include "kernels/gemm_store.cuh"

namespace gingham::cuda {
namespace {

constexpr int kThreads = 256, kDepth = 16, kSide = 16;  // kSide^2 threads share a tile

template <class T>
struct Plain {
  static constexpr int group = 16 / static_cast<int>(sizeof(T)), edge = kSide * 2 * group;
  // 16 bytes more than a whole round of the banks: lines of k lie 4 banks apart
  static constexpr int pitch = edge + group;
  static constexpr int panel = kDepth * pitch, stage = 2 * panel;
};

// Element (e, k) of an operand, e a row of A or a column of B, stands at from + e * line or k * line away from it. Along k a warp takes 8
// elements of 4 lines: whole sectors of memory, and every bank of shared memory once. One addition of a pointer and one copy an element:
// these instructions stand beside 64 multiply-adds each.
template <class T, bool along_k>
__device__ inline void load_panel(T* panel, const T* from, int line, int edge_left, int k_left) {
  constexpr int edge = Plain<T>::edge, bytes = static_cast<int>(sizeof(T));
  constexpr int down = along_k ? kThreads / 8 : kThreads / edge, across = edge / down;  // along k `across` rounds go down the edge, then 8 k on
  const int t = static_cast<int>(threadIdx.x), e = along_k ? t / 8 : t % edge, k = along_k ? t % 8 : t / edge;
  const T* source = from + (along_k ? static_cast<int64_t>(e) * line + k : static_cast<int64_t>(k) * line + e);
  const int64_t stride = static_cast<int64_t>(down) * line;
  T* to = panel + k * Plain<T>::pitch + e;
  const bool inside = edge_left >= edge && k_left >= kDepth;
#pragma unroll
  for (int i = 0; i < edge * kDepth / kThreads; i++) {
    const int e_on = along_k ? i % across * down : 0, k_on = along_k ? i / across * 8 : i * down;
    if (along_k && i > 0 && i % across == 0) source += 8 - across * stride;
    const bool exists = inside || (e + e_on < edge_left && k + k_on < k_left);
    cp_async<sizeof(T)>(to + k_on * Plain<T>::pitch + e_on, source, exists ? bytes : 0);  // of no bytes nothing is read
    source += stride;
  }
}

template <class T>
__device__ inline void load_panel(T* panel, const T* from, int line, bool along_k, int edge_left, int k_left) {
  if (along_k)
    load_panel<T, true>(panel, from, line, edge_left, k_left);
  else
    load_panel<T, false>(panel, from, line, edge_left, k_left);
}

// Two groups of G elements, half a tile apart.
template <class T>
__device__ inline void load_groups(T (&out)[2 * Plain<T>::group], const T* line, int side) {
  constexpr int group = Plain<T>::group;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const auto pack = bits_as<Pack<T, group>>(shared_load(reinterpret_cast<const uint4*>(line + h * Plain<T>::edge / 2 + side * group)));
#pragma unroll
    for (int g = 0; g < group; g++) out[h * group + g] = pack.at[g];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) plain_kernel(Operands p, Store<T> store) {
  constexpr int group = Plain<T>::group, edge = Plain<T>::edge;
  T* memory = reinterpret_cast<T*>(shared_memory());
  const int x = static_cast<int>(threadIdx.x) % kSide, y = static_cast<int>(threadIdx.x) / kSide;
  const TileAt tile = tile_at(blockIdx.x, p.m, p.n, edge, edge);
  const int64_t k_begin = blockIdx.z * p.piece, k_end = k_begin + p.piece < p.k ? k_begin + p.piece : p.k;
  const int steps = static_cast<int>((k_end - k_begin + kDepth - 1) / kDepth);
  const T* a = static_cast<const T*>(p.a) + (p.a_along_k ? tile.row * p.lda + k_begin : k_begin * p.lda + tile.row);
  const T* b = static_cast<const T*>(p.b) + (p.b_along_k ? tile.col * p.ldb + k_begin : k_begin * p.ldb + tile.col);
  const int rows = left_of(p.m - tile.row, edge), cols = left_of(p.n - tile.col, edge);
  const auto fetch = [&](int step) {
    if (step < steps) {
      T* stage = memory + step % 2 * Plain<T>::stage;
      const int left = left_of(k_end - k_begin - static_cast<int64_t>(step) * kDepth, kDepth);
      load_panel(stage, a, p.lda, p.a_along_k, rows, left);
      load_panel(stage + Plain<T>::panel, b, p.ldb, p.b_along_k, cols, left);
      a += p.a_along_k ? kDepth : static_cast<int64_t>(kDepth) * p.lda;
      b += p.b_along_k ? kDepth : static_cast<int64_t>(kDepth) * p.ldb;
    }
    cp_async_commit();
  };

  fetch(0);
  T sum[2 * group][2 * group] = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    block_barrier();
    fetch(step + 1);
    const T* stage = memory + step % 2 * Plain<T>::stage;
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      T fa[2 * group], fb[2 * group];
      load_groups(fa, stage + k * Plain<T>::pitch, y);
      load_groups(fb, stage + Plain<T>::panel + k * Plain<T>::pitch, x);
#pragma unroll
      for (int i = 0; i < 2 * group; i++)
#pragma unroll
        for (int j = 0; j < 2 * group; j++) sum[i][j] += fa[i] * fb[j];
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * group; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = tile.row + i / group * edge / 2 + y * group + i % group, col = tile.col + h * edge / 2 + x * group;
      Pack<T, group> pack;
      for (int g = 0; g < group; g++) pack.at[g] = sum[i][h * group + g];
      if (row < p.m) store.template put_row<group>(row, col, p.n, pack);
    }
}

template <class T>
void run_plain(const Operands& p, const Store<T>& store, const Stream& stream) {
  const int64_t tiles = ceil_div(p.m, Plain<T>::edge) * ceil_div(p.n, Plain<T>::edge);
  launch(stream, plain_kernel<T>, dim3(blocks(tiles), 1, blocks(ceil_div(p.k, p.piece))), kThreads, 2 * Plain<T>::stage * sizeof(T), p, store);
}

}  // namespace

void gemm_plain(const Operands& operands, const Store<float>& store, const Stream& stream) { run_plain(operands, store, stream); }
void gemm_plain(const Operands& operands, const Store<double>& store, const Stream& stream) { run_plain(operands, store, stream); }

}  // namespace gingham::cuda
