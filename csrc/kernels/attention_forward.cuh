// softmax(scale q k^T + mask) v, one block a tile of a head's queries: keys and values come tile by tile through a ring of shared memory, each
// read once a tile of queries; out, the largest score and the sum go on from where the last call left them.
#pragma once
#include "kernels/attention_tile.cuh"

namespace gingham::cuda {

template <class T, int width>
struct ForwardShape {
  static constexpr int bytes = width * static_cast<int>(sizeof(T));
  static constexpr int other = sizeof(T) == 8 ? 16 : (sizeof(T) == 2 && width <= 128 ? 64 : 32);
  using Shape = AttentionShape<T, width, bytes >= 1024 ? 2 : 4, other, bytes >= 1024 ? 1 : 2>;
  using Own = Rows<T, width, Shape::own>;
  using Other = Rows<T, width, Shape::other>;
  using Out = ResultTile<Shape, width>;
  static constexpr int tiles = Own::bytes + Shape::stages * 2 * Other::bytes, slabs = Shape::warps * Shape::slab_bytes;
  // The slabs are the last; on the tensor cores only a mask needs them.
  static constexpr size_t shared(bool masked) { return tiles + (masked || !Shape::tensor ? slabs : 0); }
  static constexpr int factors = Out::bytes;  // where those of the rows so far stand when the tiles are done with
  static_assert(factors + Shape::own * static_cast<int>(sizeof(Wide<T>)) <= tiles);
};

// The largest of a row so far, and its sum (a lane's part of it).
template <class S>
struct RunningSoftmax {
  using Sum = typename S::Sum;
  Sum top[2] = {-static_cast<Sum>(INFINITY), -static_cast<Sum>(INFINITY)}, sum[2] = {0, 0};

  // s becomes e^(s - top); o is scaled to the new top.
  template <int columns>
  __device__ void step(Sum (&s)[S::tiles][4], Results<S, columns>& o) {
    const Sum nothing = -static_cast<Sum>(INFINITY);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      Sum most = nothing;
#pragma unroll
      for (int i = 0; i < 2 * S::tiles; i++) {
        const Sum x = s[i / 2][2 * r + i % 2];
        most = x > most ? x : most;
      }
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const Sum x = shuffle_xor(most, lanes);
        most = x > most ? x : most;
      }
      const Sum higher = top[r] < most ? most : top[r];
      // Nothing seen so far: no sum goes on from here (a NaN is no maximum, and is met by the sum).
      const Sum from = higher == nothing ? Sum(0) : higher;
      const Sum before = top[r] == nothing ? Sum(0) : exp_of(top[r] - from);
      top[r] = higher;
      sum[r] *= before;
#pragma unroll
      for (int i = 0; i < 2 * S::tiles; i++) {
        Sum& x = s[i / 2][2 * r + i % 2];
        x = exp_of(x - from);
        sum[r] += x;
      }
#pragma unroll
      for (int i = 0; i < columns / 4; i++) o[i / 2][2 * r + i % 2] *= before;
    }
  }

  // Puts a row's sums together with those of the calls before, and scales its o: the factor of what was there.
  template <int columns, class Views>
  __device__ Sum join(int r, const Views& views, int64_t line, int64_t at, bool exists, Results<S, columns>& o, int lane) const {
    const Sum nothing = -static_cast<Sum>(INFINITY);
    const bool writes = exists && (lane & 3) == 0;
    Sum all = sum[r], before = writes ? *views.top.to(line, at) : nothing;
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      all += shuffle_xor(all, lanes);
      const Sum x = shuffle_xor(before, lanes);
      before = x > before ? x : before;
    }
    const Sum higher = before < top[r] ? top[r] : before, from = higher == nothing ? Sum(0) : higher;
    const Sum factor = before == nothing ? Sum(0) : exp_of(before - from), own = exp_of(top[r] - from);
#pragma unroll
    for (int i = 0; i < columns / 4; i++) o[i / 2][2 * r + i % 2] *= own;
    if (writes) {
      *views.top.to(line, at) = higher;
      Sum* sums = views.sum.to(line, at);
      *sums = *sums * factor + all * own;
    }
    return factor;
  }
};

