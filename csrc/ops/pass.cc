#include "ops/pass.h"

#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/reduce_scatter.h"
#include "kernels/gemm.h"

namespace gingham {

Matrix Pass::workspace(int64_t rows, int64_t cols, DType dtype, Order order) {
  scratch_.emplace_back(stream_, static_cast<size_t>(rows * cols) * size_of(dtype));
  char* data = scratch_.back().data();
  return order == Order::column_major ? dense(data, cols, rows, dtype).t() : dense(data, rows, cols, dtype);
}

int Pass::declare(const Place& place, const Matrix& m, Role role) {
  if (place.dim < 0 || !place.operand.cut()) return -1;
  Transport* axis = place.operand.axis;
  Board* board = nullptr;
  for (Board& b : boards_)
    if (b.axis == axis) board = &b;
  if (!board) {
    boards_.push_back({axis, {}, !place.same_rows});
    board = &boards_.back();
  }
  // On a ring the post carries only the key and the rows; data goes in messages.
  if (source_ == Source::ring) {
    const int lane = role == Role::input ? ++board->gathers : ++board->sums;
    CHECK(MeshError, lane < (role == Role::input ? kLanes / 2 : kLanes), "a step may move ", kLanes / 2 - 1, " operands over one axis each way");
    return lane;
  }
  residents_.push_back(std::make_unique<Resident>(m, *axis, stream_));
  board->panels.push_back(residents_.back()->view());
  return static_cast<int>(board->panels.size()) - 1;
}

void Pass::post(int64_t rows) {
  for (Board& b : boards_) {
    b.axis->post(b.panels, rows, b.uneven);
    b.axis->meet();
  }
}

Input* Pass::input(const Place& place, const Matrix& local, int index, const Slices& slices) {
  if (place.dim < 0) {
    inputs_.push_back(whole_input(local));
  } else if (!place.operand.cut()) {
    inputs_.push_back(local_input(local, place.dim, slices));
  } else {
    const Cut cut(local, place.dim, place.offsets, place.order, *place.operand.axis, slices);
    inputs_.push_back(source_ == Source::window ? window_input(cut, index) : ring_input(cut, index, stream_));
  }
  return inputs_.back().get();
}

Output* Pass::output(const Place& place, const Matrix& accumulator, int index, const Slices& slices) {
  if (place.dim < 0) {
    outputs_.push_back(whole_output(accumulator));
  } else if (!place.operand.cut()) {
    outputs_.push_back(local_output(accumulator, place.dim, slices));
  } else {
    const Cut cut(accumulator, place.dim, place.offsets, place.order, *place.operand.axis, slices);
    outputs_.push_back(source_ == Source::window ? window_output(cut, index) : ring_output(cut, index, stream_));
  }
  return outputs_.back().get();
}

void Pass::run(const Group& group) {
  const int slices = group.slices.slices, intervals = group.slices.intervals();
  for (Input* in : group.inputs) in->begin(0);
  for (int s = 0; s < slices; s++) {
    for (Input* in : group.inputs) in->acquire(s);
    if (s + 1 < slices)
      for (Input* in : group.inputs) in->begin(s + 1);
    for (const auto& visit : group.visits)
      for (int t = 0; t < intervals; t++) visit(s, t);
    for (const Product& product : group.products)
      for (int turn = 0; turn < product.out->turns(); turn++) {
        product.out->begin(s, turn);
        for (int t = 0; t < intervals; t++) {
          if (product.out->holds(turn, t)) multiply(group, product, s, t);
        }
        product.out->end(s, turn);
      }
  }
}

void Pass::multiply(const Group& group, const Product& product, int slice, int interval) {
  bool add = product.out->add();
  const Matrix out = product.out->at(slice, interval);
  for (const Factor& f : product.factors) {
    const Matrix a = f.a->at(slice, interval), b = f.b->at(slice, interval);
    const Tail tail = product.tail && &f == &product.factors.back() ? product.tail(slice, interval) : Tail{};
    if (tail.empty())
      gemm(f.a_turned ? a.t() : a, f.b_turned ? b.t() : b, out, add, stream_);
    else
      gemm(f.a_turned ? a.t() : a, f.b_turned ? b.t() : b, out, add, tail, stream_);
    add = true;
    for (Input* in : group.inputs) in->pump();
  }
}

void Pass::close() {
  for (Board& b : boards_) b.axis->finish();
  for (Board& b : boards_) b.axis->retire();
  boards_.clear();
  inputs_.clear();
  outputs_.clear();
  residents_.clear();
}

Matrix Pass::gathered(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& local) {
  if (!operand.cut()) return local;
  const bool by_rows = operand.dim == 0;
  const Matrix block = workspace(by_rows ? offsets.back() : local.rows, by_rows ? local.cols : offsets.back(), local.dtype);
  std::vector<Matrix> parts;
  for (size_t i = 0; i + 1 < offsets.size(); i++) parts.push_back(block.slice(operand.dim, offsets[i], offsets[i + 1]));
  all_gather(*operand.axis, local, parts, source_, stream_);
  return block;
}

Matrix Pass::block_for(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& own) {
  if (!operand.cut()) return own;
  const bool by_rows = operand.dim == 0;
  return workspace(by_rows ? offsets.back() : own.rows, by_rows ? own.cols : offsets.back(), own.dtype);
}

void Pass::settle(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& block, const Matrix& own) {
  if (operand.cut()) {
    std::vector<Matrix> parts;
    for (size_t i = 0; i + 1 < offsets.size(); i++) parts.push_back(block.slice(operand.dim, offsets[i], offsets[i + 1]));
    reduce_scatter(*operand.axis, parts, own, source_, stream_);
  } else if (operand.shared()) {
    all_reduce(*operand.axis, own, source_, stream_);
  }
}

}  // namespace gingham
