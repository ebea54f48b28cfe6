// gemm in every orientation, dtype, order of C, with and without adding, aligned and not, against float64.
#include <cmath>

#include "kernel_tests.h"
#include "kernels/gemm.h"
#include "kernels/gemm_store.cuh"
#include "shim.h"

namespace gingham::tests {
namespace {

struct Kind {
  const char* name;
  DType dtype;
  Math math;
  double bound, stored;  // of a sum; of what is rounded to the layer's dtype
};
const Kind kKinds[] = {{"bf16", DType::bf16, Math::exact, 2e-6, 4e-3},
                       {"f16", DType::f16, Math::exact, 2e-6, 5e-4},
                       {"tf32", DType::f32, Math::tf32, 2e-6, 2e-6},
                       {"f32", DType::f32, Math::exact, 2e-6, 2e-6},
                       {"f64", DType::f64, Math::exact, 1e-14, 1e-14}};

struct Size {
  int64_t m, k, n;
};

double as_operand(double value, const Kind& kind) {
  if (kind.math != Math::tf32) return value;
  const uint32_t bits = (__builtin_bit_cast(uint32_t, static_cast<float>(value)) + 0x1000u) & 0xffffe000u;
  return __builtin_bit_cast(float, bits);
}

std::vector<double> product(const Buffer& a, const Buffer& b, const Kind& kind) {
  const int64_t m = a.view().rows, k = a.view().cols, n = b.view().cols;
  std::vector<double> x = a.values(), y = b.values(), out(static_cast<size_t>(m * n), 0.0);
  for (double& value : x) value = as_operand(value, kind);
  for (double& value : y) value = as_operand(value, kind);
  for (int64_t i = 0; i < m; i++)
    for (int64_t p = 0; p < k; p++)
      for (int64_t j = 0; j < n; j++) out[static_cast<size_t>(i * n + j)] += x[static_cast<size_t>(i * k + p)] * y[static_cast<size_t>(p * n + j)];
  return out;
}

void check(const Kind& kind, Size s, Layout a_layout, Layout b_layout, Layout c_layout) {
  std::mt19937 random(static_cast<unsigned>(s.m * 31 + s.n * 7 + s.k));
  const Buffer a(s.m, s.k, kind.dtype, a_layout, random), b(s.k, s.n, kind.dtype, b_layout, random);
  const Buffer before(s.m, s.n, accumulator(kind.dtype), c_layout, random);
  const std::vector<double> want = product(a, b, kind);
  DeviceStream stream;
  stream.math = kind.math;
  for (const bool add : {false, true}) {
    std::vector<double> sum = want;
    const std::vector<double> old = before.values();
    for (size_t i = 0; add && i < sum.size(); i++) sum[i] += old[i];
    for_every_timing([&] {
      const Buffer c = before.copy();
      gemm(a.view(), b.view(), c.view(), add, stream);
      report("gemm", kind.name, shape_of({s.m, s.k, s.n}), error_of(c.values(), sum), kind.bound);
      expect(c.same_padding(before), std::string("gemm wrote beside C, ") + kind.name + " " + shape_of({s.m, s.k, s.n}));
    });
  }
}

const std::vector<Size>& sizes() {
  static const std::vector<Size> quick = {{64, 64, 64}, {136, 90, 128}, {33, 70, 17}, {1, 1, 1}, {71, 96, 40}};
  static const std::vector<Size> all = {{64, 64, 64}, {136, 90, 128},  {33, 70, 17},   {1, 1, 1},    {1, 129, 257},
                                        {257, 31, 1}, {128, 128, 256}, {65, 200, 130}, {8, 1100, 8}, {120, 513, 40}};
  return full() ? all : quick;
}

void orientations() {
  for (const Kind& kind : kKinds)
    for (const Size& s : sizes())
      for (int which = 0; which < 8; which++)
        for (const int64_t pad : {0, 3, 8}) {
          if (!full() && pad != (s.m % 2 ? 3 : 8)) continue;
          const bool odd = pad == 3;
          check(kind, s, {(which & 1) != 0, pad, odd ? 1 : 0}, {(which & 2) != 0, pad, 0}, {(which & 4) != 0, pad, odd ? 1 : 0});
        }
}

double gelu(double z) { return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5))); }
double gelu_slope(double z) { return 0.5 * (1 + std::erf(z * std::sqrt(0.5))) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI); }
double silu(double z) { return z / (1 + std::exp(-z)); }
double silu_slope(double z) {
  const double s = 1 / (1 + std::exp(-z));
  return s + z * s * (1 - s);
}

