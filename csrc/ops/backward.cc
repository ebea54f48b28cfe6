// dX = dY W^T and dW = X^T dY in one pass over the slices, dY gathered once for both; db = column sums of the gathered dY.
#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "ops/step_call.h"

namespace gingham {
namespace {

struct ProjectionState {
  Matrix dy, dw, dw_sum, dw_block, db, db_sum, w;  // dw_block, w: whole over the axis of W where that lacks the slice dim
  Pipeline::Slot w_slot, dy_slot, dw_slot;
  Input* dy_in = nullptr;
  bool dw_rounded = false;  // the last product stores dw
  bool dw_adding = false;   // its sums go through Pipeline::adding
};

class BackwardRun {
 public:
  BackwardRun(Program& program, const Stream& stream, const Step::Config& config, const Step::Backward& call)
      : call_(call), step_(program, stream, config, "backward", call.dy[0].dtype, rows_of(config, call)), states_(config.maps.size()) {
    // dW = X^T dY asks for no W; its shape follows from X and dY.
    for (size_t i = 0; i < states_.size(); i++) {
      const Projection& map = config.maps[i];
      if (call_.w[i].rows || call_.w[i].cols || config.x.by_posted_rows() || map.y.by_posted_rows()) continue;
      const int64_t k = block_size(config.x, config.x.offsets, call_.x, 1), n = block_size(map.y, map.y.offsets, call_.dy[i], 1);
      call_.w[i] = dense(nullptr, own_size(map.w, map.w.offsets, 0, k), own_size(map.w, map.w.offsets, 1, n), call_.dy[i].dtype);
    }
  }

  Step::Gradients run() {
    begin();
    declare_x();
    for (size_t i = 0; i < states_.size(); i++) declare_map(i);
    step_.pipeline.post(rows_of(step_.config, call_));
    for (size_t i = 0; i < states_.size(); i++) compose(i);
    for (size_t g = 0; g < step_.groups.size(); g++) {
      if (step_.groups[g].slices.intervals() == 0) run_empty(g);
      step_.pipeline.run(step_.groups[g]);
    }
    step_.pipeline.close();
    return finish();
  }

 private:
  static int64_t rows_of(const Step::Config& c, const Step::Backward& call) {
    return call.x.data || c.x.by_posted_rows() ? call.x.rows : call.dy[0].rows;
  }
  int64_t n_of(size_t i) const { return block_size(step_.config.maps[i].w, step_.config.maps[i].w.offsets, call_.w[i], 1); }

  void begin() {
    const Step::Config& c = step_.config;
    step_.flag(kInputGradient, call_.need_x);
    step_.flag(kEarly, call_.early != nullptr);
    step_.flag(kWeightGradient, call_.need_w);
    step_.flag(kDepthSum, call_.reduce_depth);
    step_.flag(kBiasSum, call_.reduce_bias);
    for (size_t i = 0; i < states_.size(); i++) step_.flag(kBiasGradient + static_cast<int>(i % kMapBits), call_.need_bias[i]);
    step_.begin([&] { validate(); });
    step_.x_cuts = c.x.by_posted_rows() ? step_.learn(*c.x.axis, call_.x.rows) : c.x.offsets;
    std::vector<int64_t> n;
    for (size_t i = 0; i < states_.size(); i++) {
      const Operand& y = c.maps[i].y;
      step_.y_cuts.push_back(!y.by_posted_rows() ? y.offsets : i ? step_.y_cuts[0] : step_.learn(*y.axis, call_.dy[i].rows));
      n.push_back(n_of(i));
    }
    m_ = c.x.by_posted_rows() ? step_.x_cuts.back() : block_size(c.maps[0].y, step_.y_cuts[0], call_.dy[0], 0);
    k_ = block_size(c.maps[0].w, c.maps[0].w.offsets, call_.w[0], 0);
    step_.cut(m_, k_, n);
  }

