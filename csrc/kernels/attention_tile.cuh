// What the kernels of attention share. A block owns a tile of rows, 16 a warp (queries, or in one backward kernel keys), and walks along tiles of
// `other` rows (keys, or queries), so that scores exist for own x other at a time, in registers:
//   16 bits       mma.sync; p and ds are rounded to the operands' type between two products, where they turn from sums into operands
//   fp32, fp64    on the ordinary units; p and ds pass through a slab of shared memory of the warp's own
// In both, lane l has of its warp's 16 rows the rows l / 4 and l / 4 + 8, and the four lanes of a row share its columns.
#pragma once
#include "kernels/activation.cuh"
#include "kernels/attention.h"
#include "kernels/panel.cuh"
#include "kernels/philox.cuh"
#include "kernels/sweep.cuh"

namespace gingham::cuda {

// One call, as the kernels take it.
struct AttentionPart {
  Attention a;
  Run queries, keys;
  DropoutDraw draw;
};

// aligned: rows can be read in words of 16 bytes; wide: results can be moved by `group`.
template <class T>
struct ForwardViews {
  View<T> q, k, v;
  View<Wide<T>> out, top, sum;
  bool aligned, wide;
};
template <class T>
struct BackwardViews {
  View<T> q, k, v, dout;
  View<Wide<T>> lse, delta, dq, dk, dv;
  bool aligned, wide;
};

// columns: of a head, filled up with zeros.
template <class T, int columns, int high, int along, int ring>
struct AttentionShape {
  using Element = T;
  using Sum = Wide<T>;
  static constexpr bool tensor = sizeof(T) == 2;
  static constexpr int width = columns, warps = high, threads = 32 * high, own = 16 * high, other = along, stages = ring;
  static constexpr int tiles = other / 8;  // of 8 columns of scores, 4 numbers a lane each
  static_assert(4 * tiles <= 32);          // kept() and seen() have a bit for each
  // neighbouring columns that a lane has of a row of scores, and of a result
  static constexpr int pair = tensor ? 2 : 1, group = tensor ? 2 : 16 / static_cast<int>(sizeof(T));
  // a warp's slab: 16 x other numbers, of p on its way into a product and of the mask
  static constexpr int slab_pitch = other + (tensor ? 8 : 4), slab_bytes = 16 * slab_pitch * static_cast<int>(sizeof(Sum));
  // Number i of a lane's numbers of a row stands in this column.
  __device__ static int score_column(int i, int lane) { return (4 * (i / pair) + (lane & 3)) * pair + i % pair; }
  __device__ static int result_column(int i, int lane) { return (4 * (i / group) + (lane & 3)) * group + i % group; }
};

// `count` rows in shared memory, zeros where there are none: 16 bits in slabs of 64 elements, twisted as gemm's panels, the others in lines 16
// bytes longer than they need, so that neighbours lie 4 banks apart.
template <class T, int width, int count>
struct Rows {
  static constexpr int size = static_cast<int>(sizeof(T)), elements = 16 / size, chunks = width / elements;
  static constexpr int pitch = width * size + (size == 2 ? 0 : 16), bytes = count * pitch;
  using Slab = Panel<T, true, count, 32, true>;

  __device__ static int at(int line, int chunk) {
    if constexpr (size == 2)
      return chunk / Slab::chunks * Slab::bytes + Slab::at(line, chunk % Slab::chunks);
    else
      return line * pitch + chunk * 16;
  }

  // Of `from` there are lines_left rows of `length` elements. A thread's chunks stand in one column.
  template <int threads>
  __device__ static void load(char* shared, const View<T>& from, int64_t lines_left, int length, bool aligned) {
    constexpr int step = threads / chunks;
    static_assert(threads % chunks == 0 && count % step == 0);
    const int first = static_cast<int>(threadIdx.x) / chunks, chunk = static_cast<int>(threadIdx.x) % chunks, left = length - chunk * elements;
    const int valid = left <= 0 ? 0 : (left < elements ? left : elements), lines = lines_left < count ? static_cast<int>(lines_left) : count;
    const T* source = from.to(first, chunk * elements);
#pragma unroll 1  // more would keep an address each in registers
    for (int line = first; line < count; line += step, source += step * from.row_stride) {
      const bool exists = valid > 0 && line < lines;
      char* to = shared + at(line, chunk);
      if (aligned)
        cp_async<16>(to, exists ? source : from.data, exists ? valid * size : 0);
      else
        load_elements(to, exists ? source : from.data, from.col_stride, exists ? valid : 0);
    }
  }

