#include "ops/step.h"

#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/reduce_scatter.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "ops/pass.h"

namespace gingham {
namespace {

// Where the slice dim lies in each operand as written: X [M, K], W [K, N], Y [M, N]; -1: nowhere.
int in_x(Dim d) { return d == Dim::M ? 0 : d == Dim::K ? 1 : -1; }
int in_w(Dim d) { return d == Dim::K ? 0 : d == Dim::N ? 1 : -1; }
int in_y(Dim d) { return d == Dim::M ? 0 : d == Dim::N ? 1 : -1; }

// Size along dim of the whole block of which `local` is this rank's part.
int64_t block_size(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& local, int dim) {
  return operand.cut() && operand.dim == dim ? offsets.back() : local.size(dim);
}

int64_t own_size(const Operand& operand, const std::vector<int64_t>& offsets, int64_t block) {
  const size_t r = operand.cut() ? static_cast<size_t>(operand.axis->rank()) : 0;
  return operand.cut() ? offsets[r + 1] - offsets[r] : block;
}

}  // namespace

// What forward and backward of one call share: offsets with the learned ones filled in, checks, accumulators.
class Frame {
 public:
  Frame(Control& control, const Step::Config& config, const char* product, DType dtype, int64_t rows) : control_(control), config_(config), dtype_(dtype) {
    call_.set_name(concat(config.name, ".", product));
    call_.dtype = static_cast<int32_t>(dtype);
    std::copy(config.grid.begin(), config.grid.end(), call_.grid);
    call_.k = config.k;
    for (const Map& m : config.maps) call_.n += m.n;
    call_.rows = rows;
    call_.flags = static_cast<uint64_t>(config.slices) << 8 | static_cast<uint64_t>(config.slice_dim) << 4 | static_cast<uint64_t>(config.source) << 3;
  }

  void flag(int bit, bool on) { call_.flags |= static_cast<uint64_t>(on) << (32 + bit); }

  // Publishes the call. A refusal of this rank's own arguments is published too, so that peers name this rank instead of waiting for it.
  template <class Validate>
  void begin(Validate validate) {
    std::string refusal;
    try {
      validate();
    } catch (const ShapeError& error) {
      refusal = error.what();
      call_.invalid = 1;
      const size_t n = std::min(refusal.size(), sizeof(call_.note) - 1);
      std::copy_n(refusal.begin(), n, call_.note);
    }
    control_.begin(call_);
    if (!refusal.empty()) throw ShapeError(concat("rank ", control_.rank(), ": ", config_.name, ": ", refusal));
  }

  // Cut points along M from the rows every rank of the axis says it holds.
  std::vector<int64_t> learn(Transport& axis, int64_t rows) const {
    axis.post({}, rows, true);
    std::vector<int64_t> offsets{0};
    for (int peer = 0; peer < axis.size(); peer++) offsets.push_back(offsets.back() + axis.rows(peer));
    axis.finish();
    axis.retire();
    return offsets;
  }

  bool wide() const { return size_of(dtype_) == 2; }
  // Sums of 16-bit operands are kept in fp32 beside `out` and cast when done.
  Matrix accumulator(Pass& pass, const Matrix& out, Order order) const {
    return wide() ? pass.workspace(out.rows, out.cols, DType::f32, order) : out;
  }