  void validate() const {
    const Step::Config& c = step_.config;
    const DType dtype = call_.dy[0].dtype;
    CHECK(ShapeError, is_real(dtype), "dtype ", name_of(dtype), ", expected float32, float64, bfloat16 or float16");
    if (call_.need_w) {
      check_x(c.x, call_.x);
      CHECK(ShapeError, call_.x.dtype == dtype, "input is ", name_of(call_.x.dtype), ", its output's gradient is ", name_of(dtype));
    }
    for (size_t i = 0; i < states_.size(); i++) {
      CHECK(ShapeError, call_.w[i].dtype == dtype, "weight is ", name_of(call_.w[i].dtype), ", gradient is ", name_of(dtype));
      if (call_.need_w) check_w(c.maps[i], call_.w[i], block_size(c.x, c.x.offsets, call_.x, 1), dtype);
      check_dy(c.maps[i], call_.dy[i], n_of(i), dtype);
    }
  }

  void declare_x() {
    const Operand& x = step_.config.x;
    if (call_.early) call_.early->settle();
    if (call_.need_w) {
      x_ = in_x(step_.d) < 0 ? step_.pipeline.gathered(x, step_.x_cuts, call_.x) : call_.x;
      x_slot_ = step_.pipeline.declare(step_.x_place(), call_.x);
    }
    if (call_.need_x) {
      out_.dx = call_.allocate(own_size(x, step_.x_cuts, 0, m_), own_size(x, step_.x_cuts, 1, k_));
      // Maps that have groups of their own add to dX one after the other.
      dx_adding_ = step_.adds_to_arrivals(x, in_x(step_.d), call_.need_w);
      dx_rounded_ = step_.groups.size() == 1 && step_.rounded_by_gemm(x, step_.groups[0], out_.dx.dtype, dx_adding_);
      dx_sum_ = step_.sums_beside(out_.dx, Storage::row_major, dx_rounded_, in_x(step_.d), step_.groups[0], states_.size(), dx_adding_);
      dx_block_ = in_x(step_.d) < 0 ? step_.pipeline.block_for(x, step_.x_cuts, dx_sum_) : dx_sum_;
      dx_slot_ = step_.pipeline.declare(step_.x_place(), dx_sum_, Pipeline::Role::output);
    }
  }

  void declare_map(size_t i) {
    ProjectionState& state = states_[i];
    const Matrix& w = call_.w[i];
    const Storage storage = step_.config.storage;
    state.dy = in_y(step_.d) < 0 ? step_.pipeline.gathered(step_.config.maps[i].y, step_.y_cuts[i], call_.dy[i]) : call_.dy[i];
    state.dy_slot = step_.pipeline.declare(step_.y_place(i), call_.dy[i]);
    const Operand& place = step_.config.maps[i].w;
    if (call_.need_x && !call_.early) {
      state.w = in_w(step_.d) < 0 ? step_.pipeline.gathered(place, place.offsets, w, storage) : w;
      state.w_slot = step_.pipeline.declare(step_.w_place(i), w);
    }
    if (call_.need_w) {
      const Step::Allocate& make = call_.allocate_w ? call_.allocate_w : call_.allocate;
      state.dw = storage == Storage::column_major ? make(w.cols, w.rows).t() : make(w.rows, w.cols);
      const bool summed = deep() && call_.reduce_depth;
      state.dw_adding = step_.adds_to_arrivals(place, in_w(step_.d), call_.need_x || states_.size() > step_.groups.size());
      state.dw_rounded = !summed && step_.rounded_by_gemm(place, step_.group(i), state.dw.dtype, state.dw_adding);
      state.dw_sum = step_.sums_beside(state.dw, storage, state.dw_rounded, in_w(step_.d), step_.group(i), 1, state.dw_adding);
      state.dw_block = in_w(step_.d) < 0 ? step_.pipeline.block_for(place, place.offsets, state.dw_sum, storage) : state.dw_sum;
      state.dw_slot = step_.pipeline.declare(step_.w_place(i), state.dw_sum, Pipeline::Role::output);
    }
    if (call_.need_bias[i]) declare_bias(i);
  }

