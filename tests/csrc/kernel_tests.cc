// Kernels of layers on the CPU, in float64 and where numbers end: gelu over all of its range, norms of rows far from zero, the loss of rows
// with infinities and NaN.
#include <cmath>
#include <limits>

#include "core_tests.h"
#include "kernels/cross_entropy.h"
#include "kernels/epilogue.h"
#include "kernels/layer_norm.h"

namespace gingham {
namespace {

const CpuStream kHere;
constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

Matrix row_of(std::vector<float>& values) { return dense(values.data(), 1, static_cast<int64_t>(values.size()), DType::f32); }

void gelu_is_right_everywhere() {
  std::vector<float> z{0, -0.f, 1e-30f, 1e30f, -1e30f, -100, kInfinity, kNan};
  const size_t special = z.size();
  for (int i = -12000; i <= 12000; i++) z.push_back(static_cast<float>(i) / 1000);
  std::vector<float> y(z.size()), slope(z.size()), ones(z.size(), 1);
  Tail tail;
  tail.kind = Epilogue::gelu;
  tail.y = row_of(y);
  epilogue(row_of(z), tail, kHere);
  gelu_backward(row_of(ones), row_of(z), row_of(slope), kHere);
  for (size_t i = 0; i < z.size(); i++) {
    const double x = static_cast<double>(z[i]), phi = 0.5 * (1 + std::erf(x * std::sqrt(0.5)));
    if (std::isnan(x)) {
      EXPECT(std::isnan(y[i]) && std::isnan(slope[i]));
      continue;
    }
    if (std::isinf(x)) {
      EXPECT(y[i] == kInfinity && slope[i] == 1);
      continue;
    }
    const double wanted = x * phi, wanted_slope = phi + x * std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
    EXPECT(std::fabs(static_cast<double>(y[i]) - wanted) <= 4e-7 * std::fmax(1, std::fabs(wanted)));
    EXPECT(std::fabs(static_cast<double>(slope[i]) - wanted_slope) <= 4e-7);
    if (i < special && std::fabs(x) < 1) EXPECT(std::fabs(static_cast<double>(y[i]) - 0.5 * x) <= 1e-7 * std::fabs(x));
  }
}

// Rows of 1 to 700 numbers, so that each kernel's ends are met, at an offset that leaves float32 three digits of them.
void norms_keep_their_digits_far_from_zero() {
  for (const int64_t n : {1, 7, 16, 31, 256, 273, 700}) {
    std::vector<float> x, y(static_cast<size_t>(n));
    for (int64_t j = 0; j < n; j++) x.push_back(8192.f + static_cast<float>((j * 37) % 64) / 64);
    double mean = 0, square = 0, pair[2];
    for (const float v : x) mean += static_cast<double>(v) / static_cast<double>(n);
    for (const float v : x) square += (static_cast<double>(v) - mean) * (static_cast<double>(v) - mean);
    const Norm norm{dense(pair, 1, 2, DType::f64), n, 1e-5, {}, {}, true};
    layer_norm_whole(row_of(x), norm, row_of(y), kHere);
    EXPECT(std::fabs(pair[0] - mean) <= 1e-11 && std::fabs(pair[1] - square) <= 1e-9);
    const double rstd = 1 / std::sqrt(square / static_cast<double>(n) + 1e-5);
    for (size_t j = 0; j < x.size(); j++) EXPECT(std::fabs(static_cast<double>(y[j]) - (static_cast<double>(x[j]) - mean) * rstd) <= 2e-6);
  }
}

double loss_of(std::vector<float> logits, int64_t id, double smoothing = 0) {
  const int64_t n = static_cast<int64_t>(logits.size());
  double all[4], loss = 0;
  const Targets targets{&id, -100, 0, n, smoothing};
  const Matrix maxima = dense(all, 1, 1, DType::f64), pieces = dense(all + 1, 1, 3, DType::f64);
  softmax_parts(row_of(logits), targets, maxima, pieces, kHere);
  losses(pieces, targets, dense(&loss, 1, 1, DType::f64), kHere);
  return loss;
}

void losses_of_rows_with_what_is_no_number() {
  for (const size_t n : {2, 15, 16, 40, 300}) {
    std::vector<float> row(n, 50);
    EXPECT(std::fabs(loss_of(row, 0) - std::log(static_cast<double>(n))) <= 1e-6);
    EXPECT(std::fabs(loss_of(row, 0, 0.1) - std::log(static_cast<double>(n))) <= 1e-6);
    row[n - 1] = -kInfinity;  // a masked class
    EXPECT(std::fabs(loss_of(row, 0) - std::log(static_cast<double>(n - 1))) <= 1e-6 && std::isinf(loss_of(row, static_cast<int64_t>(n) - 1)));
    for (const size_t at : {size_t{0}, n - 1}) {
      std::vector<float> broken(n, 50);
      broken[at] = kNan;
      EXPECT(std::isnan(loss_of(broken, 1)));
      broken[at] = kInfinity;
      EXPECT(std::isnan(loss_of(broken, 1)));
    }
    EXPECT(std::isnan(loss_of(std::vector<float>(n, -kInfinity), 0)) && loss_of(row, -100) == 0);
  }
}

}  // namespace

std::vector<Test> kernel_tests() {
  return {{"gelu is right everywhere", gelu_is_right_everywhere},
          {"norms keep their digits far from zero", norms_keep_their_digits_far_from_zero},
          {"losses of rows with what is no number", losses_of_rows_with_what_is_no_number}};
}

}  // namespace gingham
