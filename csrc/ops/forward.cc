// Y = X W + bias. Where nothing of Y is summed over ranks, bias and activation are part of the last product. Where Y lacks the slice dim (K) its
// whole block is summed slice by slice and reduce-scattered at the end; where it has it (N, M) each panel is summed over its axis as it is made.
#include "collectives/resident.h"
#include "kernels/cast.h"
#include "ops/step_call.h"

namespace gingham {
namespace {

// One map's results: sum is this rank's Y before bias, block what the products add to (sum itself, or workspace to be scattered).
struct ProjectionState {
  Matrix y, z, sum, block, bias, w;  // w: gathered where it lacks the slice dim
  bool fused = false;                // the last product stores z and y
  bool rounded = false;              // and in 16 bits, so that the sum is not kept
  Pipeline::Slot w_slot, y_slot;
};

class ForwardRun {
 public:
  ForwardRun(Program& program, const Stream& stream, const Step::Config& config, const Step::Forward& call)
      : call_(call), step_(program, stream, config, "forward", call.x.dtype, call.x.rows), states_(config.maps.size()) {}

  std::vector<Matrix> run() {
    begin();
    declare();
    step_.pipeline.post(call_.x.rows);
    compose();
    for (const Group& group : step_.groups) step_.pipeline.run(group);
    step_.pipeline.close();
    return finish();
  }

 private:
  bool active() const { return call_.epilogue != Epilogue::none; }

  void begin() {
    const Step::Config& c = step_.config;
    step_.flag(kEpilogue, active());
    step_.flag(kEarly, call_.early != nullptr);
    for (size_t i = 0; i < states_.size(); i++) step_.flag(kBias + static_cast<int>(i % kMapBits), i < call_.has_bias.size() && call_.has_bias[i]);
    step_.begin([&] {
      check_x(c.x, call_.x);
      const int64_t k = block_size(c.x, c.x.offsets, call_.x, 1);
      for (size_t i = 0; i < c.maps.size(); i++) check_w(c.maps[i], call_.w[i], k, call_.x.dtype);
    });
    step_.x_cuts = c.x.by_posted_rows() ? step_.learn(*c.x.axis, call_.x.rows) : c.x.offsets;
    m_ = block_size(c.x, step_.x_cuts, call_.x, 0);
    if (c.x.by_posted_rows()) check_rows(step_.x_cuts, call_.inner);
    std::vector<int64_t> n;
    for (size_t i = 0; i < c.maps.size(); i++) {
      step_.y_cuts.push_back(c.maps[i].y.offsets);
      if (c.maps[i].y.by_posted_rows()) {
        const int64_t lead = std::max<int64_t>(call_.lead, 1);
        step_.y_cuts[i] = chunk_rows(lead, m_ / lead, c.maps[i].y.axis->size());
      }
      n.push_back(block_size(c.maps[i].w, c.maps[i].w.offsets, call_.w[i], 1));
    }
    step_.cut(m_, block_size(c.x, step_.x_cuts, call_.x, 1), n);
  }

  void declare() {
    const Step::Config& c = step_.config;
    if (call_.early) call_.early->settle();
    x_ = in_x(step_.d) < 0 ? step_.pipeline.gathered(c.x, step_.x_cuts, call_.x) : call_.x;
    x_slot_ = step_.pipeline.declare(step_.x_place(), call_.x);
    for (size_t i = 0; i < states_.size(); i++) {
      const Projection& map = c.maps[i];
      ProjectionState& state = states_[i];
      const int64_t n = block_size(map.w, map.w.offsets, call_.w[i], 1);
      const int64_t rows = own_size(map.y, step_.y_cuts[i], 0, m_), cols = own_size(map.y, step_.y_cuts[i], 1, n);
      state.y = call_.allocate(rows, cols);
      state.z = active() ? call_.allocate(rows, cols) : state.y;
      state.rounded = step_.rounded_by_gemm(map.y, step_.group(i), state.z.dtype);
      state.sum = step_.sums_beside(state.z, Storage::row_major, state.rounded, in_y(step_.d), step_.group(i), 1);
      state.block = in_y(step_.d) < 0 ? step_.pipeline.block_for(map.y, step_.y_cuts[i], state.sum) : state.sum;
      state.bias = call_.bias[i];
      if (!state.bias.empty() && map.y.cut() && map.y.dim == 1) {
        const size_t r = static_cast<size_t>(map.y.axis->rank());
        state.bias = state.bias.slice(1, step_.y_cuts[i][r], step_.y_cuts[i][r + 1]);
      }
      state.w = in_w(step_.d) < 0 ? step_.pipeline.gathered(map.w, map.w.offsets, call_.w[i], c.storage) : call_.w[i];
      if (!call_.early) state.w_slot = step_.pipeline.declare(step_.w_place(i), call_.w[i]);
      state.y_slot = step_.pipeline.declare(step_.y_place(i), state.sum, Pipeline::Role::output);
    }
  }

