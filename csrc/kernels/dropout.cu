// The same bits as dropout.cc: every thread draws one counter, four words for the four elements of the global tensor that share it. Some 160
// integer instructions a counter: about what memory allows in fp32 (8 bytes an element), half of that in 16 bits.
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

// Thread q of a run draws the counter q after the one its first element falls in.
template <class T>
__global__ void __launch_bounds__(kSweepThreads) dropout_kernel(const T* x, T* y, DropoutRuns runs, DropoutDraw draw, uint64_t call) {
  const int64_t q = static_cast<int64_t>(blockIdx.x) * kSweepThreads + threadIdx.x;
  const Wide<T> keep = static_cast<Wide<T>>(draw.keep);
  for (int64_t r = blockIdx.y; r < runs.count; r += gridDim.y) {
    const uint64_t index = runs.index(r);
    const int64_t skip = static_cast<int64_t>(index % 4), at = 4 * q - skip, base = r * runs.length;  // at: of the counter's first word in the run
    if (at >= runs.length) continue;
    const Counter words = philox(index / 4 + static_cast<uint64_t>(q), call, draw.k0, draw.k1);
    const T* from = x + base + at;
    T* to = y + base + at;
    constexpr uintptr_t unit = sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16;
    const bool whole = at >= 0 && at + 4 <= runs.length && (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % unit == 0;
    if (whole) {
      const Pack<T, 4> in = load_pack<4>(from);
      Pack<T, 4> out;
      for (int k = 0; k < 4; k++) out.at[k] = scaled(in.at[k], words.at[k] >= draw.threshold, keep);
      store_pack<4>(to, out);
    } else {
      const int begin = at < 0 ? static_cast<int>(-at) : 0, end = runs.length - at < 4 ? static_cast<int>(runs.length - at) : 4;
#pragma unroll 1  // unrolled, these stores would be merged with those above and none would be whole
      for (int k = begin; k < end; k++) {
        to[k] = scaled(from[k], word_of(words, k) >= draw.threshold, keep);
      }
    }
  }
}

}  // namespace

void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, const Stream& stream) {
  const DropoutRuns runs = runs_of(local, global, offset);
  if (runs.count == 0) return;
  const unsigned across = blocks(ceil_div(runs.length + 3, 4 * kSweepThreads));
  const unsigned down = static_cast<unsigned>(runs.count < 65535 ? runs.count : 65535);
  with_real(dtype, "dropout", [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(stream, dropout_kernel<T>, dim3(across, down), kSweepThreads, 0, static_cast<const T*>(x), static_cast<T*>(y), runs, draw_of(key),
           key.call);
  });
}

}  // namespace gingham::cuda
