// dX = dY W^T and dW = X^T dY in one pass over the slices, dY gathered once for both; db = column sums of the gathered dY.
#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "ops/frame.h"

namespace gingham {
namespace {

struct Lane {
  Matrix dy, dw, dw_sum, db_sum;
  int w_index = -1, dy_index = -1, dw_index = -1;
  Input* dy_in = nullptr;
};

class BackwardRun {
 public:
  BackwardRun(Control& control, const Stream& stream, const Step::Config& config, const Step::Backward& call)
      : call_(call), frame_(control, stream, config, "backward", call.dy[0].dtype, rows_of(config, call)), lanes_(config.maps.size()) {
    // dW = X^T dY asks for no W; its shape follows from X and dY.
    for (size_t i = 0; i < lanes_.size(); i++) {
      const Map& map = config.maps[i];
      if (call_.w[i].rows || call_.w[i].cols || config.x.learned() || map.y.learned()) continue;
      const int64_t k = block_size(config.x, config.x.offsets, call_.x, 1), n = block_size(map.y, map.y.offsets, call_.dy[i], 1);
      call_.w[i] = dense(nullptr, own_size(map.w, map.w.offsets, 0, k), own_size(map.w, map.w.offsets, 1, n), call_.dy[i].dtype);
    }
  }

  Step::Gradients run() {
    begin();
    declare_x();
    for (size_t i = 0; i < lanes_.size(); i++) declare_map(i);
    frame_.pass.post(rows_of(frame_.config, call_));
    for (size_t i = 0; i < lanes_.size(); i++) compose(i);
    for (size_t g = 0; g < frame_.groups.size(); g++) {
      if (frame_.groups[g].slices.intervals() == 0) run_empty(g);
      frame_.pass.run(frame_.groups[g]);
    }
    frame_.pass.close();
    return finish();
  }

 private:
  static int64_t rows_of(const Step::Config& c, const Step::Backward& call) { return call.x.data || c.x.learned() ? call.x.rows : call.dy[0].rows; }
  int64_t n_of(size_t i) const { return block_size(frame_.config.maps[i].w, frame_.config.maps[i].w.offsets, call_.w[i], 1); }

  void begin() {
    const Step::Config& c = frame_.config;
    frame_.flag(kInputGradient, call_.need_x);
    frame_.flag(kWeightGradient, call_.need_w);
    frame_.flag(kDepthSum, call_.reduce_depth);
    for (size_t i = 0; i < lanes_.size(); i++) frame_.flag(kBiasGradient + static_cast<int>(i % kMapBits), call_.need_bias[i]);
    frame_.begin([&] { validate(); });
    frame_.x_cuts = c.x.learned() ? frame_.learn(*c.x.axis, call_.x.rows) : c.x.offsets;
    std::vector<int64_t> n;
    for (size_t i = 0; i < lanes_.size(); i++) {
      const Operand& y = c.maps[i].y;
      frame_.y_cuts.push_back(!y.learned() ? y.offsets : i ? frame_.y_cuts[0] : frame_.learn(*y.axis, call_.dy[i].rows));
      n.push_back(n_of(i));
    }
    m_ = c.x.learned() ? frame_.x_cuts.back() : block_size(c.maps[0].y, frame_.y_cuts[0], call_.dy[0], 0);
    k_ = block_size(c.maps[0].w, c.maps[0].w.offsets, call_.w[0], 0);
    frame_.cut(m_, k_, n);
  }

  void validate() const {
    const Step::Config& c = frame_.config;
    const DType dtype = call_.dy[0].dtype;
    CHECK(ShapeError, is_real(dtype), "dtype ", name_of(dtype), ", expected float32, float64, bfloat16 or float16");
    if (call_.need_w) {
      check_x(c.x, call_.x);
      CHECK(ShapeError, call_.x.dtype == dtype, "input is ", name_of(call_.x.dtype), ", its output's gradient is ", name_of(dtype));
    }
    for (size_t i = 0; i < lanes_.size(); i++) {
      CHECK(ShapeError, call_.w[i].dtype == dtype, "weight is ", name_of(call_.w[i].dtype), ", gradient is ", name_of(dtype));
      if (call_.need_w) check_w(c.maps[i], call_.w[i], block_size(c.x, c.x.offsets, call_.x, 1), dtype);
      check_dy(c.maps[i], call_.dy[i], n_of(i), dtype);
    }
  }

