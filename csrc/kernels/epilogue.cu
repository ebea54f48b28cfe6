// One pass over memory: C and what the tail names are read once, Z and Y written once.
#include "kernels/epilogue.h"
#include "kernels/tail.cuh"

namespace gingham::cuda {
namespace {

template <class T>
struct Apply {
  View<Wide<T>> c;
  TailViews<T> tail;

  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    tail.template write<W>(i, j, c.template load<W>(i, j));
  }
};

template <class T>
struct Gradient {
  View<T> dy, z, dz;
  Epilogue kind;

  template <int W>
  __device__ void at(int64_t i, int64_t j) const {
    const Pack<T, W> grad = dy.template load<W>(i, j), where = z.template load<W>(i, j);
    Pack<T, W> out;
    for (int k = 0; k < W; k++) narrow(widen(grad.at[k]) * slope<Wide<T>>(kind, widen(where.at[k])), out.at[k]);
    dz.template store<W>(i, j, out);
  }
};

template <class T>
void apply(Matrix c, Tail tail, const Stream& stream) {
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  Matrix bias = tail.bias.empty() ? Matrix{} : repeated(tail.bias, c.rows);
  arrange({&c, &bias, &tail.residual, &tail.slope_at, &tail.z, &tail.y});
  const Apply<T> op{View<Wide<T>>(c), TailViews<T>(tail, bias)};
  sweep<width>(op, c.rows, c.cols, {&c, &bias, &tail.residual, &tail.slope_at, &tail.z, &tail.y}, stream);
}

}  // namespace

void epilogue(const Matrix& c, const Tail& tail, const Stream& stream) {
  if (c.empty() || tail.empty()) return;
  CHECK(ShapeError, c.dtype == accumulator(tail.dtype()), "epilogue of a sum in ", name_of(c.dtype), " for a layer in ", name_of(tail.dtype()));
  with_real(tail.dtype(), "epilogue", [&](auto tag) { apply<typename decltype(tag)::type>(c, tail, stream); });
}

void activation_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, Epilogue kind, const Stream& stream) {
  with_real(z.dtype, "gradient of an activation", [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int width = 16 / static_cast<int>(sizeof(T));
    Matrix grad = dy, where = z, out = dz;
    arrange({&out, &grad, &where});
    sweep<width>(Gradient<T>{View<T>(grad), View<T>(where), View<T>(out), kind}, out.rows, out.cols, {&grad, &where, &out}, stream);
  });
}

}  // namespace gingham::cuda
