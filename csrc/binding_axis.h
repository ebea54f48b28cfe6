// A mesh axis as Python sees it: its collectives over torch tensors.
#pragma once
#include <pybind11/stl.h>

#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "binding_tensor.h"
#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/broadcast.h"
#include "collectives/exchange.h"
#include "collectives/reduce_scatter.h"

namespace gingham {

using Objects = std::vector<py::object>;

// Whether ranks that share memory read each other's in place.
inline bool windowed(const std::string& source) {
  CHECK(MeshError, source == "window" || source == "ring", "source=", source, ", expected window or ring");
  return source == "window";
}

// An axis, and what its collectives need of the job.
class BoundAxis {
 public:
  BoundAxis(Member member, int index, const std::vector<int>& members, const std::string& source, double latency, double bandwidth)
      : member_(std::move(member)), index_(index), axis_(member_.job->axis(*member_.program, index, members, windowed(source), latency, bandwidth)) {}

  Axis& axis() { return *axis_; }
  bool spans() const { return member_.program->spans(); }

  void begin(const char* name, DType dtype, int64_t count, int64_t rows = -1) {
    Call call;
    call.set_name(name);
    call.dtype = static_cast<int32_t>(dtype);
    call.n = count;
    call.rows = rows;
    call.flags = static_cast<uint64_t>(index_);
    member_.program->begin(call);
  }

  Objects all_gather(const py::object& x, bool counted, int64_t rows) {
    const OnCallersStream on_stream(member_);
    const Tensor mine = tensor_of(x, "x", member_.job);
    CHECK(ShapeError, mine.shape.size() <= 8, "all_gather of a tensor of ", mine.shape.size(), " dims, expected at most 8");
    Shape shape;
    shape.ndim = static_cast<int32_t>(mine.shape.size());
    std::copy(mine.shape.begin(), mine.shape.end(), shape.dims);
    Objects out(static_cast<size_t>(axis_->size()));
    out[static_cast<size_t>(axis_->rank())] = x;
    auto block = [&](int peer, const Shape& theirs) {
      py::gil_scoped_acquire gil;
      const std::vector<int64_t> dims(theirs.dims, theirs.dims + theirs.ndim);
      const Made made = make_tensor(member_.job, dims, mine.dtype_name);
      out[static_cast<size_t>(peer)] = made.object;
      return Tensor{made.data, mine.dtype, {}, dims}.matrix();
    };
    {
      py::gil_scoped_release nogil;
      const Uncounted scope(*axis_, counted);
      begin("all_gather", mine.dtype, 0, rows);
      gingham::all_gather(*axis_, mine.matrix(), shape, rows, block, member_.job->stream());
    }
    return out;
  }

  // Every member's block of a tensor into one of `outs`, in axis order; all contiguous.
  void all_gather_into(const py::object& x, const Objects& outs, bool counted) {
    const OnCallersStream on_stream(member_);
    const Tensor mine = tensor_of(x, "x", member_.job);
    CHECK(ShapeError, static_cast<int>(outs.size()) == axis_->size(), "all_gather_into wants a tensor per member");
    std::vector<Matrix> blocks;
    int64_t total = 0;
    for (const auto& each : outs) {
      const Tensor block = tensor_of(each, "out", member_.job);
      CHECK(ShapeError, block.dtype == mine.dtype, "all_gather_into of another dtype");
      blocks.push_back(dense(block.data, 1, block.count(), block.dtype));
      total += block.count();
    }
    CHECK(ShapeError, blocks[static_cast<size_t>(axis_->rank())].cols == mine.count(), "all_gather_into of ", mine.count(), " elements into ",
          blocks[static_cast<size_t>(axis_->rank())].cols);
    py::gil_scoped_release nogil;
    const Uncounted scope(*axis_, counted);
    begin("all_gather", mine.dtype, total);
    gingham::all_gather(*axis_, dense(mine.data, 1, mine.count(), mine.dtype), blocks, member_.job->stream());
  }

  // Every member's numbers (at most 8), in axis order: a control message.
  std::vector<std::vector<int64_t>> sizes(const std::vector<int64_t>& mine) {
    const py::gil_scoped_release nogil;
    begin("sizes", DType::bytes8, 0);
    return exchange_sizes(*axis_, mine);
  }

  void all_reduce(const py::object& x, bool counted) {
    const OnCallersStream on_stream(member_);
    const Tensor mine = tensor_of(x, "x", member_.job);
    py::gil_scoped_release nogil;
    const Uncounted scope(*axis_, counted);
    begin("all_reduce", mine.dtype, mine.count());
    gingham::all_reduce(*axis_, dense(mine.data, 1, mine.count(), mine.dtype), member_.job->stream());
  }

  // The sum in a tensor of its own, rounded to a dtype of 16 bits; x is overwritten.
  py::object all_reduce_rounded(const py::object& x, const std::string& dtype, bool counted) {
    const OnCallersStream on_stream(member_);
    const Tensor mine = tensor_of(x, "x", member_.job);
    const Made out = make_tensor(member_.job, mine.shape, dtype);
    {
      const py::gil_scoped_release nogil;
      const Uncounted scope(*axis_, counted);
      begin("all_reduce", mine.dtype, mine.count());
      gingham::all_reduce(*axis_, dense(mine.data, 1, mine.count(), mine.dtype), dense(out.data, 1, mine.count(), dtype_of(dtype)),
                          member_.job->stream());
    }
    return out.object;
  }

