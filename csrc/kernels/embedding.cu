// Gather is a copy at the speed of memory. The scatter is told ids in ascending order, so that the rows of an id are a run of positions: a thread
// takes a piece of 32 positions, some columns wide, sums its runs in order and stores each in its id's row. Of a run that came from the
// piece before, the part in this piece goes to workspace, and a second kernel adds these parts, in order, to what the run's first piece has
// stored. No atomics: the same bits every time. One id in all of n positions is a chain of 32 + n / 32 steps.
#include "kernels/cast.h"
#include "kernels/embedding.h"
#include "kernels/sweep.cuh"

namespace gingham::cuda {
namespace {

// All bits set: a NaN in every real dtype.
template <class T, int W>
__device__ inline Pack<T, W> nans() {
  Pack<T, W> out;
#pragma unroll
  for (int k = 0; k < W; k++) out.at[k] = static_cast<T>(~T{0});
  return out;
}

template <class T>
struct Gather {
  View<T> table, out;
  const int64_t* ids;
  int64_t rows;
  template <int W>
  __device__ void at(int64_t n, int64_t j) const {
    const int64_t id = ids[n];
    out.template store<W>(n, j, id >= 0 && id < rows ? table.template load<W>(id, j) : nans<T, W>());
  }
};

constexpr int kPiece = 32;    // positions
constexpr int kTogether = 4;  // packs that a thread loads before it uses the first

// Positions in ascending order of their ids, and the rows of the table.
struct Runs {
  Places places;
  int64_t count, rows;

  __device__ int64_t id(int64_t p) const { return places.ids[p]; }
  __device__ bool here(int64_t id) const { return id >= places.first && id < places.first + rows && id != places.skipped; }
  __device__ bool goes_on(int64_t p) const { return p > 0 && p < count && id(p - 1) == id(p); }
};

template <class T>
struct SumPiece {
  View<T> rows;
  View<Wide<T>> table, parts;
  Runs runs;
  template <int W>
  __device__ void at(int64_t piece, int64_t j) const {
    const int64_t begin = piece * kPiece, *ids = runs.places.ids + begin, *order = runs.places.order + begin;
    const int length = begin + kPiece < runs.count ? kPiece : static_cast<int>(runs.count - begin);
    bool entered = runs.goes_on(begin);
    Pack<Wide<T>, W> sum{};
    for (int first = 0; first < length; first += kTogether) {
      Pack<T, W> more[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; u++)
        if (first + u < length && runs.here(ids[first + u])) more[u] = rows.template load<W>(order[first + u], j);
#pragma unroll
      for (int u = 0; u < kTogether; u++) {
        const int p = first + u;
        if (p >= length) break;
        if (runs.here(ids[p])) {
          const Pack<Wide<T>, W> values = widened(more[u]);
#pragma unroll
          for (int k = 0; k < W; k++) sum.at[k] += values.at[k];
        }
        if (p + 1 < length && ids[p + 1] == ids[p]) continue;
        if (runs.here(ids[p])) {
          if (entered)
            parts.template store<W>(piece, j, sum);
          else
            table.template store<W>(ids[p] - runs.places.first, j, sum);
        }
        sum = {};
        entered = false;
      }
    }
  }
};

// Of the second piece of a run: what it and those behind it left is added to the run's row.
template <class T>
struct JoinParts {
  View<T> table, parts;
  Runs runs;
  int64_t pieces;
  template <int W>
  __device__ void at(int64_t piece, int64_t j) const {
    const int64_t begin = piece * kPiece;
    if (!runs.goes_on(begin) || !runs.here(runs.id(begin))) return;
    const int64_t id = runs.id(begin), before = begin - kPiece;
    if (before > 0 && runs.id(before - 1) == id) return;
    Pack<T, W> sum = table.template load<W>(id - runs.places.first, j);
    for (int64_t first = piece;; first += kTogether) {
      Pack<T, W> more[kTogether];
      bool there[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; u++) {
        there[u] = first + u < pieces && runs.id((first + u) * kPiece) == id;
        if (there[u]) more[u] = parts.template load<W>(first + u, j);
      }
#pragma unroll
      for (int u = 0; u < kTogether; u++)
        if (there[u])
          for (int k = 0; k < W; k++) sum.at[k] += more[u].at[k];
      if (!there[kTogether - 1]) break;
    }
    table.template store<W>(id - runs.places.first, j, sum);
  }
};

template <class T>
void gather(const Matrix& table, const int64_t* ids, const Matrix& out, const Stream& stream) {
  sweep<16 / static_cast<int>(sizeof(T))>(Gather<T>{View<T>(table), View<T>(out), ids, table.rows}, out.rows, out.cols, {&table, &out}, stream);
}

}  // namespace

void gather_rows(const Matrix& table, const int64_t* ids, const Matrix& out, const Stream& stream) {
  switch (size_of(out.dtype)) {
    case 2:
      return gather<uint16_t>(table, ids, out, stream);
    case 4:
      return gather<uint32_t>(table, ids, out, stream);
    default:
      return gather<uint64_t>(table, ids, out, stream);
  }
}

void scatter_rows(const Matrix& rows, const Places& places, const Matrix& table, const Stream& stream) {
  cuda::fill_zero(table, stream);
  if (rows.empty() || table.empty()) return;
  CHECK(ShapeError, places.order, "a scatter on a GPU takes sorted ids and their order");
  const int64_t pieces = ceil_div(rows.rows, kPiece), pitch = ceil_div(rows.cols, 16) * 16;
  const Scratch room(stream, static_cast<size_t>(pieces * pitch) * size_of(table.dtype));
  const Matrix parts{room.data(), pieces, rows.cols, pitch, 1, table.dtype};
  with_real(rows.dtype, "scatter", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    const Runs runs{places, rows.rows, table.rows};
    const View<A> to(table), kept(parts);
    sweep<16 / static_cast<int>(sizeof(T))>(SumPiece<T>{View<T>(rows), to, kept, runs}, pieces, rows.cols, {&rows, &table, &parts}, stream);
    if (pieces > 1) sweep<16 / static_cast<int>(sizeof(A))>(JoinParts<A>{to, kept, runs, pieces}, pieces, rows.cols, {&table, &parts}, stream);
  });
}

}  // namespace gingham::cuda
