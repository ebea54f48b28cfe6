// What layers need besides products: layer_norm, cross_entropy, embedding, on the device and on the host, against float64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernel_tests.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/indices.h"
#include "kernels/layer_norm.h"

namespace gingham::tests {
namespace {

const DType kReal[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

double rounding(DType dtype) {
  const double all[] = {5e-7, 1e-14, 4e-3, 5e-4};
  return all[static_cast<int>(dtype)];
}

struct Size {
  int64_t rows, cols;
};
const Size kSizes[] = {{5, 64}, {7, 37}, {3, 600}, {1, 1}, {300, 24}};
const Layout kLayouts[] = {{false, 0, 0}, {false, 8, 8}, {false, 3, 1}};

// Both devices in turn, with a suffix for the table.
void on_both(const std::function<void(const Stream&, const std::string&)>& body) {
  body(DeviceStream(), "");
  body(HostStream(), " (cpu)");
}

// What a norm of rows gives, in float64.
struct NormTwin {
  std::vector<double> statistics, y, dx, dgamma, dbeta;

  NormTwin(const Buffer& x, const Buffer& slope, const Buffer& gamma, const Buffer& beta, double eps, bool centred)
      : y(x.values()), dx(y), dgamma(gamma.values().size(), 0.0), dbeta(dgamma) {
    const std::vector<double> in = x.values(), grad = slope.values(), scale = gamma.values(), shift = beta.values();
    const size_t n = scale.size();
    const double count = static_cast<double>(n);
    for (size_t i = 0; i < in.size() / n; i++) {
      double mean = 0, m2 = 0, g_sum = 0, gx_sum = 0;
      for (size_t j = 0; j < n && centred; j++) mean += in[i * n + j] / count;
      for (size_t j = 0; j < n; j++) m2 += (in[i * n + j] - mean) * (in[i * n + j] - mean);
      const double rstd = 1 / std::sqrt(m2 / count + eps);
      statistics.insert(statistics.end(), {mean, m2});
      const auto g = [&](size_t j) { return grad[i * n + j] * scale[j]; };
      const auto xhat = [&](size_t j) { return (in[i * n + j] - mean) * rstd; };
      for (size_t j = 0; j < n; j++) {
        g_sum += centred ? g(j) : 0;
        gx_sum += g(j) * xhat(j);
        dgamma[j] += grad[i * n + j] * xhat(j);
        dbeta[j] += grad[i * n + j];
        y[i * n + j] = xhat(j) * scale[j] + shift[j];
      }
      for (size_t j = 0; j < n; j++) dx[i * n + j] = rstd * (g(j) - (g_sum + xhat(j) * gx_sum) / count);
    }
  }
};

// Where a norm's results go.
struct NormResults {
  Buffer statistics, y, dx, dgamma, dbeta;

  NormResults(const Buffer& x, std::mt19937& random)
      : statistics(x.view().rows, 2, DType::f64, {}, random),
        y(x.copy()),
        dx(x.copy()),
        dgamma(1, x.view().cols, accumulator(x.view().dtype), {}, random),
        dbeta(dgamma.copy()) {}
  NormWeights weights() const { return {dgamma.view(), dbeta.view()}; }
  void compare(const std::string& name, const std::string& where, const NormTwin& want) const {
    const DType dtype = y.view().dtype;
    const bool wide = dtype == DType::f64, lone = y.view().cols == 1;
    // A lone column normalises to nothing: its gradient is all rounding.
    const double bound = rounding(dtype) * (lone ? 1e6 : wide ? 100 : 4);
    const std::string type = name_of(dtype), shape = shape_of({y.view().rows, y.view().cols});
    report(name + ": statistics" + where, type, shape, error_of(statistics.values(), want.statistics), wide ? 1e-12 : 1e-6);
    report(name + where, type, shape, error_of(y.values(), want.y), bound);
    report(name + "_backward" + where, type, shape, error_of(dx.values(), want.dx), bound);
    report(name + "_weights" + where, type, shape, error_of(dgamma.values(), want.dgamma), wide ? 1e-12 : lone ? 1 : 5e-6);
    report(name + "_weights, dbeta" + where, type, shape, error_of(dbeta.values(), want.dbeta), wide ? 1e-12 : 5e-6);
    expect(y.same_padding(dx), name + " wrote beside its output");
  }
};

// Columns cut in two, as over two ranks, and rows that lie whole in one place: some in the registers of a block, of a few threads or of all,
// with packs or with single elements, others too long for them.
void layer_norms() {
  std::mt19937 random(3);
  std::vector<Size> sizes(std::begin(kSizes), std::end(kSizes));
  sizes.insert(sizes.end(), {{3, 1032}, {2, 16392}, {3, 2057}, {600, 72}});
  for (const DType dtype : kReal)
    for (const Size& s : sizes)
      for (const auto& [offset, centred] : {std::pair{0.0, true}, {100.0, true}, {1.0, false}})
        on_both([&, offset = offset, centred = centred](const Stream& stream, const std::string& where) {
          const Layout layout = kLayouts[s.rows % 3];
          const Buffer x(s.rows, s.cols, dtype, layout, random), dy(s.rows, s.cols, dtype, layout, random);
          for (int64_t i = 0; i < s.rows; i++)
            for (int64_t j = 0; j < s.cols; j++) store(x.view(), i, j, load(x.view(), i, j) + offset);
          const Buffer gamma(1, s.cols, dtype, {}, random), beta(1, s.cols, dtype, {}, random);
          const NormTwin twin(x, dy, gamma, beta, 1e-5, centred);
          const NormResults cut(x, random), whole(x, random);
          const Buffer left(s.rows, 2, DType::f64, {}, random), pieces = left.copy(), alone = whole.dgamma.copy();
          const int64_t half = s.cols / 2;
          row_statistics(x.view().slice(1, 0, half), centred, left.view(), stream);
          row_statistics(x.view().slice(1, half, s.cols), centred, cut.statistics.view(), stream);
          merge_statistics(left.view(), half, cut.statistics.view(), s.cols - half, stream);
          Norm norm{cut.statistics.view(), s.cols, 1e-5, gamma.view(), beta.view(), centred};
          layer_norm(x.view(), norm, cut.y.view(), stream);
          layer_norm_pieces(dy.view(), x.view(), norm, pieces.view(), stream);
          layer_norm_backward(dy.view(), x.view(), norm, pieces.view(), cut.dx.view(), stream);
          layer_norm_weights(dy.view(), x.view(), norm, cut.weights(), stream);
          cut.compare(centred ? "layer_norm" : "rms_norm", where, twin);
          norm.statistics = whole.statistics.view();
          layer_norm_whole(x.view(), norm, whole.y.view(), stream);
          layer_norm_whole_backward(dy.view(), x.view(), norm, whole.dx.view(), whole.weights(), stream);
          layer_norm_whole_backward(dy.view(), x.view(), norm, {}, {alone.view(), {}}, stream);
          whole.compare(centred ? "layer_norm_whole" : "rms_norm_whole", where, twin);
          expect(alone.values() == whole.dgamma.values(), "layer_norm_whole_backward: dgamma alone is another");
        });
}

// Joins what two ranks have of the same rows, the second from column `half` on, into the first's.
void join_parts(const Buffer& maxima, const Buffer& pieces, const Buffer& more_maxima, const Buffer& more, const std::vector<int64_t>& ids,
                int64_t half, int64_t cols, bool smooth) {
  for (int64_t i = 0; i < maxima.view().rows; i++) {
    const double own = load(maxima.view(), i, 0), other = load(more_maxima.view(), i, 0), top = std::max(own, other);
    const int64_t id = ids[static_cast<size_t>(i)];
    const double factors[] = {half > 0 ? std::exp(own - top) : 0, std::exp(other - top)};
    store(pieces.view(), i, 0, load(pieces.view(), i, 0) * factors[0] + load(more.view(), i, 0) * factors[1]);
    store(pieces.view(), i, 1, id < 0 ? 0 : id < half ? load(pieces.view(), i, 1) + own - top : load(more.view(), i, 1) + other - top);
    const double left = half > 0 ? load(pieces.view(), i, 2) + static_cast<double>(half) * (own - top) : 0;
    store(pieces.view(), i, 2, smooth ? left + load(more.view(), i, 2) + static_cast<double>(cols - half) * (other - top) : 0);
    store(maxima.view(), i, 0, top);
  }
}

// Rows of an odd length, whose 16-byte boundaries lie elsewhere in each, long ones, and gradients that do not stand as the logits do.
void cross_entropies() {
  std::mt19937 random(4);
  std::vector<Size> sizes(std::begin(kSizes), std::end(kSizes));
  sizes.insert(sizes.end(), {{3, 17001}, {2, 9000}, {9, 5}});
  for (const DType dtype : kReal)
    for (const Size& s : sizes)
      for (const double smoothing : {0.0, 0.1})
        on_both([&](const Stream& stream, const std::string& where) {
          const Layout layout = kLayouts[s.cols % 3];
          const bool apart = smoothing > 0 && s.cols % 2 == 0;
          const Buffer logits(s.rows, s.cols, dtype, apart && s.rows == 2 ? Layout{true, 0, 0} : layout, random);
          const Buffer gradient = apart ? Buffer(s.rows, s.cols, dtype, {false, 5, 3}, random) : logits.copy(), beside_it = gradient.copy();
          for (int64_t i = 0; i < s.rows; i++)
            for (int64_t j = 0; j < s.cols; j++) store(logits.view(), i, j, 8 * load(logits.view(), i, j) + 50);
          std::vector<int64_t> ids;
          for (int64_t i = 0; i < s.rows; i++) ids.push_back(i % 4 == 3 ? -100 : static_cast<int64_t>(random() % static_cast<unsigned>(s.cols)));
          const int64_t half = s.cols / 2;
          const Buffer maxima(s.rows, 1, DType::f64, {}, random), other = maxima.copy(), pieces(s.rows, 3, DType::f64, {}, random),
                                                                  more = pieces.copy();
          Targets here{ids.data(), -100, 0, s.cols, smoothing}, there = here;
          there.first = half;
          const Matrix l = logits.view().slice(1, 0, half), r = logits.view().slice(1, half, s.cols);
          softmax_parts(l, here, maxima.view(), pieces.view(), stream);
          softmax_parts(r, there, other.view(), more.view(), stream);
          join_parts(maxima, pieces, other, more, ids, half, s.cols, smoothing > 0);
          const Buffer loss(s.rows, 1, DType::f64, {}, random), counted(s.rows, 2, DType::f64, {}, random);
          losses(pieces.view(), here, loss.view(), stream);
          losses(pieces.view(), here, counted.view(), stream);
          // one scale for all rows, then each row's own
          const Buffer scales(s.cols % 2 ? 1 : s.rows, 1, DType::f64, {}, random);
          softmax_gradient(l, maxima.view(), pieces.view(), here, scales.view(), gradient.view().slice(1, 0, half), stream);
          softmax_gradient(r, maxima.view(), pieces.view(), there, scales.view(), gradient.view().slice(1, half, s.cols), stream);
          const std::vector<double> by = scales.values(), beside = counted.values();
          std::vector<double> x = logits.values(), want_loss, want_gradient(x.size(), 0.0);
          const size_t n = static_cast<size_t>(s.cols);
          for (size_t i = 0; i < ids.size(); i++) {
            double sum = 0, value = 0;
            for (size_t j = 0; j < n; j++) sum += std::exp(x[i * n + j] - 50);
            for (size_t j = 0; j < n; j++) {
              const double q = (static_cast<int64_t>(j) == ids[i] ? 1 - smoothing : 0) + smoothing / static_cast<double>(n);
              value -= q * (x[i * n + j] - 50 - std::log(sum));
              want_gradient[i * n + j] = ids[i] == -100 ? 0 : by[by.size() == 1 ? 0 : i] * (std::exp(x[i * n + j] - 50) / sum - q);
            }
            want_loss.push_back(ids[i] == -100 ? 0 : value);
            expect(beside[2 * i] == loss.values()[i] && beside[2 * i + 1] == (ids[i] == -100 ? 0 : 1), "losses: what counts is miscounted");
          }
          const std::string shape = shape_of({s.rows, s.cols}), type = name_of(dtype);
          std::vector<double> got_loss = loss.values();
          for (size_t i = 0; i < want_loss.size(); i++) got_loss[i]++, want_loss[i]++;  // a lone column's loss is nothing but rounding
          report("cross_entropy" + where, type, shape, error_of(got_loss, want_loss), dtype == DType::f64 ? 1e-12 : 2e-6);
          report("softmax_gradient" + where, type, shape, error_of(gradient.values(), want_gradient), 4 * rounding(dtype) + 1e-12);
          expect(gradient.same_padding(beside_it), "softmax_gradient wrote beside its output");
        });
}

// Masked classes, and what is no number: as on the CPU (tests/csrc/kernel_tests.cc).
void odd_losses() {
  std::mt19937 random(6);
  constexpr double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : kReal)
    for (const int64_t n : {2, 77, 9001})
      on_both([&](const Stream& stream, const std::string& where) {
        const auto loss_of = [&](double all, double at_end, int64_t id) {
          const Buffer row(1, n, dtype, {}, random), maxima(1, 1, DType::f64, {}, random), pieces(1, 3, DType::f64, {}, random), loss = maxima.copy();
          for (int64_t j = 0; j < n; j++) store(row.view(), 0, j, j == n - 1 ? at_end : all);
          const Targets targets{&id, -100, 0, n, 0};
          softmax_parts(row.view(), targets, maxima.view(), pieces.view(), stream);
          losses(pieces.view(), targets, loss.view(), stream);
          return loss.values()[0];
        };
        const std::string name = "cross_entropy of " + std::to_string(n) + " " + name_of(dtype) + where;
        expect(std::fabs(loss_of(50, -infinity, 0) - std::log(static_cast<double>(n - 1))) <= 1e-6, name + ": a masked class counts");
        expect(std::isinf(loss_of(50, -infinity, n - 1)), name + ": a masked target has a finite loss");
        expect(std::isnan(loss_of(50, nan, 0)) && std::isnan(loss_of(50, infinity, 0)), name + ": what is no number is lost");
        expect(std::isnan(loss_of(-infinity, -infinity, 0)), name + ": a row without classes has a loss");
        const int64_t beside = 0;
        const Buffer masked(1, n, dtype, {}, random), maxima(1, 1, DType::f64, {}, random), pieces(1, 3, DType::f64, {}, random);
        for (int64_t j = 0; j < n; j++) store(masked.view(), 0, j, -infinity);
        softmax_parts(masked.view(), {&beside, -100, 5, n + 5, 0}, maxima.view(), pieces.view(), stream);
        expect(load(maxima.view(), 0, 0) == -infinity && load(pieces.view(), 0, 0) == 0, name + ": masked columns of a row count");
        expect(loss_of(50, nan, -100) == 0, name + ": an ignored row has a loss");
        expect(std::isnan(loss_of(50, 50, n)) && std::isnan(loss_of(50, 50, -1)), name + ": a target that is no class has a loss");
      });
}

void gathered() {
  std::mt19937 random(5);
  for (const DType dtype : kReal)
    for (const Size& s : kSizes)
      on_both([&](const Stream& stream, const std::string& where) {
        const int64_t vocabulary = 9;
        const Layout layout = kLayouts[s.cols % 3];
        const Buffer table(vocabulary, s.cols, dtype, layout, random), out(s.rows, s.cols, dtype, layout, random), beside = out.copy();
        std::vector<int64_t> ids;
        for (int64_t i = 0; i < s.rows; i++) ids.push_back(static_cast<int64_t>(random() % 13) - 2);
        gather_rows(table.view(), ids.data(), out.view(), stream);
        std::vector<double> want(static_cast<size_t>(s.rows * s.cols), 0.0), got = out.values();
        for (int64_t i = 0; i < s.rows; i++)
          for (int64_t j = 0; j < s.cols; j++) {
            const int64_t id = ids[static_cast<size_t>(i)];
            const size_t at = static_cast<size_t>(i * s.cols + j);
            const bool there = id >= 0 && id < vocabulary;
            expect(there || std::isnan(got[at]), "gather_rows of an id that is none gives a number");
            if (there) want[at] = load(table.view(), id, j);
            if (!there) got[at] = 0;
          }
        report("gather_rows" + where, name_of(dtype), shape_of({s.rows, s.cols}), error_of(got, want), 0);
        expect(out.same_padding(beside), "gather_rows wrote beside its output");
      });
}

// Of a table with the ids 20 to 28, and some others: at random; one alone; runs that end before, at and behind the border of every 32 positions.
std::vector<int64_t> ids_of(int64_t rows, int kind, std::mt19937& random) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t run = 29 + kind;  // 31, 32, 33
    ids.push_back(kind == 0 ? 18 + static_cast<int64_t>(random() % 13) : kind == 1 ? 23 : 20 + std::min<int64_t>(i / run, 8));
  }
  if (kind > 1) std::shuffle(ids.begin(), ids.end(), random);
  return ids;
}