  void compose() {
    for (size_t i = 0; i < states_.size(); i++) {
      ProjectionState& state = states_[i];
      const Projection& map = step_.config.maps[i];
      Group& group = step_.group(i);
      if (group.inputs.empty()) {
        group.inputs.push_back(step_.pipeline.input(step_.x_place(), x_, x_slot_, group.slices));
        if (step_.leads(step_.config.x, in_x(step_.d))) group.leader = group.inputs[0];
      }
      Input* w = call_.early ? step_.pipeline.input(step_.w_place(i), call_.w[i], call_.early->parts(i), group.slices)
                             : step_.pipeline.input(step_.w_place(i), state.w, state.w_slot, group.slices);
      group.inputs.push_back(w);
      Output* y = step_.pipeline.output(step_.y_place(i), state.block, state.y_slot, group.slices);
      group.products.push_back({y, {{group.inputs[0], w, false, false}}});
      state.fused = !map.y.shared() && group.slices.intervals() > 0;
      if (state.fused)
        group.products.back().tail = [this, &state, &group](int s, int t, bool last) { return tail_at(state, group.slices, s, t, last); };
      if (group.slices.intervals() == 0) fill_zero(state.block, step_.stream);
    }
  }

  // z is stored where it differs from the bare sum, y where there is an activation.
  Tail tail_of(const ProjectionState& state) const {
    Tail tail;
    tail.bias = state.bias;
    tail.kind = call_.epilogue;
    if (!state.bias.empty() || state.sum.data != state.z.data) tail.z = state.z;
    if (active()) tail.y = state.y;
    tail.keeps_sum = !state.rounded;
    return tail;
  }

  // The tail of one panel: Y's own where it has the slice dim; else the whole once, with the last panel.
  Tail tail_at(const ProjectionState& state, const Slices& slices, int s, int t, bool last) const {
    const int dim = in_y(step_.d);
    if (dim < 0) return last ? tail_of(state) : Tail{};
    Tail tail = tail_of(state);
    const auto piece = slices.piece(s, t);
    if (dim == 1 && !tail.bias.empty()) tail.bias = tail.bias.slice(1, piece.begin, piece.end);
    if (!tail.z.empty()) tail.z = tail.z.slice(dim, piece.begin, piece.end);
    if (!tail.y.empty()) tail.y = tail.y.slice(dim, piece.begin, piece.end);
    return tail;
  }

  std::vector<Matrix> finish() {
    std::vector<Matrix> out;
    for (size_t i = 0; i < states_.size(); i++) {
      const Operand& y = step_.config.maps[i].y;
      const std::vector<int64_t>& cuts = step_.y_cuts[i];
      ProjectionState& state = states_[i];
      if (in_y(step_.d) < 0 || !y.cut()) step_.pipeline.settle(y, cuts, state.block, state.sum);
      if (!state.fused) epilogue(state.sum, tail_of(state), step_.stream);
      out.push_back(state.y);
    }
    if (active())
      for (ProjectionState& state : states_) out.push_back(state.z);
    return out;
  }

  const Step::Forward& call_;
  StepCall step_;
  std::vector<ProjectionState> states_;
  Matrix x_;
  Pipeline::Slot x_slot_;
  int64_t m_ = 0;
};

}  // namespace

std::vector<Matrix> Step::forward(const Forward& call) { return ForwardRun(program_, stream_, config_, call).run(); }

}  // namespace gingham