 private:
  __device__ static void load_elements(char* to, const T* from, int64_t stride, int valid) {
    if constexpr (size >= 4) {
#pragma unroll
      for (int e = 0; e < elements; e++) cp_async<size>(to + e * size, e < valid ? from + e * stride : from, e < valid ? size : 0);
    } else {
      Pack<T, elements> chunk;
#pragma unroll
      for (int e = 0; e < elements; e++) chunk.at[e] = e < valid ? from[e * stride] : T{};
      shared_store(reinterpret_cast<uint4*>(to), bits_as<uint4>(chunk));
    }
  }
};

template <class T>
__device__ inline uint32_t rounded_pair(float low, float high) {
  T a, b;
  narrow(low, a);
  narrow(high, b);
  return static_cast<uint32_t>(a.bits) | static_cast<uint32_t>(b.bits) << 16;
}

template <class T, int n>
__device__ inline Pack<T, n> load_shared(const char* from) {
  return bits_as<Pack<T, n>>(shared_load(reinterpret_cast<const uint4*>(from)));
}

// s = own rows from `row` on, times the other rows transposed.
template <class S, class Own, class Other>
__device__ inline void multiply_scores(typename S::Sum (&s)[S::tiles][4], const char* own, const char* other, int row, int lane) {
  using T = typename S::Element;
#pragma unroll
  for (int n = 0; n < S::tiles; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = 0;
  if constexpr (S::tensor) {
#pragma unroll 2
    for (int chunk = 0; chunk < Own::chunks; chunk += 2) {
      uint32_t fa[4], fb[4];
      load_a<T, true, Own>(fa, own, row, chunk, lane);
#pragma unroll
      for (int j = 0; j < S::tiles / 2; j++) {
        load_b<T, true, Other>(fb, other, j * 16, chunk, lane);
        multiply<T>(s[2 * j], fa, fb[0], fb[1]);
        multiply<T>(s[2 * j + 1], fa, fb[2], fb[3]);
      }
    }
  } else {
    constexpr int n = Own::elements;
#pragma unroll 2
    for (int chunk = 0; chunk < Own::chunks; chunk++) {
      const Pack<T, n> a = load_shared<T, n>(own + Own::at(row + (lane >> 2), chunk));
      const Pack<T, n> b = load_shared<T, n>(own + Own::at(row + (lane >> 2) + 8, chunk));
#pragma unroll
      for (int i = 0; i < 2 * S::tiles; i++) {
        const Pack<T, n> c = load_shared<T, n>(other + Other::at(S::score_column(i, lane), chunk));
#pragma unroll
        for (int e = 0; e < n; e++) {
          s[i / 2][i % 2] += a.at[e] * c.at[e];
          s[i / 2][2 + i % 2] += b.at[e] * c.at[e];
        }
      }
    }
  }
}

// o += s times the other rows, of which the columns from `first` on. slab: this warp's.
template <class S, class Other, int columns>
__device__ inline void add_product(typename S::Sum (&o)[columns / 8][4], const typename S::Sum (&s)[S::tiles][4], const char* other, int first,
                                   [[maybe_unused]] typename S::Sum* slab, int lane) {
  using T = typename S::Element;
  if constexpr (S::tensor) {
#pragma unroll
    for (int k = 0; k < S::tiles / 2; k++) {
      const uint32_t fa[4] = {rounded_pair<T>(s[2 * k][0], s[2 * k][1]), rounded_pair<T>(s[2 * k][2], s[2 * k][3]),
                              rounded_pair<T>(s[2 * k + 1][0], s[2 * k + 1][1]), rounded_pair<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int j = 0; j < columns / 16; j++) {
        uint32_t fb[4];
        load_b<T, false, Other>(fb, other, first + j * 16, 2 * k, lane);
        multiply<T>(o[2 * j], fa, fb[0], fb[1]);
        multiply<T>(o[2 * j + 1], fa, fb[2], fb[3]);
      }
    }
  } else {
    constexpr int n = Other::elements;
    T* own = slab + (lane >> 2) * S::slab_pitch;
    warp_barrier();  // what stood here has been read
#pragma unroll
    for (int i = 0; i < 2 * S::tiles; i++) {
      shared_store(own + S::score_column(i, lane), s[i / 2][i % 2]);
      shared_store(own + 8 * S::slab_pitch + S::score_column(i, lane), s[i / 2][2 + i % 2]);
    }
    warp_barrier();
#pragma unroll 1
    for (int k = 0; k < S::other; k += n) {
      const Pack<T, n> a = load_shared<T, n>(reinterpret_cast<const char*>(own + k));
      const Pack<T, n> b = load_shared<T, n>(reinterpret_cast<const char*>(own + 8 * S::slab_pitch + k));
#pragma unroll
      for (int e = 0; e < n; e++)
#pragma unroll
        for (int j = 0; j < columns / (4 * n); j++) {
          const Pack<T, n> c = load_shared<T, n>(other + Other::at(k + e, first / n + 4 * j + (lane & 3)));
#pragma unroll
          for (int x = 0; x < n; x++) {
            const int i = j * n + x;
            o[i / 2][i % 2] += a.at[e] * c.at[x];
            o[i / 2][2 + i % 2] += b.at[e] * c.at[x];
          }
        }
    }
  }
}

// A lane's part of a tile of scores: where it lies, what is seen and what is kept of it. of_keys: rows are keys and columns queries.
template <class S, bool of_keys>
struct ScoreTile {
  using Sum = typename S::Sum;
  const AttentionPart& p;
  int b, h, row, col, lane;  // row: the lane's first one, col: the tile's, in their runs

  // Bit 4 n + e of element [n][e].
  __device__ uint32_t seen() const {
    const Run &rows = of_keys ? p.keys : p.queries, &cols = of_keys ? p.queries : p.keys;
    const int left = static_cast<int>(cols.count) - col, count = left < S::other ? left : S::other;
    int from[2], to[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      // the column that stands at this row's place in the sequence, as far as it is here
      const int64_t place = rows.position - cols.position + (row + 8 * r - col);
      const int diagonal = place < -1 ? -1 : (place > count ? count : static_cast<int>(place));
      from[r] = p.a.causal && of_keys && diagonal > 0 ? diagonal : 0;
      to[r] = p.a.causal && !of_keys && diagonal < count ? diagonal + 1 : count;
      if (row + 8 * r >= rows.count) to[r] = 0;
    }
    if (from[0] == 0 && from[1] == 0 && to[0] == S::other && to[1] == S::other) return ~0u;
    uint32_t bits = 0;
#pragma unroll
    for (int at = 0; at < 4 * S::tiles; at++) {
      const int c = S::score_column(at / 4 * 2 + at % 2, lane), r = at / 2 % 2;
      bits |= static_cast<uint32_t>(c >= from[r] && c < to[r]) << at;
    }
    return bits;
  }

  // Times scale, with the mask, -inf where nothing is seen.
  __device__ void mask(Sum (&s)[S::tiles][4], Sum* slab) const {
    const Sum nothing = -static_cast<Sum>(INFINITY), scale = static_cast<Sum>(p.a.scale);
    const uint32_t bits = seen();
#pragma unroll
    for (int at = 0; at < 4 * S::tiles; at++) s[at / 4][at % 4] = bits >> at & 1 ? s[at / 4][at % 4] * scale : nothing;
    if (p.a.mask == nullptr) return;
    const bool bytes = p.a.mask_dtype == DType::bytes1;
    load_mask(slab, bytes);
#pragma unroll
    for (int n = 0; n < S::tiles; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const Sum* from = slab + ((lane >> 2) + 8 * r) * S::slab_pitch;
        const Pack<Sum, 2> m = load_pair(from, n);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          Sum& score = s[n][2 * r + e];
          score = bytes ? (m.at[e] == Sum(0) ? score : nothing) : score + m.at[e];
        }
      }
  }

  // Bit 4 n + e: dropout keeps [n][e]. Neighbours share a counter where columns are keys.
  __device__ uint32_t kept() const {
    const int64_t line = (p.a.first_batch + b) * p.a.all_heads + p.a.first_head + h;
    const int64_t i = p.queries.position + (of_keys ? col : row), j = p.keys.position + (of_keys ? row : col);
    uint32_t bits = 0;
    uint64_t last = ~uint64_t{0};
    Counter words{};
#pragma unroll 1
    for (int at = 0; at < 4 * S::tiles; at++) {
      const int c = S::score_column(at / 4 * 2 + at % 2, lane), down = at / 2 % 2 * 8;
      const int64_t query = i + (of_keys ? c : down), key = j + (of_keys ? down : c);
      const uint64_t index = static_cast<uint64_t>((line * p.a.time + query) * p.a.time + key);
      if (index / 4 != last) words = philox(last = index / 4, p.a.dropout.call, p.draw.k0, p.draw.k1);
      bits |= static_cast<uint32_t>(word_of(words, static_cast<int>(index % 4)) >= p.draw.threshold) << at;
    }
    return bits;
  }

 private:
  // The mask of the warp's 16 rows: what is added, or of bytes 0 where seen.
  __device__ void load_mask(Sum* slab, bool bytes) const {
    const Run &rows = of_keys ? p.keys : p.queries, &cols = of_keys ? p.queries : p.keys;
    const int64_t* strides = p.a.mask_strides;
    const int top = row - (lane >> 2);
    const int64_t i = p.queries.row + (of_keys ? col : top), j = p.keys.column + (of_keys ? top : col);
    const int64_t from = b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3];
    const int64_t down = strides[of_keys ? 3 : 2], along = strides[of_keys ? 2 : 3];
    warp_barrier();  // what stood here has been read
#pragma unroll 2
    for (int index = lane; index < 16 * S::other; index += 32) {
      // neighbouring lanes take neighbouring keys
      const int r = of_keys ? index % 16 : index / S::other, c = of_keys ? index / 16 : index % S::other;
      const int64_t place = from + r * down + c * along;
      Sum value = 0;
      if (top + r < rows.count && col + c < cols.count)
        value = bytes ? Sum(static_cast<const uint8_t*>(p.a.mask)[place] == 0) : static_cast<const Sum*>(p.a.mask)[place];
      shared_store(slab + r * S::slab_pitch + c, value);
    }
    warp_barrier();
  }
  // Of a row of the slab the numbers 2 n and 2 n + 1 of this lane.
  __device__ Pack<Sum, 2> load_pair(const Sum* row_of_slab, int n) const {
    if constexpr (S::pair == 2)
      return bits_as<Pack<Sum, 2>>(shared_load(reinterpret_cast<const uint64_t*>(row_of_slab + S::score_column(2 * n, lane))));
    else
      return {{shared_load(row_of_slab + S::score_column(2 * n, lane)), shared_load(row_of_slab + S::score_column(2 * n + 1, lane))}};
  }
};