void scattered() {
  std::mt19937 random(9);
  constexpr int64_t vocabulary = 9, first = 20;
  for (const DType dtype : kReal)
    for (const Size& s : {Size{1, 1}, Size{7, 37}, Size{32, 600}, Size{33, 40}, Size{65, 64}, Size{161, 16}, Size{300, 24}, Size{300, 7}})
      for (int kind = 0; kind < 5; kind++) {
        const Layout layout = kLayouts[s.cols % 3];
        const Buffer dy(s.rows, s.cols, dtype, layout, random), before(vocabulary, s.cols, accumulator(dtype), layout, random);
        const std::vector<int64_t> ids = ids_of(s.rows, kind, random);
        std::vector<int64_t> order, sorted;
        for (int64_t i = 0; i < s.rows; i++) order.push_back(i);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[static_cast<size_t>(a)] < ids[static_cast<size_t>(b)]; });
        for (const int64_t i : order) sorted.push_back(ids[static_cast<size_t>(i)]);
        const Places places{sorted.data(), order.data(), first, kind == 0 ? 24 : -1};
        std::vector<double> want(static_cast<size_t>(vocabulary * s.cols), 0.0);
        for (int64_t i = 0; i < s.rows; i++)
          for (int64_t j = 0; j < s.cols; j++) {
            const int64_t id = ids[static_cast<size_t>(i)];
            if (id >= first && id < first + vocabulary && id != places.skipped)
              want[static_cast<size_t>((id - first) * s.cols + j)] += load(dy.view(), i, j);
          }
        on_both([&](const Stream& stream, const std::string& where) {
          const Buffer table = before.copy(), again = before.copy();
          scatter_rows(dy.view(), places, table.view(), stream);
          // the host may leave the ids as they come
          scatter_rows(dy.view(), where.empty() ? places : Places{ids.data(), nullptr, first, places.skipped}, again.view(), stream);
          const std::string shape = shape_of({s.rows, s.cols});
          report("scatter_rows" + where, name_of(dtype), shape, error_of(table.values(), want), dtype == DType::f64 ? 1e-14 : 1e-6);
          report("scatter_rows, again" + where, name_of(dtype), shape, error_of(again.values(), table.values()), 0);
          expect(table.same_padding(before), "scatter_rows wrote beside its output");
        });
      }
}