void tail_of(const Kind& kind, Size s, Epilogue activation, bool gradient, bool with_c, bool column_major, int64_t pad) {
  std::mt19937 random(5);
  const Layout layout{column_major, pad, 0};
  const Buffer a(s.m, s.k, kind.dtype, {}, random), b(s.k, s.n, kind.dtype, {true, pad, 0}, random), bias(1, s.n, kind.dtype, {}, random);
  const Buffer residual(s.m, s.n, kind.dtype, layout, random), at(s.m, s.n, kind.dtype, layout, random);
  const Buffer c0(s.m, s.n, accumulator(kind.dtype), layout, random), z0(s.m, s.n, kind.dtype, layout, random);
  std::vector<double> sum = product(a, b, kind), z = sum, y = sum;
  const std::vector<double> shift = bias.values(), more = residual.values(), where = at.values(), old = c0.values();
  for (size_t i = 0; i < sum.size(); i++) {
    if (with_c) sum[i] += old[i];
    z[i] = sum[i] + (gradient ? 0 : shift[i % static_cast<size_t>(s.n)]);
    if (gradient)
      y[i] = z[i] * (activation == Epilogue::gelu ? gelu_slope(where[i]) : silu_slope(where[i]));
    else
      y[i] = (activation == Epilogue::gelu ? gelu(z[i]) : (activation == Epilogue::silu ? silu(z[i]) : z[i])) + more[i];
  }
  for (const bool device : {true, false}) {
    DeviceStream cuda;
    HostStream host;
    Stream& stream = device ? static_cast<Stream&>(cuda) : host;
    if (!device && kind.math == Math::tf32) continue;
    stream.math = kind.math;
    const Buffer c = c0.copy(), zs = z0.copy(), ys = z0.copy();
    Tail tail;
    tail.kind = activation;
    if (gradient)
      tail.slope_at = at.view();
    else
      tail.bias = bias.view(), tail.residual = residual.view(), tail.z = zs.view();
    tail.y = ys.view();
    gemm(a.view(), b.view(), with_c ? c.view() : Matrix{}, with_c, tail, stream);
    const std::string name = std::string(device ? "gemm+tail" : "gemm+tail (cpu)");
    if (with_c) report(name + " c", kind.name, shape_of({s.m, s.k, s.n}), error_of(c.values(), sum), kind.bound);
    if (!gradient) report(name + " z", kind.name, shape_of({s.m, s.k, s.n}), error_of(zs.values(), z), kind.stored);
    report(name + " y", kind.name, shape_of({s.m, s.k, s.n}), error_of(ys.values(), y), kind.stored);
    expect(ys.same_padding(z0) && zs.same_padding(z0) && c.same_padding(c0), "gemm's tail wrote beside its outputs");
  }
}

void tails() {
  for (const Kind& kind : kKinds)
    for (const Epilogue activation : {Epilogue::none, Epilogue::gelu, Epilogue::silu})
      for (int which = 0; which < 4; which++) {
        const bool gradient = activation != Epilogue::none && which % 2;
        tail_of(kind, {72, 96, 80}, activation, gradient, which < 2, false, 0);
        tail_of(kind, {37, 50, 29}, activation, gradient, which < 2, which == 0, which == 1 ? 5 : 0);
        if (full()) tail_of(kind, {16, 1200, 40}, activation, gradient, which < 2, which == 3, 8);
      }
}

