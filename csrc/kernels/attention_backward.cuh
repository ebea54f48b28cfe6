// The gradients of attention_forward.cuh's product. Scores are made again, p = e^(score - lse), and every sum has one block that makes it, in one
// order: no atomics. Hence two kernels, seven products of a tile of scores instead of five:
//   of queries   dq += ds k, keys come by
//   of keys      dv += p^T dout, dk += ds^T q, the queries of all heads that share the keys come by; a wide head's columns are cut over blocks
#pragma once
#include "kernels/attention_tile.cuh"

namespace gingham::cuda {

template <class T, int width, bool of_keys>
struct BackwardShape {
  static constexpr int bytes = width * static_cast<int>(sizeof(T)), most = of_keys ? (sizeof(T) == 8 ? 64 : 128) : width;
  static constexpr int columns = width < most ? width : most;  // of a head's results that a block has: the registers hold no more of two
  static constexpr int other = (sizeof(T) == 8 ? 16 : (bytes <= 128 ? 64 : 32)) / (of_keys && columns == most ? 2 : 1);
  using Shape = AttentionShape<T, width, bytes >= 1024 ? 2 : 4, other, bytes >= 1024 ? 1 : 2>;
  using Own = Rows<T, width, Shape::own>;
  using Other = Rows<T, width, Shape::other>;
  using Sum = Wide<T>;
  static constexpr int numbers = 2 * Shape::other * static_cast<int>(sizeof(Sum));  // lse and delta of a tile of queries
  static constexpr int stage = 2 * Other::bytes + numbers;
  static constexpr int tiles = 2 * Own::bytes + Shape::stages * stage, slabs = Shape::warps * Shape::slab_bytes;
  // The slabs are the last; on the tensor cores only a mask needs them.
  static constexpr size_t shared(bool masked) { return tiles + (masked || !Shape::tensor ? slabs : 0); }
  static_assert(ResultTile<Shape, columns>::bytes <= tiles);
};

// A query that has seen nothing has lse -inf: its p are 0.
template <class Sum>
__device__ inline Sum lse_of(Sum lse) {
  return lse == -static_cast<Sum>(INFINITY) ? static_cast<Sum>(INFINITY) : lse;
}

// Of the elements of a tile, 1 / (1 - p) where dropout keeps them, 0 where not.
template <class Sum>
struct Factors {
  uint32_t kept;
  Sum keep;
  __device__ Sum at(int element) const { return kept >> element & 1 ? keep : Sum(0); }
};

// The tiles of one head after the other.
struct Walk {
  int each, head = 0, tile = 0;
  __device__ void go_on() {
    if (++tile < each) return;
    tile = 0;
    head++;
  }
};

// Block (tile, line): line of [batch, heads], of keys of [batch, kv_heads].
template <class T, int width, bool of_keys>
__global__ void __launch_bounds__(BackwardShape<T, width, of_keys>::Shape::threads, 1)
    attention_backward_kernel(AttentionPart p, BackwardViews<T> views, int tiles) {
  using B = BackwardShape<T, width, of_keys>;
  constexpr int columns = B::columns;
  using S = typename B::Shape;
  using Own = typename B::Own;
  using Other = typename B::Other;
  using Sum = Wide<T>;
  char *own = shared_memory(), *ring = own + 2 * Own::bytes;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, length = static_cast<int>(p.a.width);
  Sum* slab = reinterpret_cast<Sum*>(own + B::tiles + warp * S::slab_bytes);
  const Run &rows = of_keys ? p.keys : p.queries, &others = of_keys ? p.queries : p.keys;
  const int shared = static_cast<int>(p.a.heads / p.a.kv_heads), lines = of_keys ? shared : 1;
  const int line = static_cast<int>(blockIdx.x) / tiles, turn = static_cast<int>(blockIdx.x) % tiles;
  const int first = (of_keys ? turn : tiles - 1 - turn) * S::own;  // under a causal mask those with the most to do come first
  const int wide = of_keys ? line * shared : line, narrow = of_keys ? line : line / shared;
  const int b = wide / static_cast<int>(p.a.heads), h = wide % static_cast<int>(p.a.heads);
  const int column = static_cast<int>(blockIdx.y) * columns;
  // Tiles of the other rows that these may see, or be seen by.
  const int64_t ends = rows.position + first + S::own - others.position, begins = rows.position + first - others.position;
  const int from = p.a.causal && of_keys && begins > 0 ? static_cast<int>((begins < others.count ? begins : others.count) / S::other) : 0;
  const int all = static_cast<int>(p.a.causal && !of_keys && ends < others.count ? ends : others.count);
  const int each = all > from * S::other ? (all + S::other - 1) / S::other - from : 0, steps = each * lines;
  if (steps == 0) return;
  const auto load_numbers = [&](Sum* numbers, int head, int at, int left) {
    for (int i = static_cast<int>(threadIdx.x); i < S::other; i += S::threads) {
      shared_store(numbers + i, i < left ? lse_of(*views.lse.to(head, others.row + at + i)) : static_cast<Sum>(INFINITY));
      shared_store(numbers + S::other + i, i < left ? *views.delta.to(head, others.row + at + i) : Sum(0));
    }
  };
  Walk fetched{each}, walk{each};
  const auto fetch = [&](int step) {
    if (step < steps) {
      char* stage = ring + step % S::stages * B::stage;
      const int at = (from + fetched.tile) * S::other, head = wide + fetched.head, left = static_cast<int>(others.count) - at;
      const View<T>& one = of_keys ? views.q : views.k;
      const View<T>& two = of_keys ? views.dout : views.v;
      const int64_t width_at = (of_keys ? head : narrow) * p.a.width;
      Other::template load<S::threads>(stage, one.from(others.row + at, width_at), left, length, views.aligned);
      Other::template load<S::threads>(stage + Other::bytes, two.from(others.row + at, width_at), left, length, views.aligned);
      if constexpr (of_keys) load_numbers(reinterpret_cast<Sum*>(stage + 2 * Other::bytes), head, at, left);
      fetched.go_on();
    }
    cp_async_commit();
  };

  {
    const int64_t at = (of_keys ? narrow : wide) * p.a.width;
    const View<T>& one = of_keys ? views.k : views.q;
    const View<T>& two = of_keys ? views.v : views.dout;
    Own::template load<S::threads>(own, one.from(rows.row + first, at), rows.count - first, length, views.aligned);
    Own::template load<S::threads>(own + Own::bytes, two.from(rows.row + first, at), rows.count - first, length, views.aligned);
  }
  fetch(0);
  const int row = first + warp * 16 + (lane >> 2);
  Pack<Sum, 2> own_numbers[2];  // lse and delta of the lane's two queries
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool exists = !of_keys && row + 8 * r < rows.count;
    own_numbers[r].at[0] = exists ? lse_of(*views.lse.to(line, rows.row + row + 8 * r)) : static_cast<Sum>(INFINITY);
    own_numbers[r].at[1] = exists ? *views.delta.to(line, rows.row + row + 8 * r) : Sum(0);
  }
  // lse or delta of an element's query
  const auto number = [&](const Sum* numbers, int at, int which) {
    if constexpr (!of_keys) return own_numbers[at / 2 % 2].at[which];
    return shared_load(numbers + which * S::other + S::score_column(at / 4 * 2 + at % 2, lane));
  };
  Results<S, columns> dq_or_dk = {};
  [[maybe_unused]] Results<S, columns> dv = {};