void wrong_indices() {
  std::mt19937 random(3);
  constexpr int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  on_both([&](const Stream& stream, const std::string& where) {
    const auto look = [&](const std::vector<int64_t>& ids, int64_t ignored, const std::vector<int64_t>& want) {
      const std::vector<int64_t> exact(ids);  // of its own size, so that a read behind the last is seen
      int64_t found[3] = {-7, -7, -7};
      find_wrong(exact.data(), static_cast<int64_t>(exact.size()), 10, ignored, found, stream);
      const bool right = want.empty() ? found[2] == 0 : std::equal(want.begin(), want.end(), found);
      expect(right, "find_wrong" + where + " of " + std::to_string(ids.size()) + " found " + std::to_string(found[0]) + ".." +
                        std::to_string(found[1]) + ", " + std::to_string(found[2]));
    };
    look({}, -100, {});
    look({0, 9, -100}, -100, {});
    look({0, 9, -100}, 0, {-100, -100, 1});
    look({10, 3, -1}, 0, {-1, 10, 2});
    look({least, most, 5}, -100, {least, most, 2});
    for (const size_t count : {31, 1023, 1024, 1025, 5003}) {
      std::vector<int64_t> ids;
      for (size_t i = 0; i < count; i++) ids.push_back(static_cast<int64_t>(random() % 10));
      look(ids, -100, {});
      ids.front() = 12;
      ids.back() = 1000;
      ids[count / 2] = -3;
      look(ids, -100, {-3, 1000, 3});
      look(ids, -3, {12, 1000, 2});
    }
  });
}

const Register all[] = {{"layer_norm", layer_norms},     {"cross_entropy", cross_entropies}, {"cross_entropy, odd", odd_losses},
                        {"embedding, gather", gathered}, {"embedding, scatter", scattered},  {"indices", wrong_indices}};

}  // namespace
}  // namespace gingham::tests
