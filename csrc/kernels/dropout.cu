// The same bits as dropout.cc: one counter's four words are for the four elements of the global tensor that share it. A thread loads two packs
// of 16 bytes before it draws for the first, so that what it does once, and the wait for memory, is shared by two to four counters.
#include "kernels/dropout.h"
#include "kernels/philox.cuh"
#include "kernels/sweep.cuh"

namespace gingham::cuda {
namespace {

template <class T>
__device__ inline T scaled(T x, bool kept, Wide<T> keep) {
  T out;
  narrow(kept ? widen(x) * keep : Wide<T>(0), out);
  return out;
}

// Counters that a thread draws for neighbouring elements, 16 bytes of them or two times 16, and how many such packs it takes.
template <class T>
constexpr int kCounters = sizeof(T) == 2 ? 2 : 1;
template <class T>
constexpr int kPacks = sizeof(T) == 8 ? 1 : 2;

struct Drawn {
  RoundKeys keys;
  uint64_t call;
  uint32_t threshold;
};

// One counter's elements at `at` .. `at` + 3 of a run, those that lie in it.
template <class T>
__device__ inline void drop_four(const T* from, T* to, int64_t at, int64_t length, const Counter& words, uint32_t threshold, Wide<T> keep) {
  constexpr uintptr_t unit = sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16;
  if (at >= 0 && at + 4 <= length && (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % unit == 0) {
    const Pack<T, 4> in = load_pack<4>(from);
    Pack<T, 4> out;
    for (int k = 0; k < 4; k++) out.at[k] = scaled(in.at[k], words.at[k] >= threshold, keep);
    store_pack<4>(to, out);
  } else {
    const int begin = at < 0 ? static_cast<int>(-at) : 0, end = length - at < 4 ? static_cast<int>(length - at) : 4;
#pragma unroll 1  // unrolled, these stores would be merged with those above and none would be whole
    for (int k = begin; k < end; k++) {
      to[k] = scaled(from[k], word_of(words, k) >= threshold, keep);
    }
  }
}

// Counter q of a run is the one q after that in which its first element falls.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) dropout_kernel(const T* x, T* y, DropoutRuns runs, Drawn draw, Wide<T> keep) {
  constexpr int C = kCounters<T>, W = 4 * C, P = kPacks<T>;
  constexpr int64_t step = static_cast<int64_t>(kSweepThreads) * C;  // counters from a thread's pack to its next
  const int64_t first = static_cast<int64_t>(blockIdx.x) * P * step + static_cast<int64_t>(threadIdx.x) * C;
  for (int64_t r = blockIdx.y; r < runs.count; r += gridDim.y) {
    const uint64_t index = runs.index(r), counter = index / 4;
    const int64_t skip = static_cast<int64_t>(index % 4), at = 4 * first - skip, base = r * runs.length;  // at: of the first word in the run
    if (at >= runs.length) continue;
    const T* from = x + base + at;
    T* to = y + base + at;
    const bool aligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
    Pack<T, W> in[P];
    bool whole[P];
#pragma unroll
    for (int p = 0; p < P; p++) {
      whole[p] = aligned && at >= 0 && at + 4 * p * step + W <= runs.length;
      if (whole[p]) in[p] = load_pack<W>(from + 4 * p * step);
    }
#pragma unroll
    for (int p = 0; p < P; p++) {
      if (!whole[p]) continue;
      Pack<T, W> out;
#pragma unroll
      for (int c = 0; c < C; c++) {
        const Counter words = philox(counter + static_cast<uint64_t>(first + p * step + c), draw.call, draw.keys);
        for (int k = 0; k < 4; k++) out.at[4 * c + k] = scaled(in[p].at[4 * c + k], words.at[k] >= draw.threshold, keep);
      }
      store_pack<W>(to + 4 * p * step, out);
    }
    if (whole[0] && whole[P - 1]) continue;
#pragma unroll 1
    for (int n = 0; n < P * C; n++) {
      const int64_t more = n / C * step + n % C;
      if (at + 4 * more >= runs.length) break;
      if (n < C ? whole[0] : whole[P - 1]) continue;
      const Counter words = philox(counter + static_cast<uint64_t>(first + more), draw.call, draw.keys);
      drop_four(from + 4 * more, to + 4 * more, at + 4 * more, runs.length, words, draw.threshold, keep);
    }
  }
}

}  // namespace

void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, const Stream& stream) {
  const DropoutRuns runs = runs_of(local, global, offset);
  if (runs.count == 0) return;
  const unsigned down = static_cast<unsigned>(runs.count < 65535 ? runs.count : 65535);
  with_real(dtype, "dropout", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const DropoutDraw of_key = draw_of(key);
    const Drawn draw{RoundKeys(of_key.k0, of_key.k1), key.call, of_key.threshold};
    const unsigned across = blocks(ceil_div(runs.length + 3, int64_t{4} * kSweepThreads * kCounters<T> * kPacks<T>));
    launch(stream, dropout_kernel<T>, dim3(across, down), kSweepThreads, 0, static_cast<const T*>(x), static_cast<T*>(y), runs, draw,
           static_cast<Wide<T>>(of_key.keep));
  });
}

}  // namespace gingham::cuda