  // Columns that are summed once, and nowhere else, go straight to db in its own dtype.
  void declare_bias(size_t i) {
    ProjectionState& state = states_[i];
    const Projection& map = step_.config.maps[i];
    const bool travels = call_.reduce_bias && (map.w.shared() || deep());
    const DType wide = accumulator(call_.w[i].dtype);
    state.db = call_.allocate(1, n_of(i));
    state.db_sum = state.db.dtype == wide || (columns_once() && !travels) ? state.db : step_.pipeline.workspace(1, n_of(i), wide);
    if (!columns_once()) fill_zero(state.db_sum, step_.stream);
  }
  // Whether other ranks hold this W too.
  bool deep() const { return step_.config.depth && step_.config.depth->size() > 1; }
  // Slices along M bring pieces of every column of dY.
  bool columns_once() const { return in_y(step_.d) != 0; }

  void compose(size_t i) {
    ProjectionState& state = states_[i];
    Group& group = step_.group(i);
    Pipeline& pipeline = step_.pipeline;
    state.dy_in = pipeline.input(step_.y_place(i), state.dy, state.dy_slot, group.slices);
    group.inputs.push_back(state.dy_in);
    if (step_.leads(step_.config.maps[i].y, in_y(step_.d)) && !group.leader) group.leader = state.dy_in;
    if (call_.need_x) {
      Input* w = call_.early ? pipeline.input(step_.w_place(i), call_.w[i], call_.early->parts(i), group.slices)
                             : pipeline.input(step_.w_place(i), state.w, state.w_slot, group.slices);
      group.inputs.push_back(w);
      if (!dx_) dx_ = output(step_.x_place(), dx_block_, dx_slot_, group.slices, dx_adding_, dx_rounded_ ? out_.dx : Matrix{});
      // Maps of one group add into one product, so that a panel of dX makes its round once; groups of their own share the whole block.
      if (group.products.empty() || group.products[0].out != dx_) group.products.insert(group.products.begin(), Product{dx_, {}});
      group.products[0].factors.push_back({state.dy_in, w, false, true});
      if (dx_rounded_ && !dx_adding_) group.products[0].tail = rounding(out_.dx, in_x(step_.d), group.slices);
    }
    if (call_.need_w) {
      if (!group.shared) group.inputs.push_back(group.shared = pipeline.input(step_.x_place(), x_, x_slot_, group.slices));
      Output* dw = output(step_.w_place(i), state.dw_block, state.dw_slot, group.slices, state.dw_adding, state.dw_rounded ? state.dw : Matrix{});
      group.products.push_back({dw, {{group.shared, state.dy_in, true, false}}});
      if (state.dw_rounded && !state.dw_adding) group.products.back().tail = rounding(state.dw, in_w(step_.d), group.slices);
    }
    if (call_.need_bias[i]) group.visits.push_back([this, &state, &group](int s, int t) { add_bias(state, group.slices, s, t); });
  }

  Output* output(const Pipeline::Placement& place, const Matrix& sums, Pipeline::Slot slot, const Slices& slices, bool adding,
                 const Matrix& rounded) {
    return adding ? step_.pipeline.adding(place, sums, slot, slices, rounded) : step_.pipeline.output(place, sums, slot, slices);
  }

  // The last product into a panel stores it in the result's own 16 bits; see StepCall::rounded_by_gemm.
  static std::function<Tail(int, int, bool)> rounding(const Matrix& result, int dim, const Slices& slices) {
    return [result, dim, &slices](int s, int t, bool last) {
      Tail tail;
      if (dim < 0 && !last) return tail;
      const auto piece = slices.piece(s, t);
      tail.z = dim < 0 ? result : result.slice(dim, piece.begin, piece.end);
      tail.keeps_sum = false;
      return tail;
    };
  }