template <class S, int columns>
using Results = typename S::Sum[columns / 8][4];

// A block's results on their way out: through shared memory, whose tiles are done with, into rows.
template <class S, int columns>
struct ResultTile {
  using Sum = typename S::Sum;
  static constexpr int group = 16 / static_cast<int>(sizeof(Sum)), groups = columns / group;
  static constexpr int pitch = columns + (S::tensor ? 8 : 64 / static_cast<int>(sizeof(Sum)));  // so that the lanes' words lie in different banks
  static constexpr int bytes = S::own * pitch * static_cast<int>(sizeof(Sum));

  // row: the lane's first one in the block. also(): what else is written behind the first barrier.
  template <class Also>
  __device__ static void put(Sum* tile, const Results<S, columns>& o, int row, int lane, Also also) {
    block_barrier();  // what stood here has been read
    also();
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int i = 0; i < columns / 4; i += S::group) {
        Pack<Sum, S::group> pack;
#pragma unroll
        for (int x = 0; x < S::group; x++) pack.at[x] = o[(i + x) / 2][2 * r + (i + x) % 2];
        Sum* to = tile + (row + 8 * r) * pitch + S::result_column(i, lane);
        if constexpr (sizeof(pack) == 16)
          shared_store(reinterpret_cast<uint4*>(to), bits_as<uint4>(pack));
        else
          shared_store(reinterpret_cast<uint64_t*>(to), bits_as<uint64_t>(pack));  // of uint2 the compiler makes two stores
      }
    block_barrier();
  }

  // m's rows, of which rows_left exist, and its columns from `first` on, up to `width`: m = m old(row) + tile.
  template <class Old>
  __device__ static void add_to(const View<Sum>& m, const Sum* tile, int64_t rows_left, int first, int width, bool wide, Old old) {
    const int rows = rows_left < S::own ? static_cast<int>(rows_left) : S::own;
#pragma unroll 2
    for (int index = static_cast<int>(threadIdx.x); index < rows * groups; index += S::threads) {
      const int row = index / groups, at = index % groups * group, left = width - first - at;
      const Sum factor = old(row);
      const auto pack = bits_as<Pack<Sum, group>>(shared_load(reinterpret_cast<const uint4*>(tile + row * pitch + at)));
      Sum* to = m.to(row, first + at);
      if (wide && left >= group) {
        Pack<Sum, group> sum{};
        if (factor != Sum(0)) sum = load_pack<group>(to);
#pragma unroll
        for (int x = 0; x < group; x++) sum.at[x] = sum.at[x] * factor + pack.at[x];
        store_pack<group>(to, sum);
      } else {
#pragma unroll
        for (int x = 0; x < group; x++)
          if (x < left) to[x * m.col_stride] = (factor == Sum(0) ? Sum(0) : to[x * m.col_stride] * factor) + pack.at[x];
      }
    }
  }
};

}  // namespace gingham::cuda