  void declare_x() {
    const Operand& x = frame_.config.x;
    if (call_.need_w) {
      x_ = in_x(frame_.d) < 0 ? frame_.pass.gathered(x, frame_.x_cuts, call_.x) : call_.x;
      x_index_ = frame_.pass.declare(frame_.x_place(), call_.x);
    }
    if (call_.need_x) {
      out_.dx = call_.allocate(own_size(x, frame_.x_cuts, 0, m_), own_size(x, frame_.x_cuts, 1, k_));
      dx_sum_ = frame_.accumulator(out_.dx, Order::row_major);
      dx_block_ = in_x(frame_.d) < 0 ? frame_.pass.block_for(x, frame_.x_cuts, dx_sum_) : dx_sum_;
      dx_index_ = frame_.pass.declare(frame_.x_place(), dx_sum_, Pass::Role::output);
    }
  }

  void declare_map(size_t i) {
    Lane& lane = lanes_[i];
    const Matrix& w = call_.w[i];
    const Order order = frame_.config.order;
    lane.dy = in_y(frame_.d) < 0 ? frame_.pass.gathered(frame_.config.maps[i].y, frame_.y_cuts[i], call_.dy[i]) : call_.dy[i];
    lane.dy_index = frame_.pass.declare(frame_.y_place(i), call_.dy[i]);
    if (call_.need_x) lane.w_index = frame_.pass.declare(frame_.w_place(i), w);
    if (call_.need_w) {
      lane.dw = order == Order::column_major ? call_.allocate(w.cols, w.rows).t() : call_.allocate(w.rows, w.cols);
      lane.dw_sum = frame_.accumulator(lane.dw, order);
      lane.dw_index = frame_.pass.declare(frame_.w_place(i), lane.dw_sum, Pass::Role::output);
    }
    if (call_.need_bias[i]) {
      lane.db_sum = frame_.pass.workspace(1, n_of(i), accumulator(w.dtype));
      fill_zero(lane.db_sum, frame_.stream);
    }
  }

  void compose(size_t i) {
    Lane& lane = lanes_[i];
    Group& group = frame_.group(i);
    Pass& pass = frame_.pass;
    lane.dy_in = pass.input(frame_.y_place(i), lane.dy, lane.dy_index, group.slices);
    group.inputs.push_back(lane.dy_in);
    if (call_.need_x) {
      Input* w = pass.input(frame_.w_place(i), call_.w[i], lane.w_index, group.slices);
      group.inputs.push_back(w);
      if (!dx_) dx_ = pass.output(frame_.x_place(), dx_block_, dx_index_, group.slices);
      // Maps of one group add into one product, so that a panel of dX makes its round once; groups of their own share the whole block.
      if (group.products.empty() || group.products[0].out != dx_) group.products.insert(group.products.begin(), Product{dx_, {}});
      group.products[0].factors.push_back({lane.dy_in, w, false, true});
    }
    if (call_.need_w) {
      if (!group.shared) group.inputs.push_back(group.shared = pass.input(frame_.x_place(), x_, x_index_, group.slices));
      Output* dw = pass.output(frame_.w_place(i), lane.dw_sum, lane.dw_index, group.slices);
      group.products.push_back({dw, {{group.shared, lane.dy_in, true, false}}});
    }
    if (call_.need_bias[i]) group.visits.push_back([this, &lane, &group](int s, int t) { add_bias(lane, group.slices, s, t); });
  }