 private:
  Control& control_;
  const Step::Config& config_;
  DType dtype_;
  Call call_;
};

Step::Step(Control& control, const Stream& stream, Config config) : control_(control), stream_(stream), config_(std::move(config)) {
  CHECK(ShapeError, !config_.maps.empty() && config_.maps.size() <= 3, "a step takes 1 to 3 weights, got ", config_.maps.size());
  CHECK(ShapeError, config_.slices >= 1, "slices=", config_.slices, ", expected at least 1");
}

namespace {

void check_w(const Map& map, const Matrix& w, int64_t k_block, DType dtype) {
  CHECK(ShapeError, w.dtype == dtype, "weight is ", name_of(w.dtype), ", input is ", name_of(dtype), "; cast one of them");
  const int64_t k = block_size(map.w, map.w.offsets, w, 0);
  CHECK(ShapeError, k == k_block, "input has ", k_block, " features in this column of ranks, weight has ", k);
  CHECK(ShapeError, !map.w.cut() || w.size(map.w.dim) == own_size(map.w, map.w.offsets, 0), "weight block is [", w.rows, ",", w.cols, "], expected ",
        own_size(map.w, map.w.offsets, 0), " along dim ", map.w.dim);
}

void check_x(const Operand& x, const Matrix& local) {
  CHECK(ShapeError, is_real(local.dtype), "dtype ", name_of(local.dtype), ", expected float32, float64, bfloat16 or float16");
  CHECK(ShapeError, !x.cut() || x.learned() || local.size(x.dim) == own_size(x, x.offsets, 0), "input block is [", local.rows, ",", local.cols,
        "], expected ", own_size(x, x.offsets, 0), " along dim ", x.dim);
}

}  // namespace

std::vector<Matrix> Step::forward(const Forward& call) {
  const Config& c = config_;
  const Dim d = c.slice_dim;
  const DType dtype = call.x.dtype;
  Frame frame(control_, c, "forward", dtype, call.x.rows);
  frame.begin([&] {
    check_x(c.x, call.x);
    const int64_t k = block_size(c.x, c.x.offsets, call.x, 1);
    for (size_t i = 0; i < c.maps.size(); i++) check_w(c.maps[i], call.w[i], k, dtype);
  });
  const std::vector<int64_t> x_cuts = c.x.learned() ? frame.learn(*c.x.axis, call.x.rows) : c.x.offsets;
  const int64_t m = block_size(c.x, x_cuts, call.x, 0);

  Pass pass(stream_, c.source);
  const Pass::Place x_place{c.x, x_cuts, in_x(d), Order::row_major, !c.x.learned()};
  const Matrix x = in_x(d) < 0 ? pass.gathered(c.x, x_cuts, call.x) : call.x;
  const int x_index = pass.declare(x_place, call.x);

  struct Lane {
    std::vector<int64_t> y_cuts;
    Matrix y, z, sum, block;
    int w_index, y_index;
  };
  std::vector<Lane> lanes(c.maps.size());
  const bool act = call.epilogue != Epilogue::none;
  for (size_t i = 0; i < c.maps.size(); i++) {
    const Map& map = c.maps[i];
    Lane& lane = lanes[i];
    lane.y_cuts = map.y.offsets;
    if (map.y.learned()) {
      const int64_t lead = std::max<int64_t>(call.lead, 1);
      for (int64_t cut : chunk(lead, map.y.axis->size())) lane.y_cuts.push_back(cut * (m / lead));
    }
    const int64_t n = block_size(map.w, map.w.offsets, call.w[i], 1);
    const int64_t rows = map.y.dim == 0 ? own_size(map.y, lane.y_cuts, m) : m, cols = map.y.dim == 1 ? own_size(map.y, lane.y_cuts, n) : n;
    lane.y = call.allocate(rows, cols);
    lane.z = act ? call.allocate(rows, cols) : lane.y;
    lane.sum = frame.accumulator(pass, lane.z, Order::row_major);
    lane.block = in_y(d) < 0 ? pass.block_for(map.y, lane.y_cuts, lane.sum) : lane.sum;
    lane.w_index = pass.declare({map.w, map.w.offsets, in_w(d), c.order, false}, call.w[i]);
    lane.y_index = pass.declare({map.y, lane.y_cuts, in_y(d), Order::row_major, map.y.dim == 1}, lane.sum);
  }
  pass.post(call.x.rows);

  std::vector<Group> groups(d == Dim::N ? c.maps.size() : 1);
  for (size_t i = 0; i < c.maps.size(); i++) {
    const Map& map = c.maps[i];
    Lane& lane = lanes[i];
    Group& group = groups[d == Dim::N ? i : 0];
    if (group.products.empty()) {
      group.slices.slices = c.slices;
      group.slices.add({0, d == Dim::M ? m : d == Dim::K ? block_size(c.x, x_cuts, call.x, 1) : block_size(map.w, map.w.offsets, call.w[i], 1)});
      if (c.x.cut() && in_x(d) >= 0) group.slices.add(x_cuts);
      if (map.w.cut() && in_w(d) >= 0) group.slices.add(map.w.offsets);
      if (map.y.cut() && in_y(d) >= 0) group.slices.add(lane.y_cuts);
      group.inputs.push_back(pass.input(x_place, x, x_index, group.slices));
    }
    Input* w = pass.input({map.w, map.w.offsets, in_w(d), c.order, false}, call.w[i], lane.w_index, group.slices);
    group.inputs.push_back(w);
    Output* y = pass.output({map.y, lane.y_cuts, in_y(d), Order::row_major, map.y.dim == 1}, lane.block, lane.y_index, group.slices);
    group.products.push_back({y, {{group.inputs[0], w, false, false}}});
    if (group.slices.intervals() == 0) fill_zero(lane.block);
  }
  for (const Group& group : groups) pass.run(group);
  pass.close();

  std::vector<Matrix> out;
  for (size_t i = 0; i < lanes.size(); i++) {
    const Map& map = c.maps[i];
    Lane& lane = lanes[i];
    if (in_y(d) < 0 || !map.y.cut()) pass.settle(map.y, lane.y_cuts, lane.block, lane.sum);
    Matrix bias = call.bias[i];
    if (!bias.empty() && map.y.cut() && map.y.dim == 1) {
      const size_t r = static_cast<size_t>(map.y.axis->rank());
      bias = bias.slice(1, lane.y_cuts[r], lane.y_cuts[r + 1]);
    }
    epilogue(lane.sum, bias, lane.z, act ? lane.y : Matrix{}, call.epilogue);
    out.push_back(lane.y);
  }
  if (act)
    for (Lane& lane : lanes) out.push_back(lane.z);
  return out;
}

Step::Gradients Step::backward(const Backward& given) {
  const Config& c = config_;
  Backward call = given;
  // dW = X^T dY asks for no W; its shape follows from X and dY.
  for (size_t i = 0; i < c.maps.size(); i++) {
    const Map& map = c.maps[i];
    if (call.w[i].rows || call.w[i].cols || c.x.learned() || map.y.learned()) continue;
    const int64_t k = block_size(c.x, c.x.offsets, call.x, 1), n = block_size(map.y, map.y.offsets, call.dy[i], 1);
    call.w[i] = dense(nullptr, map.w.dim == 0 ? own_size(map.w, map.w.offsets, k) : k, map.w.dim == 1 ? own_size(map.w, map.w.offsets, n) : n, call.dy[i].dtype);
  }
  const Dim d = c.slice_dim;
  const DType dtype = call.dy[0].dtype;
  const int64_t rows = call.x.data || !call.dy[0].data || c.x.learned() ? call.x.rows : call.dy[0].rows;
  Frame frame(control_, c, "backward", dtype, rows);
  frame.flag(0, call.need_x);
  frame.flag(1, call.need_w);
  frame.flag(2, call.reduce_depth);
  for (size_t i = 0; i < c.maps.size(); i++) frame.flag(3 + static_cast<int>(i), call.need_bias[i]);
  frame.begin([&] {
    CHECK(ShapeError, is_real(dtype), "dtype ", name_of(dtype), ", expected float32, float64, bfloat16 or float16");
    if (call.need_w) check_x(c.x, call.x);
    if (call.need_w) CHECK(ShapeError, call.x.dtype == dtype, "input is ", name_of(call.x.dtype), ", its output's gradient is ", name_of(dtype));
    for (size_t i = 0; i < c.maps.size(); i++) {
      const Map& map = c.maps[i];
      CHECK(ShapeError, call.dy[i].dtype == dtype, "gradients of different dtypes");
      if (call.need_x) CHECK(ShapeError, call.w[i].dtype == dtype, "weight is ", name_of(call.w[i].dtype), ", gradient is ", name_of(dtype));
      CHECK(ShapeError, !map.y.cut() || map.y.learned() || call.dy[i].size(map.y.dim) == own_size(map.y, map.y.offsets, 0), "gradient block is [",
            call.dy[i].rows, ",", call.dy[i].cols, "], expected ", own_size(map.y, map.y.offsets, 0), " along dim ", map.y.dim);
      const int64_t n_dy = block_size(map.y, map.y.offsets, call.dy[i], 1), n_w = block_size(map.w, map.w.offsets, call.w[i], 1);
      CHECK(ShapeError, n_dy == n_w, "gradient has ", n_dy, " features, weight has ", n_w);
    }
  });
  const std::vector<int64_t> x_cuts = c.x.learned() ? frame.learn(*c.x.axis, call.x.rows) : c.x.offsets;
  std::vector<std::vector<int64_t>> y_cuts;
  for (size_t i = 0; i < c.maps.size(); i++)
    y_cuts.push_back(!c.maps[i].y.learned() ? c.maps[i].y.offsets : i ? y_cuts[0] : frame.learn(*c.maps[i].y.axis, call.dy[i].rows));
  const int64_t m = c.x.learned() ? x_cuts.back() : block_size(c.maps[0].y, y_cuts[0], call.dy[0], 0);
  const int64_t k = block_size(c.maps[0].w, c.maps[0].w.offsets, call.w[0], 0);

  Pass pass(stream_, c.source);
  Gradients out;
  const Pass::Place x_place{c.x, x_cuts, in_x(d), Order::row_major, !c.x.learned()};
  Matrix x = call.x, dx_sum, dx_block;
  int x_index = -1, dx_index = -1;
  if (call.need_w) {
    if (in_x(d) < 0) x = pass.gathered(c.x, x_cuts, call.x);
    x_index = pass.declare(x_place, call.x);
  }
  if (call.need_x) {
    out.dx = call.allocate(c.x.dim == 0 ? own_size(c.x, x_cuts, m) : m, c.x.dim == 1 ? own_size(c.x, x_cuts, k) : k);
    dx_sum = frame.accumulator(pass, out.dx, Order::row_major);
    dx_block = in_x(d) < 0 ? pass.block_for(c.x, x_cuts, dx_sum) : dx_sum;
    dx_index = pass.declare(x_place, dx_sum);
  }
  struct Lane {
    Matrix dy, dw, dw_sum, db_sum;
    int w_index = -1, dy_index = -1, dw_index = -1;
    bool db_begun = false;
  };
  std::vector<Lane> lanes(c.maps.size());
  for (size_t i = 0; i < c.maps.size(); i++) {
    const Map& map = c.maps[i];
    Lane& lane = lanes[i];
    lane.dy = in_y(d) < 0 ? pass.gathered(map.y, y_cuts[i], call.dy[i]) : call.dy[i];
    lane.dy_index = pass.declare({map.y, y_cuts[i], in_y(d), Order::row_major, map.y.dim == 1}, call.dy[i]);
    if (call.need_x) lane.w_index = pass.declare({map.w, map.w.offsets, in_w(d), c.order, false}, call.w[i]);
    if (call.need_w) {
      const Matrix made = c.order == Order::column_major ? call.allocate(call.w[i].cols, call.w[i].rows).t() : call.allocate(call.w[i].rows, call.w[i].cols);
      lane.dw = made;
      lane.dw_sum = frame.accumulator(pass, made, c.order);
      lane.dw_index = pass.declare({map.w, map.w.offsets, in_w(d), c.order, false}, lane.dw_sum);
    }
    if (call.need_bias[i]) {
      lane.db_sum = pass.workspace(1, block_size(map.w, map.w.offsets, call.w[i], 1), accumulator(dtype));
      fill_zero(lane.db_sum);
    }
  }
  pass.post(rows);

  std::vector<Group> groups(d == Dim::N ? c.maps.size() : 1);
  Output* dx = nullptr;
  for (size_t i = 0; i < c.maps.size(); i++) {
    const Map& map = c.maps[i];
    Group& group = groups[d == Dim::N ? i : 0];
    if (group.slices.cuts.empty()) {
      group.slices.slices = c.slices;
      group.slices.add({0, d == Dim::M ? m : d == Dim::K ? k : block_size(map.w, map.w.offsets, call.w[i], 1)});
      if (c.x.cut() && in_x(d) >= 0) group.slices.add(x_cuts);
      if (map.w.cut() && in_w(d) >= 0) group.slices.add(map.w.offsets);
      if (map.y.cut() && in_y(d) >= 0) group.slices.add(y_cuts[i]);
    }
  }
  std::vector<Input*> x_in(groups.size(), nullptr);
  for (size_t i = 0; i < c.maps.size(); i++) {
    const Map& map = c.maps[i];
    Lane& lane = lanes[i];
    const size_t g = d == Dim::N ? i : 0;
    Group& group = groups[g];
    Input* dy = pass.input({map.y, y_cuts[i], in_y(d), Order::row_major, map.y.dim == 1}, lane.dy, lane.dy_index, group.slices);
    group.inputs.push_back(dy);
    if (call.need_x) {
      Input* w = pass.input({map.w, map.w.offsets, in_w(d), c.order, false}, call.w[i], lane.w_index, group.slices);
      group.inputs.push_back(w);
      if (!dx) dx = pass.output(x_place, dx_block, dx_index, group.slices);
      // Maps of one group add into one product, so that a panel of dX makes its round once; groups of their own share the whole block.
      if (group.products.empty() || group.products[0].out != dx) group.products.insert(group.products.begin(), Product{dx, {}});
      group.products[0].factors.push_back({dy, w, false, true});
    }
    if (call.need_w) {
      if (!x_in[g]) group.inputs.push_back(x_in[g] = pass.input(x_place, x, x_index, group.slices));
      Output* dw = pass.output({map.w, map.w.offsets, in_w(d), c.order, false}, lane.dw_sum, lane.dw_index, group.slices);
      group.products.push_back({dw, {{x_in[g], dy, true, false}}});
    }
    if (call.need_bias[i]) {
      auto previous = group.visit;
      const Slices& slices = group.slices;
      group.visit = [previous, &lane, dy, &slices, d](int s, int t) {
        if (previous) previous(s, t);
        if (in_y(d) < 0 && (s || t)) return;
        const auto piece = slices.piece(s, t);
        const Matrix target = in_y(d) == 1 ? lane.db_sum.slice(1, piece.begin, piece.end) : lane.db_sum;
        column_sums(dy->at(s, t), target, true);
      };
    }
  }
  for (size_t g = 0; g < groups.size(); g++) {
    if (groups[g].slices.intervals() == 0) {
      if (call.need_x && g == 0) fill_zero(dx_block);
      if (call.need_w) fill_zero(lanes[g].dw_sum);
      if (in_y(d) < 0)
        for (Lane& lane : lanes)
          if (!lane.db_sum.empty()) column_sums(lane.dy, lane.db_sum, true);
    }
    pass.run(groups[g]);
  }
  pass.close();

  if (call.need_x) {
    if (in_x(d) < 0 || !c.x.cut()) pass.settle(c.x, x_cuts, dx_block, dx_sum);
    if (dx_sum.data != out.dx.data) cast(dx_sum, out.dx);
  }
  for (size_t i = 0; i < c.maps.size(); i++) {
    Lane& lane = lanes[i];
    if (call.need_w) {
      const Matrix stored = c.order == Order::column_major ? lane.dw_sum.t() : lane.dw_sum;
      if (c.depth && call.reduce_depth) all_reduce(*c.depth, stored, c.source, stream_);
      if (lane.dw_sum.data != lane.dw.data) cast(lane.dw_sum, lane.dw);
    }
    out.dw.push_back(lane.dw);
    out.db.push_back({});
    if (call.need_bias[i]) {
      sum_bias(pass, c.maps[i], lane.db_sum);
      out.db.back() = call.allocate(1, lane.db_sum.cols);
      cast(lane.db_sum, out.db.back());
    }
  }
  return out;
}

// db is summed over the ranks that hold other rows: over m, or where W stands replicated over depth over the row axis first, so that the
// depth sum runs on 1/q of it: reduce-scatter over row, all-reduce over depth, all-gather over row.
void Step::sum_bias(Pass& pass, const Map& map, const Matrix& db) {
  if (config_.slice_dim == Dim::M) return;
  const bool rows = map.w.shared(), deep = config_.depth && config_.depth->size() > 1;
  if (!rows) {
    if (deep) all_reduce(*config_.depth, db, config_.source, stream_);
    return;
  }
  if (!deep) return all_reduce(*map.w.axis, db, config_.source, stream_);
  const std::vector<int64_t> cuts = chunk(db.cols, map.w.axis->size());
  std::vector<Matrix> parts;
  for (size_t i = 0; i + 1 < cuts.size(); i++) parts.push_back(db.slice(1, cuts[i], cuts[i + 1]));
  const Matrix own = pass.workspace(1, parts[static_cast<size_t>(map.w.axis->rank())].cols, db.dtype);
  reduce_scatter(*map.w.axis, parts, own, config_.source, stream_);
  all_reduce(*config_.depth, own, config_.source, stream_);
  all_gather(*map.w.axis, own, parts, config_.source, stream_);
}

}  // namespace gingham