  void add_bias(ProjectionState& state, const Slices& slices, int s, int t) {
    const int dim = in_y(step_.d);
    if (dim < 0 && (s || t)) return;  // the whole dY passes once
    const auto piece = slices.piece(s, t);
    column_sums(state.dy_in->at(s, t), dim == 1 ? state.db_sum.slice(1, piece.begin, piece.end) : state.db_sum, !columns_once(), step_.stream);
  }

  // The slice dim is empty: nothing is multiplied, what would have been summed is zero, and db does not depend on it.
  void run_empty(size_t g) {
    if (call_.need_x && g == 0) fill_zero(dx_block_, step_.stream);
    for (size_t i = 0; i < states_.size(); i++) {
      if (&step_.group(i) != &step_.groups[g]) continue;
      if (call_.need_w) fill_zero(states_[i].dw_block, step_.stream);
      if (!call_.need_bias[i] || !columns_once()) continue;
      if (in_y(step_.d) < 0)
        column_sums(states_[i].dy, states_[i].db_sum, false, step_.stream);
      else
        fill_zero(states_[i].db_sum, step_.stream);
    }
  }

  Step::Gradients finish() {
    const Step::Config& c = step_.config;
    if (call_.need_x) {
      if (in_x(step_.d) < 0 || !c.x.cut()) step_.pipeline.settle(c.x, step_.x_cuts, dx_block_, dx_sum_);
      if (!dx_rounded_ && dx_sum_.data != out_.dx.data) cast(dx_sum_, out_.dx, step_.stream);
    }
    for (size_t i = 0; i < states_.size(); i++) {
      ProjectionState& state = states_[i];
      if (call_.need_w) {
        const Operand& w = c.maps[i].w;
        if (in_w(step_.d) < 0) step_.pipeline.settle(w, w.offsets, state.dw_block, state.dw_sum, c.storage);
        const auto stored = [&](const Matrix& m) { return c.storage == Storage::column_major ? m.t() : m; };
        if (c.depth && call_.reduce_depth)
          all_reduce(*c.depth, stored(state.dw_sum), stored(state.dw), step_.stream);
        else if (!state.dw_rounded && state.dw_sum.data != state.dw.data)
          cast(state.dw_sum, state.dw, step_.stream);
      }
      out_.dw.push_back(state.dw);
      out_.db.push_back({});
      if (!call_.need_bias[i]) continue;
      if (call_.reduce_bias) sum_bias(c.maps[i], state.db_sum);
      if (state.db_sum.data != state.db.data) cast(state.db_sum, state.db, step_.stream);
      out_.db.back() = state.db;
    }
    return out_;
  }

  // db is summed over the ranks that hold other rows: over m, or where W stands replicated over depth over the row axis first, so that
  // the depth sum runs on 1/q of it: reduce-scatter over row, all-reduce over depth, all-gather over row.
  void sum_bias(const Projection& map, const Matrix& db) {
    const Step::Config& c = step_.config;
    const bool rows = map.w.shared();
    if (!rows && deep()) all_reduce(*c.depth, db, step_.stream);
    if (rows && !deep()) all_reduce(*map.w.axis, db, step_.stream);
    if (!rows || !deep()) return;
    const Shares shares{db, 1, chunk(db.cols, map.w.axis->size())};
    const Matrix own = shares[map.w.axis->rank()];
    reduce_scatter(*map.w.axis, shares, own, step_.stream);
    all_reduce(*c.depth, own, step_.stream);
    all_gather(*map.w.axis, own, shares.all(), step_.stream);
  }

  Step::Backward call_;
  StepCall step_;
  std::vector<ProjectionState> states_;
  Step::Gradients out_;
  Matrix x_, dx_sum_, dx_block_;
  Pipeline::Slot x_slot_, dx_slot_;
  Output* dx_ = nullptr;
  bool dx_rounded_ = false;  // the last product stores dx
  bool dx_adding_ = false;   // its sums go through Pipeline::adding
  int64_t m_ = 0, k_ = 0;
};

}  // namespace

Step::Gradients Step::backward(const Backward& call) { return BackwardRun(program_, stream_, config_, call).run(); }

}  // namespace gingham