  py::object reduce_scatter(const py::object& x, const std::vector<int64_t>& sizes, bool counted) {
    const OnCallersStream on_stream(member_);
    const Tensor mine = tensor_of(x, "x", member_.job);
    CHECK(ShapeError, !mine.shape.empty() && static_cast<int>(sizes.size()) == axis_->size(), "reduce_scatter wants a size per member");
    int64_t total = 0;
    for (int64_t s : sizes) total += s;
    CHECK(ShapeError, total == mine.shape[0], "sizes add up to ", total, ", x has ", mine.shape[0], " rows");
    std::vector<int64_t> shape = mine.shape;
    shape[0] = sizes[static_cast<size_t>(axis_->rank())];
    const Made out = make_tensor(member_.job, shape, mine.dtype_name);
    const int64_t width = mine.shape[0] ? mine.count() / mine.shape[0] : 0;
    const Matrix whole = dense(mine.data, mine.shape[0], width, mine.dtype);
    Shares shares{whole, 0, {0}};
    for (int64_t s : sizes) shares.cuts.push_back(shares.cuts.back() + s);
    {
      py::gil_scoped_release nogil;
      const Uncounted scope(*axis_, counted);
      begin("reduce_scatter", mine.dtype, mine.count());
      gingham::reduce_scatter(*axis_, shares, dense(out.data, shape[0], width, mine.dtype), member_.job->stream());
    }
    return out.object;
  }

  // One group of messages beside the program's calls, on an axis that queues: (peer, tensor) of what is sent and of where is received. Both
  // ends have agreed on it and on its place among all groups, since messages have no tags. Not counted. Returns its number for settle();
  // until that is called, tensors must stay as they are, and are kept: who would settle may be left by an error.
  uint64_t post(const std::vector<std::pair<int, py::object>>& sends, const std::vector<std::pair<int, py::object>>& recvs) {
    const OnCallersStream on_stream(member_);
    Ring& ring = axis_->ring();
    CHECK(MeshError, ring.queues(), "messages beside a program's calls, on an axis that does not queue: a mailbox carries them");
    const auto matrices = [this](const auto& messages) {
      Messages out;
      for (const auto& [peer, x] : messages) out.emplace_back(peer, tensor_of(x, "x", member_.job).matrix());
      return out;
    };
    const Messages out = matrices(sends), in = matrices(recvs);
    Posted& posted = posted_.emplace_back();
    posted.number = ring.queued(0) + 1;
    for (const auto* messages : {&sends, &recvs})
      for (const auto& each : *messages) posted.tensors.push_back(each.second);
    const py::gil_scoped_release nogil;
    const Uncounted scope(*axis_, false);
    ring.group_start();
    for (const auto& [peer, m] : out) ring.send(peer, m.data, m.bytes());
    for (const auto& [peer, m] : in) ring.recv(peer, m.data, m.bytes());
    ring.group_end();
    return ring.queued(0);
  }

  // Kernels queued from here on come after the group of that number.
  void settle(uint64_t number) {
    {
      const OnCallersStream on_stream(member_);
      axis_->ring().settle(0, number);
    }
    while (!posted_.empty() && posted_.front().number <= number) {
      const Posted ended = std::move(posted_.front());
      posted_.pop_front();
    }
  }

  void broadcast(const py::object& x, int root, bool counted) {
    const OnCallersStream on_stream(member_);
    const Tensor mine = tensor_of(x, "x", member_.job);
    py::gil_scoped_release nogil;
    const Uncounted scope(*axis_, counted);
    begin("broadcast", mine.dtype, mine.count());
    gingham::broadcast(*axis_, dense(mine.data, 1, mine.count(), mine.dtype), root, member_.job->stream());
  }

  Objects exchange(const std::vector<std::pair<int, py::object>>& sends, const std::vector<std::pair<int, std::vector<int64_t>>>& recvs,
                   const std::string& dtype, bool counted, int64_t rows, int64_t features) {
    const OnCallersStream on_stream(member_);
    Messages out, in;
    for (const auto& [peer, x] : sends) out.emplace_back(peer, tensor_of(x, "x", member_.job).matrix());
    Objects made;
    for (const auto& [peer, shape] : recvs) {
      const Made m = make_tensor(member_.job, shape, dtype);
      made.push_back(m.object);
      in.emplace_back(peer, Tensor{m.data, dtype_of(dtype), dtype, shape}.matrix());
    }
    {
      py::gil_scoped_release nogil;
      const Uncounted scope(*axis_, counted);
      begin("exchange", dtype_of(dtype), features, rows);
      gingham::exchange(*axis_, out, in, rows, member_.job->stream());
    }
    return made;
  }

 private:
  struct Posted {
    uint64_t number = 0;  // of the group
    Objects tensors;
  };
  Member member_;
  int index_;
  std::deque<Posted> posted_;  // those of groups that nobody has settled outlast the axis, which ends with its messages
  std::unique_ptr<Axis> axis_;
};

}  // namespace gingham
