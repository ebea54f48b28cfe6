// Y = X W, its two gradients and the fused backward on a grid of threads or processes. Ranks are numbered (k, n, m) row-major; blocks are
// cut as docs/theory.md section 1 says. Data are small integers, so that every sum is exact in fp32 and the check is equality; sums of 16-bit
// operands are added and travel in fp32, so that a result in 16 bits is the exact sum rounded once.
#include <algorithm>
#include <cmath>

#include "cases.h"
#include "collectives/resident.h"
#include "kernels/cast.h"
#include "kernels/gemm.h"
#include "numbers.h"
#include "ops/step.h"

namespace gingham {
namespace {

double element(int64_t i, int64_t j, uint64_t seed, bool fractions) {
  uint64_t h =
      (static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15ull) ^ (static_cast<uint64_t>(j) * 0xC2B2AE3D27D4EB4Full) ^ (seed * 0x165667B19E3779F9ull);
  h ^= h >> 29;
  h *= 0xBF58476D1CE4E5B9ull;
  h ^= h >> 32;
  return fractions ? static_cast<double>(h % 10007) / 7 : static_cast<double>(h % 7) - 3;
}

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

Span part(Span whole, int parts, int index) {
  const std::vector<int64_t> cuts = chunk(whole.size(), parts);
  return {whole.begin + cuts[static_cast<size_t>(index)], whole.begin + cuts[static_cast<size_t>(index) + 1]};
}

// A matrix of the shared heap holding rows x cols of the global matrix of that seed; stored column-major where `order` says so.
class Block {
 public:
  Block(Job& job, Span rows, Span cols, const Options& o, uint64_t seed, Storage storage = Storage::row_major)
      : room_(job, rows.size(), cols.size(), o.dtype, storage == Storage::column_major) {
    for (int64_t i = 0; seed && i < rows.size(); i++)
      for (int64_t j = 0; j < cols.size(); j++) store(host(), at(i, j), element(rows.begin + i, cols.begin + j, seed, o.fractions));
    room_.upload();
  }
  const Matrix& view() const { return room_.view(); }
  const Matrix& host() const { return room_.host(); }
  void fetch() const { room_.download(); }
  int64_t differing(const Block& other) const {
    int64_t wrong = 0;
    for (int64_t i = 0; i < host().rows; i++)
      for (int64_t j = 0; j < host().cols; j++) wrong += !(load(host(), at(i, j)) == load(other.host(), other.at(i, j)));
    return wrong;
  }

