#include "ops/pipeline.h"

#include <algorithm>
#include <numeric>

#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/reduce_scatter.h"
#include "kernels/gemm.h"

namespace gingham {

Matrix Pipeline::workspace(int64_t rows, int64_t cols, DType dtype, Storage storage) {
  scratch_.emplace_back(stream_, static_cast<size_t>(rows * cols) * size_of(dtype));
  char* data = scratch_.back().data();
  return dense(data, rows, cols, dtype, storage);
}

Pipeline::Slot Pipeline::declare(const Placement& place, const Matrix& m, Role role) {
  if (place.dim < 0 || !place.operand.cut()) return {};
  Axis* axis = place.operand.axis;
  Used* used = nullptr;
  for (Used& u : axes_)
    if (u.axis == axis) used = &u;
  if (!used) {
    axes_.push_back({axis, {}, !place.same_rows});
    used = &axes_.back();
  }
  Slot slot;
  // On a ring the post carries only the key and the rows; data goes in messages.
  if (!axis->window()) {
    slot.lane = role == Role::input ? ++used->gathers : ++used->sums;
    CHECK(MeshError, slot.lane < (role == Role::input ? kLanes / 2 : kLanes), "a step may move ", kLanes / 2 - 1, " operands over one axis each way");
    return slot;
  }
  residents_.push_back(std::make_unique<Resident>(m, *axis, stream_));
  used->panels.push_back(residents_.back()->view());
  slot.panel = static_cast<int>(used->panels.size()) - 1;
  return slot;
}

void Pipeline::post(int64_t rows) {
  for (const Used& used : axes_) sessions_.emplace_back(*used.axis, used.panels, rows, used.uneven);
}

Input* Pipeline::input(const Placement& place, const Matrix& local, Slot slot, const Slices& slices) {
  if (place.dim < 0) {
    inputs_.push_back(whole_input(local));
  } else if (!place.operand.cut()) {
    inputs_.push_back(local_input(local, place.dim, slices));
  } else {
    const Cut cut(local, place.dim, place.offsets, place.storage, *place.operand.axis, slices);
    inputs_.push_back(slot.panel >= 0 ? window_input(cut, slot.panel) : ring_input(cut, slot.lane, stream_));
  }
  return inputs_.back().get();
}

Input* Pipeline::input(const Placement& place, const Matrix& local, const std::vector<Matrix>& parts, const Slices& slices) {
  const Cut cut(local, place.dim, place.offsets, place.storage, *place.operand.axis, slices);
  inputs_.push_back(parts_input(cut, parts));
  return inputs_.back().get();
}

Output* Pipeline::output(const Placement& place, const Matrix& accumulator, Slot slot, const Slices& slices) {
  if (place.dim < 0) {
    outputs_.push_back(whole_output(accumulator));
  } else if (!place.operand.cut()) {
    outputs_.push_back(local_output(accumulator, place.dim, slices));
  } else {
    const Cut cut(accumulator, place.dim, place.offsets, place.storage, *place.operand.axis, slices);
    outputs_.push_back(slot.panel >= 0 ? window_output(cut, slot.panel) : ring_output(cut, slot.lane, stream_));
  }
  return outputs_.back().get();
}

Output* Pipeline::adding(const Placement& place, const Matrix& accumulator, Slot slot, const Slices& slices, const Matrix& rounded) {
  const Cut cut(accumulator, place.dim, place.offsets, place.storage, *place.operand.axis, slices);
  outputs_.push_back(adding_output(cut, slot.lane, stream_, rounded));
  return outputs_.back().get();
}

// The intervals in the order in which their panels come: those that stand here first. It follows from the grid alone, not from how panels
// travel, so that sums over them have the same bits wherever the ranks are.
std::vector<int> Pipeline::order_of(const Group& group) {
  std::vector<int> order(static_cast<size_t>(group.slices.intervals()));
  std::iota(order.begin(), order.end(), 0);
  const auto distance = [&group](int interval) {
    if (group.leader) return group.leader->distance(interval);
    int most = 0;
    for (const Input* in : group.inputs) most = std::max(most, in->distance(interval));
    return most;
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return distance(a) < distance(b); });
  return order;
}

bool Pipeline::takes_turns(const Group& group) {
  return std::any_of(group.products.begin(), group.products.end(), [](const Product& product) { return product.out->yields(); });
}

// The rounds of a slice: one product's after the other; or, where sums travel beside products, a round of each before the next of any, and after
// the first round what has no other.
std::vector<Pipeline::Round> Pipeline::rounds_of(const Group& group) {
  std::vector<Round> out;
  const bool turns = takes_turns(group);
  int most = 0;
  for (const Product& product : group.products) {
    most = std::max(most, product.out->rounds());
    for (int round = 0; round < product.out->rounds() && !turns; round++) out.push_back({&product, round});
  }
  for (int round = 0; round < most && turns; round++) {
    for (const Product& product : group.products)
      if (product.out->rounds() > std::max(round, 1)) out.push_back({&product, round});
    for (const Product& product : group.products)
      if (round == 0 && product.out->rounds() == 1) out.push_back({&product, round});
  }
  return out;
}

