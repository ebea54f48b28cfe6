// Y = X W + bias. Where nothing of Y is summed over ranks, bias and activation are part of the last product. Where Y lacks the slice dim (K) its
// whole block is summed slice by slice and reduce-scattered at the end; where it has it (N, M) each panel is summed over its axis as it is made.
#include "collectives/resident.h"
#include "kernels/cast.h"
#include "ops/frame.h"

namespace gingham {
namespace {

// One map's results: sum is this rank's Y before bias, block what the products add to (sum itself, or workspace to be scattered).
struct Lane {
  Matrix y, z, sum, block, bias;
  bool fused = false;  // the last product stores z and y
  int w_index = -1, y_index = -1;
};

class ForwardRun {
 public:
  ForwardRun(Control& control, const Stream& stream, const Step::Config& config, const Step::Forward& call)
      : call_(call), frame_(control, stream, config, "forward", call.x.dtype, call.x.rows), lanes_(config.maps.size()) {}

  std::vector<Matrix> run() {
    begin();
    declare();
    frame_.pass.post(call_.x.rows);
    compose();
    for (const Group& group : frame_.groups) frame_.pass.run(group);
    frame_.pass.close();
    return finish();
  }

 private:
  bool active() const { return call_.epilogue != Epilogue::none; }

  void begin() {
    const Step::Config& c = frame_.config;
    frame_.flag(kEpilogue, active());
    for (size_t i = 0; i < lanes_.size(); i++) frame_.flag(kBias + static_cast<int>(i % kMapBits), i < call_.has_bias.size() && call_.has_bias[i]);
    frame_.begin([&] {
      check_x(c.x, call_.x);
      const int64_t k = block_size(c.x, c.x.offsets, call_.x, 1);
      for (size_t i = 0; i < c.maps.size(); i++) check_w(c.maps[i], call_.w[i], k, call_.x.dtype);
    });
    frame_.x_cuts = c.x.learned() ? frame_.learn(*c.x.axis, call_.x.rows) : c.x.offsets;
    m_ = block_size(c.x, frame_.x_cuts, call_.x, 0);
    std::vector<int64_t> n;
    for (size_t i = 0; i < c.maps.size(); i++) {
      frame_.y_cuts.push_back(c.maps[i].y.offsets);
      if (c.maps[i].y.learned()) {
        const int64_t lead = std::max<int64_t>(call_.lead, 1);
        for (int64_t cut : chunk(lead, c.maps[i].y.axis->size())) frame_.y_cuts[i].push_back(cut * (m_ / lead));
      }
      n.push_back(block_size(c.maps[i].w, c.maps[i].w.offsets, call_.w[i], 1));
    }
    frame_.cut(m_, block_size(c.x, frame_.x_cuts, call_.x, 1), n);
  }

  void declare() {
    const Step::Config& c = frame_.config;
    x_ = in_x(frame_.d) < 0 ? frame_.pass.gathered(c.x, frame_.x_cuts, call_.x) : call_.x;
    x_index_ = frame_.pass.declare(frame_.x_place(), call_.x);
    for (size_t i = 0; i < lanes_.size(); i++) {
      const Map& map = c.maps[i];
      Lane& lane = lanes_[i];
      const int64_t n = block_size(map.w, map.w.offsets, call_.w[i], 1);
      const int64_t rows = own_size(map.y, frame_.y_cuts[i], 0, m_), cols = own_size(map.y, frame_.y_cuts[i], 1, n);
      lane.y = call_.allocate(rows, cols);
      lane.z = active() ? call_.allocate(rows, cols) : lane.y;
      lane.sum = frame_.accumulator(lane.z, Order::row_major);
      lane.block = in_y(frame_.d) < 0 ? frame_.pass.block_for(map.y, frame_.y_cuts[i], lane.sum) : lane.sum;
      lane.bias = call_.bias[i];
      if (!lane.bias.empty() && map.y.cut() && map.y.dim == 1) {
        const size_t r = static_cast<size_t>(map.y.axis->rank());
        lane.bias = lane.bias.slice(1, frame_.y_cuts[i][r], frame_.y_cuts[i][r + 1]);
      }
      lane.w_index = frame_.pass.declare(frame_.w_place(i), call_.w[i]);
      lane.y_index = frame_.pass.declare(frame_.y_place(i), lane.sum, Pass::Role::output);
    }
  }

  void compose() {
    for (size_t i = 0; i < lanes_.size(); i++) {
      Lane& lane = lanes_[i];
      const Map& map = frame_.config.maps[i];
      Group& group = frame_.group(i);
      if (group.inputs.empty()) group.inputs.push_back(frame_.pass.input(frame_.x_place(), x_, x_index_, group.slices));
      Input* w = frame_.pass.input(frame_.w_place(i), call_.w[i], lane.w_index, group.slices);
      group.inputs.push_back(w);
      Output* y = frame_.pass.output(frame_.y_place(i), lane.block, lane.y_index, group.slices);
      group.products.push_back({y, {{group.inputs[0], w, false, false}}});
      lane.fused = !map.y.shared() && group.slices.intervals() > 0;
      if (lane.fused) group.products.back().tail = [this, &lane, &group](int s, int t) { return tail_at(lane, group.slices, s, t); };
      if (group.slices.intervals() == 0) fill_zero(lane.block, frame_.stream);
    }
  }

  // z is stored where it differs from the bare sum, y where there is an activation.
  Tail tail_of(const Lane& lane) const {
    Tail tail;
    tail.bias = lane.bias;
    tail.kind = call_.epilogue;
    if (!lane.bias.empty() || lane.sum.data != lane.z.data) tail.z = lane.z;
    if (active()) tail.y = lane.y;
    return tail;
  }

  // The tail of one panel: Y's own where it has the slice dim; else the whole once, with the last panel.
  Tail tail_at(const Lane& lane, const Slices& slices, int s, int t) const {
    const int dim = in_y(frame_.d);
    if (dim < 0) return s + 1 == slices.slices && t + 1 == slices.intervals() ? tail_of(lane) : Tail{};
    Tail tail = tail_of(lane);
    const auto piece = slices.piece(s, t);
    if (dim == 1 && !tail.bias.empty()) tail.bias = tail.bias.slice(1, piece.begin, piece.end);
    if (!tail.z.empty()) tail.z = tail.z.slice(dim, piece.begin, piece.end);
    if (!tail.y.empty()) tail.y = tail.y.slice(dim, piece.begin, piece.end);
    return tail;
  }

  std::vector<Matrix> finish() {
    std::vector<Matrix> out;
    for (size_t i = 0; i < lanes_.size(); i++) {
      const Operand& y = frame_.config.maps[i].y;
      const std::vector<int64_t>& cuts = frame_.y_cuts[i];
      Lane& lane = lanes_[i];
      if (in_y(frame_.d) < 0 || !y.cut()) frame_.pass.settle(y, cuts, lane.block, lane.sum);
      if (!lane.fused) epilogue(lane.sum, tail_of(lane), frame_.stream);
      out.push_back(lane.y);
    }
    if (active())
      for (Lane& lane : lanes_) out.push_back(lane.z);
    return out;
  }

  const Step::Forward& call_;
  Frame frame_;
  std::vector<Lane> lanes_;
  Matrix x_;
  int x_index_ = -1;
  int64_t m_ = 0;
};

}  // namespace

std::vector<Matrix> Step::forward(const Forward& call) { return ForwardRun(control_, stream_, config_, call).run(); }

}  // namespace gingham