 private:
  int64_t at(int64_t i, int64_t j) const { return i * host().row_stride + j * host().col_stride; }
  Room room_;
};

// One rank's place on the grid in effective axes (swapped: n and k trade places).
struct Place {
  int im, ik, in, pk, pn;
  Span m, k, n;          // of the block
  Span x_k, w_cut, y_n;  // the further cuts
  std::vector<int64_t> x_cuts, w_cuts, y_cuts;
};

Place place_of(const Options& o, int rank) {
  const auto [pm, pn, pk] = o.grid;
  Place p;
  p.im = rank % pm;
  const int in = rank / pm % pn, ik = rank / (pm * pn);
  p.in = o.swapped ? ik : in;
  p.ik = o.swapped ? in : ik;
  p.pn = o.swapped ? pk : pn;
  p.pk = o.swapped ? pn : pk;
  p.m = part({0, o.m}, pm, p.im);
  p.k = part({0, o.k}, p.pk, p.ik);
  p.n = part({0, o.n}, p.pn, p.in);
  p.x_k = part(p.k, p.pn, p.in);
  p.y_n = part(p.n, p.pk, p.ik);
  p.w_cut = part(o.swapped ? p.n : p.k, pm, p.im);
  p.x_cuts = chunk(p.k.size(), p.pn);
  p.y_cuts = chunk(p.n.size(), p.pk);
  p.w_cuts = chunk((o.swapped ? p.n : p.k).size(), pm);
  return p;
}

struct Axes {
  std::unique_ptr<Axis> k, n, m;
  Axes(Job& job, Program& program, const Options& o) {
    const auto [pm, pn, pk] = o.grid;
    const int im = job.rank() % pm, in = job.rank() / pm % pn, ik = job.rank() / (pm * pn);
    std::vector<int> ks, ns, ms;
    for (int i = 0; i < pk; i++) ks.push_back((i * pn + in) * pm + im);
    for (int i = 0; i < pn; i++) ns.push_back((ik * pn + i) * pm + im);
    for (int i = 0; i < pm; i++) ms.push_back((ik * pn + in) * pm + i);
    k = as_asked(job.axis(program, 0, ks, o.source == Source::window, o.latency, o.bandwidth), o);
    n = as_asked(job.axis(program, 1, ns, o.source == Source::window, o.latency, o.bandwidth), o);
    m = as_asked(job.axis(program, 2, ms, o.source == Source::window, o.latency, o.bandwidth), o);
  }
  Traffic take() {
    Traffic sum;
    for (Axis* t : {k.get(), n.get(), m.get()}) {
      const Traffic one = t->traffic(true);
      sum.bytes_received += one.bytes_received;
      sum.bytes_crossed += one.bytes_crossed;
      sum.messages += one.messages;
    }
    return sum;
  }
};

// Bytes received by all ranks in one product (or the fused backward, which gathers dY once): panels in the operands' type, partial sums in
// their accumulator.
double bytes_of(const Options& o) {
  const double x = static_cast<double>(o.m) * static_cast<double>(o.k), w = static_cast<double>(o.k) * static_cast<double>(o.n),
               y = static_cast<double>(o.m) * static_cast<double>(o.n);
  const double pm = o.grid[0] - 1, pn = (o.swapped ? o.grid[2] : o.grid[1]) - 1, pk = (o.swapped ? o.grid[1] : o.grid[2]) - 1;
  const double panel = static_cast<double>(size_of(o.dtype)), sum = static_cast<double>(size_of(accumulator(o.dtype)));
  const bool dx = o.name == "dx" || o.name == "backward", dw = o.name == "dw" || o.name == "backward";
  const double panels = (o.name != "dx") * x * pn + (o.name != "dw") * w * pm + (o.name != "matmul") * y * pk;
  return panels * panel + (dx * x * pn + dw * w * pm + (o.name == "matmul") * y * pk) * sum;
}

Step::Config config_of(const Options& o, const Place& p, const Axes& axes) {
  Axis* over_x = o.swapped ? axes.k.get() : axes.n.get();
  Axis* over_y = o.swapped ? axes.n.get() : axes.k.get();
  Step::Config config;
  config.name = "bench";
  config.x = {over_x, 1, p.x_cuts, false};
  config.maps = {{{axes.m.get(), o.swapped ? 1 : 0, p.w_cuts, false}, {over_y, 1, p.y_cuts, false}, o.n}};
  config.slice_dim = o.swapped ? Dim::N : Dim::K;
  config.k = o.k;
  config.slices = o.slices;
  config.storage = Storage::column_major;
  config.grid = o.grid;
  return config;
}

// The seeds of two factors, and which of them is stored transposed.
struct Product {
  uint64_t a, b;
  bool a_turned, b_turned;
};

// Elements of the rank's result that differ from the exact product, rounded to the result's type.
double differing(Job& job, const Options& o, const Block& got, Span rows, Span inner, Span cols, Product of) {
  const Block left = of.a_turned ? Block(job, inner, rows, o, of.a) : Block(job, rows, inner, o, of.a);
  const Block right = of.b_turned ? Block(job, cols, inner, o, of.b) : Block(job, inner, cols, o, of.b);
  const Block expected(job, rows, cols, o, 0);
  const Scratch room(job.host_stream(), static_cast<size_t>(rows.size() * cols.size()) * size_of(accumulator(o.dtype)));
  const Matrix sum = dense(room.data(), rows.size(), cols.size(), accumulator(o.dtype));
  gemm(of.a_turned ? left.host().t() : left.host(), of.b_turned ? right.host().t() : right.host(), sum, false, job.host_stream());
  cast(sum, expected.host(), job.host_stream());
  got.fetch();
  return static_cast<double>(got.differing(expected));
}

// Gathers W before a call, as the caller's stream has just written it, into memory that the last round has not left right.
class Ahead {
 public:
  Ahead(Job& job, Step& step, const Options& o, Span w_rows, Span w_cols)
      : job_(job), step_(step), o_(o), late_(job, w_rows, w_cols, o, 0, Storage::column_major) {}
  EarlyWeights* gather(const Matrix& w) {
    fill_zero(late_.view().t(), job_.stream());
    for (const auto& room : rooms_) fill_zero(room->view(), job_.stream());
    if (o_.delay) o_.delay(job_);
    cast(w, late_.view(), job_.stream());
    size_t used = 0;
    early_ = step_.early({late_.view()}, [&](int64_t rows, int64_t cols) {
      if (used == rooms_.size()) rooms_.push_back(std::make_unique<Room>(job_, rows, cols, o_.dtype));
      return rooms_[used++]->view();
    });
    if (o_.between) o_.between(job_);
    step_.gather(*early_);
    return early_.get();
  }