void Pipeline::run(const Group& group) {
  const std::vector<int> order = order_of(group);
  const bool stands = std::all_of(group.inputs.begin(), group.inputs.end(), [](const Input* in) { return in->stands(); });
  if (stands && !takes_turns(group)) return run_standing(group, order);
  const int slices = group.slices.slices;
  const std::vector<Round> rounds = rounds_of(group);
  // What decides the order stands here for its first interval: the others begin before it.
  std::vector<Input*> inputs = group.inputs;
  std::stable_partition(inputs.begin(), inputs.end(), [&group](const Input* in) { return in != group.leader; });
  for (Input* in : inputs)
    for (int s = 0; s < std::min(in->ahead(), slices); s++) in->begin(s);
  for (int s = 0; s < slices; s++) {
    for (Input* in : inputs)
      if (s + in->ahead() < slices) in->begin(s + in->ahead());
    for (const Round& round : rounds) work(group, *round.product, order, s, round.number);
    for (const auto& visit : group.visits)
      for (int t = 0; t < group.slices.intervals(); t++) {
        for (Input* in : group.inputs) in->acquire(s, t);
        visit(s, t);
      }
    for (Input* in : group.inputs) in->end(s);
  }
}

// Nothing is waited for but sums: where there is room a round goes over all slices, so that the sum of one travels while others are made.
void Pipeline::run_standing(const Group& group, const std::vector<int>& order) {
  for (const Product& product : group.products) {
    const int slices = group.slices.slices, rounds = product.out->rounds();
    for (int i = 0; i < slices * rounds; i++) {
      const bool by_round = product.out->holds_all();
      work(group, product, order, by_round ? i % slices : i / rounds, by_round ? i / slices : i % rounds);
    }
  }
  for (const auto& visit : group.visits)
    for (int s = 0; s < group.slices.slices; s++)
      for (int t = 0; t < group.slices.intervals(); t++) visit(s, t);
}

void Pipeline::work(const Group& group, const Product& product, const std::vector<int>& order, int slice, int round) {
  product.out->begin(slice, round);
  for (int t : order)
    if (product.out->holds(round, t)) multiply(group, product, slice, t, slice + 1 == group.slices.slices && t == order.back());
  product.out->end(slice, round);
}

void Pipeline::multiply(const Group& group, const Product& product, int slice, int interval, bool last) {
  for (const Factor& f : product.factors)
    for (Input* in : {f.a, f.b}) in->acquire(slice, interval);
  bool add = product.out->accumulates();
  const Matrix out = product.out->at(slice, interval);
  for (const Factor& f : product.factors) {
    const Matrix a = f.a->at(slice, interval), b = f.b->at(slice, interval);
    Tail tail;
    if (&f == &product.factors.back()) tail = product.tail ? product.tail(slice, interval, last) : product.out->tail(slice, interval);
    const Matrix c = tail.keeps_sum || add ? out : Matrix{};
    if (tail.empty())
      gemm(f.a_transposed ? a.t() : a, f.b_transposed ? b.t() : b, out, add, stream_);
    else
      gemm(f.a_transposed ? a.t() : a, f.b_transposed ? b.t() : b, c, add, tail, stream_);
    add = true;
    for (Input* in : group.inputs) in->pump();
  }
  product.out->written();
}

void Pipeline::close() {
  for (Session& session : sessions_) session.finish();
  for (Session& session : sessions_) session.end();
  sessions_.clear();
  axes_.clear();
  inputs_.clear();
  outputs_.clear();
  residents_.clear();
}

Matrix Pipeline::gathered(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& local, Storage storage) {
  if (!operand.cut()) return local;
  const Matrix block = block_for(operand, offsets, local, storage);
  const bool turn = storage == Storage::column_major;  // what is dense is moved as it stands
  const Shares shares{turn ? block.t() : block, turn ? 1 - operand.dim : operand.dim, offsets};
  all_gather(*operand.axis, turn ? local.t() : local, shares.all(), stream_);
  return block;
}

Matrix Pipeline::block_for(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& own, Storage storage) {
  if (!operand.cut()) return own;
  const bool by_rows = operand.dim == 0;
  return workspace(by_rows ? offsets.back() : own.rows, by_rows ? own.cols : offsets.back(), own.dtype, storage);
}

void Pipeline::settle(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& block, const Matrix& own, Storage storage) {
  const bool turn = storage == Storage::column_major;
  if (operand.cut()) {
    const Shares shares{turn ? block.t() : block, turn ? 1 - operand.dim : operand.dim, offsets};
    reduce_scatter(*operand.axis, shares, turn ? own.t() : own, stream_);
  } else if (operand.shared()) {
    all_reduce(*operand.axis, own, stream_);
  }
}

}  // namespace gingham
