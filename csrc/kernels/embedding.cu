// Gather is a copy at the speed of memory. The scatter adds without atomics: one kernel links every position to the next with its id (a warp
// scans for it, 32 positions at a time), then the first position of each id walks its chain and adds in order. A single id in all of n
// positions makes one chain of n steps, about a microsecond each.
#include "kernels/embedding.h"
#include "kernels/reduce.cuh"

namespace gingham::cuda {
namespace {

template <class T>
struct Gather {
  View<T> table, out;
  const int64_t* ids;
  int64_t first, rows;
  template <int W>
  __device__ void at(int64_t n, int64_t j) const {
    const int64_t at = ids[n] - first;
    out.template store<W>(n, j, at >= 0 && at < rows ? table.template load<W>(at, j) : Pack<T, W>{});
  }
};

constexpr int kLast = -1, kNotFirst = -2;

// next[n]: the next position with the same id or kLast; head[n]: 0 for an id's first position in this table, else kNotFirst. One warp each.
__global__ void __launch_bounds__(kSweepThreads) link_kernel(const int64_t* ids, int* next, int* head, int count, int64_t first, int64_t rows) {
  const int n = static_cast<int>(blockIdx.x * (kSweepThreads / 32) + threadIdx.x / 32), lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t id = n < count ? ids[n] : 0;
  const bool here = n < count && id >= first && id < first + rows;
  int found = count, before = 0;
  for (int at = n + 1; here && at < count; at += 32) {
    const int mine = at + lane < count && ids[at + lane] == id ? at + lane : count;
    int least = mine;
    for (int mask = 16; mask > 0; mask /= 2) {
      const int other = shuffle_xor(least, mask);
      least = other < least ? other : least;
    }
    found = least;
    if (found < count) break;
  }
  for (int at = n - 32; here && at > -32 && !before; at -= 32) {
    before = at + lane >= 0 && ids[at + lane] == id ? 1 : 0;
    for (int mask = 16; mask > 0; mask /= 2) before |= shuffle_xor(before, mask);
  }
  if (n >= count || lane != 0) return;
  next[n] = found < count ? found : kLast;
  head[n] = here && !before ? 0 : kNotFirst;
}

template <class T>
struct AddChain {
  View<T> rows;
  View<Wide<T>> table;
  const int64_t* ids;
  const int *next, *head;
  int64_t first;
  template <int W>
  __device__ void at(int64_t n, int64_t j) const {
    if (head[n] == kNotFirst) return;
    const int64_t at = ids[n] - first;
    Pack<Wide<T>, W> sum = table.template load<W>(at, j);
    for (int64_t p = n; p != kLast; p = next[p]) {
      const Pack<T, W> more = rows.template load<W>(p, j);
      for (int k = 0; k < W; k++) sum.at[k] += widen(more.at[k]);
    }
    table.template store<W>(at, j, sum);
  }
};

template <class T>
void gather(const Matrix& table, const int64_t* ids, int64_t first, const Matrix& out, const Stream& stream) {
  sweep<16 / static_cast<int>(sizeof(T))>(Gather<T>{View<T>(table), View<T>(out), ids, first, table.rows}, out.rows, out.cols, {&table, &out},
                                          stream);
}

}  // namespace

void gather_rows(const Matrix& table, const int64_t* ids, int64_t first, const Matrix& out, const Stream& stream) {
  switch (size_of(out.dtype)) {
    case 2:
      return gather<uint16_t>(table, ids, first, out, stream);
    case 4:
      return gather<uint32_t>(table, ids, first, out, stream);
    case 8:
      return gather<uint64_t>(table, ids, first, out, stream);
    default:
      return gather<uint8_t>(table, ids, first, out, stream);
  }
}

void scatter_add_rows(const Matrix& rows, const int64_t* ids, int64_t first, const Matrix& table, const Stream& stream) {
  if (rows.empty() || table.empty()) return;
  CHECK(ShapeError, rows.rows <= INT32_MAX, "scatter of ", rows.rows, " rows, at most ", INT32_MAX);
  const int count = static_cast<int>(rows.rows);
  const Scratch room(stream, static_cast<size_t>(count) * 2 * sizeof(int));
  int *next = reinterpret_cast<int*>(room.data()), *head = next + count;
  launch(stream, link_kernel, dim3(static_cast<unsigned>(ceil_div(count, kSweepThreads / 32))), kSweepThreads, 0, ids, next, head, count, first,
         table.rows);
  with_real(rows.dtype, "scatter", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const AddChain<T> op{View<T>(rows), View<Wide<T>>(table), ids, next, head, first};
    sweep<16 / static_cast<int>(sizeof(T))>(op, rows.rows, rows.cols, {&rows, &table}, stream);
  });
}

}  // namespace gingham::cuda
