// The device side of epilogue.h's Tail, shared by the epilogue kernel and gemm's stores.
#pragma once
#include "kernels/activation.cuh"
#include "kernels/sweep.cuh"

namespace gingham::cuda {

// A row vector as a matrix whose rows coincide, so that it is turned and moved like the others.
inline Matrix repeated(Matrix row, int64_t rows) {
  row.rows = rows;
  row.row_stride = 0;
  return row;
}

// T: the layer's dtype. Views without data are left out.
template <class T>
struct TailViews {
  View<T> bias, residual, slope_at, z, y;
  Epilogue kind = Epilogue::none;

  TailViews() = default;
  TailViews(const Tail& tail, const Matrix& bias_rows)
      : bias(bias_rows), residual(tail.residual), slope_at(tail.slope_at), z(tail.z), y(tail.y), kind(tail.kind) {}

  template <int W>
  __device__ void write(int64_t i, int64_t j, Pack<Wide<T>, W> sum) const {
    using A = Wide<T>;
    if (bias.data) {
      const Pack<T, W> shift = bias.template load<W>(i, j);
      for (int k = 0; k < W; k++) sum.at[k] += widen(shift.at[k]);
    }
    Pack<T, W> out;
    if (z.data) {
      for (int k = 0; k < W; k++) narrow(sum.at[k], out.at[k]);
      z.template store<W>(i, j, out);
    }
    if (!y.data) return;
    if (slope_at.data) {
      const Pack<T, W> where = slope_at.template load<W>(i, j);
      for (int k = 0; k < W; k++) sum.at[k] *= slope<A>(kind, widen(where.at[k]));
    } else {
      for (int k = 0; k < W; k++) sum.at[k] = activate<A>(kind, sum.at[k]);
    }
    if (residual.data) {
      const Pack<T, W> more = residual.template load<W>(i, j);
      for (int k = 0; k < W; k++) sum.at[k] += widen(more.at[k]);
    }
    for (int k = 0; k < W; k++) narrow(sum.at[k], out.at[k]);
    y.template store<W>(i, j, out);
  }
};

}  // namespace gingham::cuda
