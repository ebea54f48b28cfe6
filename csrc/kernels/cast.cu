// Copies and conversions at the speed of memory: 16-byte words where both views allow, 32x32 tiles through shared memory where one view is
// the other's transpose, so that both sides move whole 32-byte sectors.
#include "kernels/cast.h"
#include "kernels/sweep.cuh"

namespace gingham::cuda {
namespace {

template <class From, class To>
__device__ inline To convert(From x) {
  if constexpr (sizeof(From) == sizeof(To)) {
    return bits_as<To>(x);
  } else {
    To out;
    narrow(widen(x), out);
    return out;
  }
}

template <class From, class To>
struct Copy {
  View<From> from;
  View<To> to;
  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    const Pack<From, W> in = from.template load<W>(i, j);
    Pack<To, W> out;
    for (int k = 0; k < W; k++) out.at[k] = convert<From, To>(in.at[k]);
    to.template store<W>(i, j, out);
  }
};

template <class T>
struct Zero {
  View<T> to;
  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    to.template store<W>(i, j, Pack<T, W>{});
  }
};

constexpr int kTile = 32, kDown = 8;
// An odd number of words a line keeps the elements of a column in different banks.
template <class T>
constexpr int kPitch = kTile + (sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1);

// from has rows contiguous, to has columns contiguous.
template <class From, class To>
__global__ void __launch_bounds__(kTile* kDown) transpose_kernel(View<From> from, View<To> to, int64_t rows, int64_t cols, int64_t tiles_across) {
  To* tile = reinterpret_cast<To*>(shared_memory());
  const int64_t top = blockIdx.x / tiles_across * kTile, left = blockIdx.x % tiles_across * kTile;
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  for (int k = y; k < kTile; k += kDown)
    if (top + x < rows && left + k < cols) shared_store(tile + x * kPitch<To> + k, convert<From, To>(*from.to(top + x, left + k)));
  block_barrier();
  for (int k = y; k < kTile; k += kDown)
    if (top + k < rows && left + x < cols) *to.to(top + k, left + x) = shared_load(tile + k * kPitch<To> + x);
}

template <class From, class To>
void copy(Matrix from, Matrix to, const Stream& stream) {
  constexpr int width = 16 / static_cast<int>(sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  arrange({&to, &from});
  if (column_major(from) && to.rows > 1 && to.cols > 1) {
    const int64_t across = ceil_div(to.cols, kTile), down = ceil_div(to.rows, kTile);
    return launch(stream, transpose_kernel<From, To>, dim3(blocks(across * down)), kTile * kDown, sizeof(To) * kTile * kPitch<To>, View<From>(from),
                  View<To>(to), to.rows, to.cols, across);
  }
  sweep<width>(Copy<From, To>{View<From>(from), View<To>(to)}, to.rows, to.cols, {&from, &to}, stream);
}

template <class T>
void zero(Matrix m, const Stream& stream) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  arrange({&m});
  sweep<width>(Zero<T>{View<T>(m)}, m.rows, m.cols, {&m}, stream);
}

}  // namespace

void cast(const Matrix& from, const Matrix& to, const Stream& stream) {
  CHECK(ShapeError, from.rows == to.rows && from.cols == to.cols, "copy of [", from.rows, ",", from.cols, "] into [", to.rows, ",", to.cols, "]");
  if (from.empty()) return;
  if (from.dtype == to.dtype) {
    switch (size_of(from.dtype)) {
      case 1:
        return copy<uint8_t, uint8_t>(from, to, stream);
      case 2:
        return copy<uint16_t, uint16_t>(from, to, stream);
      case 4:
        return copy<uint32_t, uint32_t>(from, to, stream);
      default:
        return copy<uint64_t, uint64_t>(from, to, stream);
    }
  }
  if (from.dtype == DType::bf16 && to.dtype == DType::f32) return copy<Bf16, float>(from, to, stream);
  if (from.dtype == DType::f16 && to.dtype == DType::f32) return copy<F16, float>(from, to, stream);
  if (from.dtype == DType::f32 && to.dtype == DType::bf16) return copy<float, Bf16>(from, to, stream);
  if (from.dtype == DType::f32 && to.dtype == DType::f16) return copy<float, F16>(from, to, stream);
  throw ShapeError(concat("no conversion from ", name_of(from.dtype), " to ", name_of(to.dtype)));
}

void fill_zero(const Matrix& m, const Stream& stream) {
  if (m.empty()) return;
  switch (size_of(m.dtype)) {
    case 1:
      return zero<uint8_t>(m, stream);
    case 2:
      return zero<uint16_t>(m, stream);
    case 4:
      return zero<uint32_t>(m, stream);
    default:
      return zero<uint64_t>(m, stream);
  }
}

}  // namespace gingham::cuda