  void add_bias(Lane& lane, const Slices& slices, int s, int t) {
    const int dim = in_y(frame_.d);
    if (dim < 0 && (s || t)) return;  // the whole dY passes once
    const auto piece = slices.piece(s, t);
    column_sums(lane.dy_in->at(s, t), dim == 1 ? lane.db_sum.slice(1, piece.begin, piece.end) : lane.db_sum, true, frame_.stream);
  }

  // The slice dim is empty: nothing is multiplied, what would have been summed is zero, and db does not depend on it.
  void run_empty(size_t g) {
    if (call_.need_x && g == 0) fill_zero(dx_block_, frame_.stream);
    for (size_t i = 0; i < lanes_.size(); i++) {
      if (&frame_.group(i) != &frame_.groups[g]) continue;
      if (call_.need_w) fill_zero(lanes_[i].dw_sum, frame_.stream);
      if (in_y(frame_.d) < 0 && call_.need_bias[i]) column_sums(lanes_[i].dy, lanes_[i].db_sum, true, frame_.stream);
    }
  }

  Step::Gradients finish() {
    const Step::Config& c = frame_.config;
    if (call_.need_x) {
      if (in_x(frame_.d) < 0 || !c.x.cut()) frame_.pass.settle(c.x, frame_.x_cuts, dx_block_, dx_sum_);
      if (dx_sum_.data != out_.dx.data) cast(dx_sum_, out_.dx, frame_.stream);
    }
    for (size_t i = 0; i < lanes_.size(); i++) {
      Lane& lane = lanes_[i];
      if (call_.need_w) {
        const Matrix stored = c.order == Order::column_major ? lane.dw_sum.t() : lane.dw_sum;
        if (c.depth && call_.reduce_depth) all_reduce(*c.depth, stored, c.source, frame_.stream);
        if (lane.dw_sum.data != lane.dw.data) cast(lane.dw_sum, lane.dw, frame_.stream);
      }
      out_.dw.push_back(lane.dw);
      out_.db.push_back({});
      if (!call_.need_bias[i]) continue;
      sum_bias(c.maps[i], lane.db_sum);
      out_.db.back() = call_.allocate(1, lane.db_sum.cols);
      cast(lane.db_sum, out_.db.back(), frame_.stream);
    }
    return out_;
  }

  // db is summed over the ranks that hold other rows: over m, or where W stands replicated over depth over the row axis first, so that
  // the depth sum runs on 1/q of it: reduce-scatter over row, all-reduce over depth, all-gather over row.
  void sum_bias(const Map& map, const Matrix& db) {
    const Step::Config& c = frame_.config;
    const bool rows = map.w.shared(), deep = c.depth && c.depth->size() > 1;
    if (!rows && deep) all_reduce(*c.depth, db, c.source, frame_.stream);
    if (rows && !deep) all_reduce(*map.w.axis, db, c.source, frame_.stream);
    if (!rows || !deep) return;
    std::vector<Matrix> parts;
    const std::vector<int64_t> cuts = chunk(db.cols, map.w.axis->size());
    for (size_t i = 0; i + 1 < cuts.size(); i++) parts.push_back(db.slice(1, cuts[i], cuts[i + 1]));
    const Matrix own = frame_.pass.workspace(1, parts[static_cast<size_t>(map.w.axis->rank())].cols, db.dtype);
    reduce_scatter(*map.w.axis, parts, own, c.source, frame_.stream);
    all_reduce(*c.depth, own, c.source, frame_.stream);
    all_gather(*map.w.axis, own, parts, c.source, frame_.stream);
  }

  Step::Backward call_;
  Frame frame_;
  std::vector<Lane> lanes_;
  Step::Gradients out_;
  Matrix x_, dx_sum_, dx_block_;
  int x_index_ = -1, dx_index_ = -1;
  Output* dx_ = nullptr;
  int64_t m_ = 0, k_ = 0;
};

}  // namespace

Step::Gradients Step::backward(const Backward& call) { return BackwardRun(control_, stream_, config_, call).run(); }

}  // namespace gingham