// The large tile and the bank conflicts of every tile, kernels called as gemm.cu does.
template <class T, class Run>
void tile(const Kind& kind, Size s, Run run, bool a_along_k, bool b_along_k) {
  std::mt19937 random(9);
  const Buffer a(s.m, s.k, kind.dtype, {!a_along_k, 8, 0}, random), b(s.k, s.n, kind.dtype, {b_along_k, 8, 0}, random);
  const Buffer c(s.m, s.n, accumulator(kind.dtype), {}, random);
  cuda::Operands p{};
  p.a = a.view().data;
  p.b = b.view().data;
  p.lda = static_cast<int>(a_along_k ? a.view().row_stride : a.view().col_stride);
  p.ldb = static_cast<int>(b_along_k ? b.view().col_stride : b.view().row_stride);
  p.a_along_k = a_along_k;
  p.b_along_k = b_along_k;
  p.aligned = true;
  p.m = s.m, p.n = s.n, p.k = p.piece = s.k;
  cuda::Store<T> to;
  to.c = cuda::View<cuda::Wide<T>>(c.view());
  to.aligned = true;
  DeviceStream stream;
  stream.math = kind.math;
  shim::reset_conflicts();
  run(p, to, stream);
  report("gemm, chosen tile", kind.name, shape_of({s.m, s.k, s.n}), error_of(c.values(), product(a, b, kind)), kind.bound);
  for (const shim::Access access : {shim::Access::load, shim::Access::store, shim::Access::copy, shim::Access::matrix})
    expect(shim::conflicts(access).worst <= 1, std::string("bank conflicts of gemm ") + kind.name + ": access " +
                                                   std::to_string(static_cast<int>(access)) + " is served in " +
                                                   std::to_string(shim::conflicts(access).worst) + " passes");
}

void chosen_tiles() {
  for (int which = 0; which < 4; which++) {
    const bool ak = which & 1, bk = which & 2;
    for (const cuda::TileSize size : {cuda::TileSize::small, cuda::TileSize::large}) {
      const Size s = full() ? Size{256, 328, 512} : Size{128, 136, 256};
      for_every_timing([&] {
        tile<cuda::Bf16>(kKinds[0], s, [&](auto& p, auto& to, auto& stream) { cuda::gemm_bf16(p, to, size, stream); }, ak, bk);
        tile<cuda::F16>(kKinds[1], s, [&](auto& p, auto& to, auto& stream) { cuda::gemm_f16(p, to, size, stream); }, ak, bk);
        tile<float>(kKinds[2], s, [&](auto& p, auto& to, auto& stream) { cuda::gemm_tf32(p, to, size, stream); }, ak, bk);
      });
    }
    tile<float>(kKinds[3], {128, 72, 256}, [&](auto& p, auto& to, auto& stream) { cuda::gemm_plain(p, to, stream); }, ak, bk);
    tile<double>(kKinds[4], {128, 72, 64}, [&](auto& p, auto& to, auto& stream) { cuda::gemm_plain(p, to, stream); }, ak, bk);
  }
}

void refusals() {
  std::mt19937 random(1);
  const Buffer a(4, 5, DType::f32, {}, random), b(6, 4, DType::f32, {}, random), c(4, 4, DType::f32, {}, random);
  bool refused = false;
  try {
    gemm(a.view(), b.view(), c.view(), false, DeviceStream());
  } catch (const ShapeError&) {
    refused = true;
  }
  expect(refused, "gemm of [4,5] and [6,4] was not refused");
  const Buffer empty(4, 0, DType::f32, {}, random), none(0, 4, DType::f32, {}, random);
  gemm(empty.view(), none.view(), c.view(), false, DeviceStream());
  report("gemm", "f32", "4x0x4", error_of(c.values(), std::vector<double>(16, 0.0)), 0);
}

const Register all[] = {{"gemm tiles", chosen_tiles}, {"gemm orientations", orientations}, {"gemm tails", tails}, {"gemm refusals", refusals}};

}  // namespace
}  // namespace gingham::tests