template <class T, int width>
__global__ void __launch_bounds__(ForwardShape<T, width>::Shape::threads, 1)
    attention_forward_kernel(AttentionPart p, ForwardViews<T> views, int tiles) {
  using F = ForwardShape<T, width>;
  using S = typename F::Shape;
  using Own = typename F::Own;
  using Other = typename F::Other;
  using Sum = Wide<T>;
  char *own = shared_memory(), *ring = own + Own::bytes;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, length = static_cast<int>(p.a.width);
  Sum* slab = reinterpret_cast<Sum*>(own + F::tiles + warp * S::slab_bytes);
  // under a causal mask the last tiles have the most to do
  const int line = static_cast<int>(blockIdx.x) / tiles, first = (tiles - 1 - static_cast<int>(blockIdx.x) % tiles) * S::own;
  const int heads = static_cast<int>(p.a.heads), b = line / heads, h = line % heads;
  const int narrow = line / static_cast<int>(p.a.heads / p.a.kv_heads);
  const View<T> q = views.q.from(p.queries.row + first, line * p.a.width);
  const View<T> k = views.k.from(p.keys.row, narrow * p.a.width), v = views.v.from(p.keys.row, narrow * p.a.width);
  const int64_t ends = p.queries.position + first + S::own - p.keys.position;
  const int64_t all = p.a.causal && ends < p.keys.count ? ends : p.keys.count;
  const int steps = all > 0 ? static_cast<int>((all + S::other - 1) / S::other) : 0;
  if (steps == 0) return;
  const auto fetch = [&](int step) {
    if (step < steps) {
      char* stage = ring + step % S::stages * 2 * Other::bytes;
      const int at = step * S::other;
      Other::template load<S::threads>(stage, k.from(at, 0), p.keys.count - at, length, views.aligned);
      Other::template load<S::threads>(stage + Other::bytes, v.from(at, 0), p.keys.count - at, length, views.aligned);
    }
    cp_async_commit();
  };

  Own::template load<S::threads>(own, q, p.queries.count - first, length, views.aligned);
  fetch(0);
  const int row = first + warp * 16 + (lane >> 2);
  Results<S, width> o = {};
  RunningSoftmax<S> softmax;
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    block_barrier();  // this stage has come for all, and with two of them all are done with the other
    if constexpr (S::stages == 2) fetch(step + 1);
    const char* stage = ring + step % S::stages * 2 * Other::bytes;
    Sum s[S::tiles][4];
    multiply_scores<S, Own, Other>(s, own, stage, warp * 16, lane);
    const ScoreTile<S, false> tile{p, b, h, row, step * S::other, lane};
    tile.mask(s, slab);
    softmax.template step<width>(s, o);
    if (p.a.dropout.p > 0) {
      const uint32_t kept = tile.kept();
#pragma unroll
      for (int at = 0; at < 4 * S::tiles; at++) s[at / 4][at % 4] = kept >> at & 1 ? s[at / 4][at % 4] * static_cast<Sum>(p.draw.keep) : Sum(0);
    }
    add_product<S, Other, width>(o, s, stage + Other::bytes, 0, slab, lane);
    if constexpr (S::stages == 1) {
      block_barrier();  // all are done with the only stage
      fetch(step + 1);
    }
  }

  // What came before goes on: both are scaled to the larger top.
  Sum old[2];
#pragma unroll
  for (int r = 0; r < 2; r++)
    old[r] = softmax.template join<width>(r, views, line, p.queries.row + row + 8 * r, row + 8 * r < p.queries.count, o, lane);
  Sum *tile = reinterpret_cast<Sum*>(own), *factors = reinterpret_cast<Sum*>(own + F::factors);
  F::Out::put(tile, o, warp * 16 + (lane >> 2), lane, [&] {
    if ((lane & 3) == 0)
      for (int r = 0; r < 2; r++) shared_store(factors + warp * 16 + (lane >> 2) + 8 * r, old[r]);
  });
  F::Out::add_to(views.out.from(p.queries.row + first, line * p.a.width), tile, p.queries.count - first, 0, length, views.wide,
                 [&](int at) { return shared_load(factors + at); });
}

template <class T, int width>
void run_forward(const AttentionPart& p, ForwardViews<T> views, const Stream& stream) {
  using F = ForwardShape<T, width>;
  const int tiles = static_cast<int>(ceil_div(p.queries.count, F::Shape::own));
  launch(stream, attention_forward_kernel<T, width>, dim3(blocks(tiles * p.a.batch * p.a.heads)), F::Shape::threads, F::shared(p.a.mask != nullptr),
         p, views, tiles);
}

}  // namespace gingham::cuda