 private:
  Job& job_;
  Step& step_;
  const Options& o_;
  const Block late_;
  std::vector<std::unique_ptr<Room>> rooms_;  // of peers' parts
  std::unique_ptr<EarlyWeights> early_;
};

Row run_rank(Job& job, Program& program, const Options& o) {
  enter(job, o);
  const Place p = place_of(o, job.rank());
  Axes axes(job, program, o);
  Step step(program, job.stream(), config_of(o, p, axes));

  const Span w_rows = o.swapped ? p.k : p.w_cut, w_cols = o.swapped ? p.w_cut : p.n;
  Block x(job, p.m, p.x_k, o, 1), w(job, w_rows, w_cols, o, 2, Storage::column_major), dy(job, p.m, p.y_n, o, 3);
  Block y(job, p.m, p.y_n, o, 0), dx(job, p.m, p.x_k, o, 0), dw(job, w_rows, w_cols, o, 0, Storage::column_major);

  const bool forward = o.name == "matmul", need_x = o.name != "dw", need_w = o.name != "dx";
  Ahead ahead(job, step, o, w_rows, w_cols);
  auto once = [&] {
    EarlyWeights* const early = o.early && step.gathers_early() && o.name != "dw" ? ahead.gather(w.view()) : nullptr;
    if (forward) {
      step.forward({x.view(), {w.view()}, {Matrix{}}, o.m, Epilogue::none, [&](int64_t, int64_t) { return y.view(); }, {}, early});
      return;
    }
    bool first = need_x;
    auto allocate = [&](int64_t, int64_t) { return std::exchange(first, false) ? dx.view() : dw.view().t(); };
    step.backward({x.view(), {w.view()}, {dy.view()}, need_x, need_w, {0}, true, true, allocate, early});
  };
  const double seconds = median_of_rounds(
      o, [] {},
      [&] {
        if (o.before) o.before(job);
        once();
        if (o.after) o.after(job);
        settle(job);
      },
      [&] {
        axes.take();
        job.reset_peak();
      });
  const Traffic traffic = axes.take();
  const auto show = [&](const Block& result) {
    result.fetch();
    if (o.see) o.see(job.rank(), result.host());
  };
  if (forward) show(y);
  if (!forward && need_x) show(dx);
  if (!forward && need_w) show(dw);
  double wrong = -1;
  const double peak = static_cast<double>(job.usage().workspace_peak) - static_cast<double>(job.usage().workspace);
  if (o.check) {
    wrong = 0;
    const Span all_k{0, o.k}, all_n{0, o.n}, all_m{0, o.m};
    const auto compare = [&](const Block& got, Span rows, Span inner, Span cols, Product of) {
      wrong += differing(job, o, got, rows, inner, cols, of);
    };
    if (forward) compare(y, p.m, all_k, p.y_n, {1, 2, false, false});
    if (!forward && need_x) compare(dx, p.m, all_n, p.x_k, {3, 2, false, true});
    if (!forward && need_w) compare(dw, w_rows, all_m, w_cols, {1, 3, true, false});
  }
  return {seconds, static_cast<double>(traffic.bytes_received) / o.rounds, static_cast<double>(traffic.messages) / o.rounds, wrong,
          peak,    static_cast<double>(traffic.bytes_crossed) / o.rounds};
}

}  // namespace

Measured run_matmul(const Options& o) {
  const std::vector<Row> rows = start(o, [&](Job& job, Program& program) { return run_rank(job, program, o); });
  Measured out = over_ranks(rows);
  out.flops = 2.0 * static_cast<double>(o.m) * static_cast<double>(o.k) * static_cast<double>(o.n) * (o.name == "backward" ? 2 : 1);
  out.formula = bytes_of(o);
  return out;
}

}  // namespace gingham