  for (int step = 0; step < steps; step++, walk.go_on()) {
    cp_async_wait<0>();
    block_barrier();  // this stage has come for all, and with two of them all are done with the other
    if constexpr (S::stages == 2) fetch(step + 1);
    const char* stage = ring + step % S::stages * B::stage;
    const Sum* numbers = reinterpret_cast<const Sum*>(stage + 2 * Other::bytes);
    const ScoreTile<S, of_keys> tile{p, b, h + walk.head, row, (from + walk.tile) * S::other, lane};
    Sum s[S::tiles][4], d[S::tiles][4];
    multiply_scores<S, Own, Other>(s, own, stage, warp * 16, lane);
    tile.mask(s, slab);
    const bool drops = p.a.dropout.p > 0;
    const Factors<Sum> factors{drops ? tile.kept() : ~0u, drops ? static_cast<Sum>(p.draw.keep) : Sum(1)};
#pragma unroll
    for (int at = 0; at < 4 * S::tiles; at++) s[at / 4][at % 4] = exp_of(s[at / 4][at % 4] - number(numbers, at, 0));
    if constexpr (of_keys) {
#pragma unroll
      for (int at = 0; at < 4 * S::tiles; at++) d[at / 4][at % 4] = s[at / 4][at % 4] * factors.at(at);
      add_product<S, Other, columns>(dv, d, stage + Other::bytes, column, slab, lane);
    }
    multiply_scores<S, Own, Other>(d, own + Own::bytes, stage + Other::bytes, warp * 16, lane);
#pragma unroll
    for (int at = 0; at < 4 * S::tiles; at++) {
      const Sum probability = s[at / 4][at % 4];
      // what is not seen takes no part, whatever dout v^T is there
      Sum& g = d[at / 4][at % 4];
      g = probability == Sum(0) ? Sum(0) : probability * (g * factors.at(at) - number(numbers, at, 1));
    }
    add_product<S, Other, columns>(dq_or_dk, d, stage, column, slab, lane);
    if constexpr (S::stages == 1) {
      block_barrier();  // all are done with the only stage
      fetch(step + 1);
    }
  }

  using Out = ResultTile<S, columns>;
  Sum* tile = reinterpret_cast<Sum*>(own);
  const auto put = [&](const Results<S, columns>& o, const View<Sum>& m) {
    Out::put(tile, o, warp * 16 + (lane >> 2), lane, [] {});
    Out::add_to(m.from(rows.row + first, line * p.a.width), tile, rows.count - first, column, length, views.wide, [](int) { return Sum(1); });
  };
#pragma unroll
  for (int i = 0; i < columns / 2; i++) dq_or_dk[i / 4][i % 4] *= static_cast<Sum>(p.a.scale);
  put(dq_or_dk, of_keys ? views.dk : views.dq);
  if constexpr (of_keys) put(dv, views.dv);
}

template <class T, int width, bool of_keys>
void run_backward(const AttentionPart& p, const BackwardViews<T>& views, const Stream& stream) {
  using B = BackwardShape<T, width, of_keys>;
  const int tiles = static_cast<int>(ceil_div((of_keys ? p.keys : p.queries).count, B::Shape::own));
  const dim3 grid(blocks(tiles * p.a.batch * (of_keys ? p.a.kv_heads : p.a.heads)), static_cast<unsigned>(width / B::columns));
  launch(stream, attention_backward_kernel<T, width, of_keys>, grid, B::Shape::threads, B::shared(p.a.mask != nullptr), p, views, tiles);
}

}  // namespace gingham::cuda
