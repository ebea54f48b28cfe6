// Attention over a cut sequence as Python sees it.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "binding_step.h"
#include "ops/attention.h"

namespace gingham {

// One call's numbers; tensors q [time, batch, heads, width], k, v [keys, batch, kv_heads, width].
struct AttentionSpec {
  std::vector<int64_t> lengths;
  int place = 0;
  bool zigzag = false;
  int64_t past = 0;
  bool causal = false;
  double scale = 1;
  double p = 0;
  std::vector<int64_t> dropout;  // seed, name, call, first batch, first head, all heads, time; empty: none
};

class BoundAttention {
 public:
  // mask [batch or 1, heads or 1, queries or 1, keys or 1], of bool, or of numbers in the accumulator.
  BoundAttention(Member member, std::shared_ptr<BoundAxis> axis, AttentionSpec spec, const py::object& mask)
      : member_(std::move(member)), axis_(std::move(axis)), spec_(std::move(spec)), mask_(mask) {}

  py::tuple forward(const py::object& q, const py::object& k, const py::object& v) {
    const OnCallersStream on_stream(member_);
    const Operands x = operands(q, k, v);
    Objects made, lse;
    RingAttention attention = call(x, made, lse);
    {
      py::gil_scoped_release nogil;
      attention.forward(rows(x.q), rows(x.k), rows(x.v));
    }
    return py::make_tuple(made[0].attr("view")(q.attr("shape")), lse[0]);
  }

  py::tuple backward(const py::object& q, const py::object& k, const py::object& v, const py::object& out, const py::object& lse,
                     const py::object& dout) {
    const OnCallersStream on_stream(member_);
    const Operands x = operands(q, k, v);
    const Tensor y = tensor_of(out, "out", member_.job), dy = tensor_of(dout, "dout", member_.job), sums = tensor_of(lse, "lse", member_.job);
    CHECK(ShapeError, y.shape == x.q.shape && dy.shape == x.q.shape && y.dtype == x.q.dtype && dy.dtype == x.q.dtype,
          "attention: out, its gradient and q differ in shape or dtype");
    Objects made, none;
    RingAttention attention = call(x, made, none);
    {
      py::gil_scoped_release nogil;
      attention.backward(rows(x.q), rows(x.k), rows(x.v), rows(dy), {rows(y), lines(sums)});
    }
    return py::make_tuple(made[0].attr("view")(q.attr("shape")), made[1].attr("view")(k.attr("shape")), made[2].attr("view")(v.attr("shape")));
  }

  int64_t multiplied() const { return *multiplied_; }

 private:
  struct Operands {
    Tensor q, k, v;
  };
  Operands operands(const py::object& q, const py::object& k, const py::object& v) const {
    Operands x{tensor_of(q, "q", member_.job), tensor_of(k, "k", member_.job), tensor_of(v, "v", member_.job)};
    CHECK(ShapeError, x.q.shape.size() == 4 && x.k.shape.size() == 4 && x.v.shape.size() == 4, "attention of ", x.q.shape.size(), ", ",
          x.k.shape.size(), " and ", x.v.shape.size(), " dims, expected [time, batch, heads, width]");
    return x;
  }
  // [time, batch heads width]
  static Matrix rows(const Tensor& t) { return dense(t.data, t.shape[0], t.shape[1] * t.shape[2] * t.shape[3], t.dtype); }

  // [batch heads, time]
  static Matrix lines(const Tensor& t) { return dense(t.data, t.shape[0] * t.shape[1], t.shape[2], t.dtype); }

  // made: results in the order in which they are asked for, [time, batch heads width].
  RingAttention call(const Operands& x, Objects& made, Objects& lse) const {
    AttentionCall c;
    c.block = block(x);
    c.lengths = spec_.lengths;
    c.place = spec_.place;
    c.zigzag = spec_.zigzag;
    c.past = spec_.past;
    c.masked = !mask_.is_none();
    c.block.multiplied = multiplied_.get();
    const std::string name = x.q.dtype_name, wide = name == "float64" ? name : "float32";
    const auto make = [job = member_.job](Objects& to, const std::vector<int64_t>& shape, const std::string& dtype) {
      py::gil_scoped_acquire gil;
      const Made m = make_tensor(job, shape, dtype);
      to.push_back(m.object);
      return m.data;
    };
    c.allocate = [make, &made, name, wide](int64_t rows, int64_t cols, bool accumulated) {
      const std::string& dtype = accumulated ? wide : name;
      return dense(make(made, {rows, cols}, dtype), rows, cols, dtype_of(dtype));
    };
    c.allocate_lse = [make, &lse, wide, batch = x.q.shape[1], heads = x.q.shape[2]](int64_t count, int64_t time) {
      return dense(make(lse, {batch, heads, time}, wide), count, time, dtype_of(wide));
    };
    return RingAttention(*member_.program, axis_ ? &axis_->axis() : nullptr, member_.job->stream(), std::move(c));
  }

  Attention block(const Operands& x) const {
    Attention a;
    a.batch = x.q.shape[1];
    a.heads = x.q.shape[2];
    a.width = x.q.shape[3];
    a.kv_heads = x.k.shape[2];
    a.scale = spec_.scale;
    a.causal = spec_.causal;
    if (!mask_.is_none()) mask(x, a);
    if (!spec_.dropout.empty()) {
      const std::vector<int64_t>& d = spec_.dropout;
      CHECK(ShapeError, d.size() == 7, "attention: dropout of ", d.size(), " numbers, expected 7");
      a.dropout = {static_cast<uint64_t>(d[0]), static_cast<uint64_t>(d[1]), static_cast<uint64_t>(d[2]), spec_.p};
      a.first_batch = d[3];
      a.first_head = d[4];
      a.all_heads = d[5];
      a.time = d[6];
    }
    return a;
  }

  void mask(const Operands& x, Attention& a) const {
    const Tensor m = tensor_of(mask_, "mask", member_.job);
    int64_t keys = spec_.past;
    for (int64_t each : spec_.lengths) keys += each;
    const std::vector<int64_t> full{a.batch, a.heads, x.q.shape[0], keys};
    CHECK(ShapeError, m.shape.size() == 4, "attention mask of ", m.shape.size(), " dims, expected 4");
    int64_t stride = 1;
    for (size_t dim = 4; dim-- > 0;) {
      CHECK(ShapeError, m.shape[dim] == full[dim] || m.shape[dim] == 1, "attention mask has ", m.shape[dim], " along dim ", dim, ", expected ",
            full[dim], " or 1");
      a.mask_strides[dim] = m.shape[dim] == 1 ? 0 : stride;
      stride *= m.shape[dim];
    }
    a.mask = m.data;
    a.mask_dtype = m.dtype;
  }

  Member member_;
  std::shared_ptr<BoundAxis> axis_;
  AttentionSpec spec_;
  py::object mask_;
  std::unique_ptr<int64_t> multiplied_ = std::make_unique<int64_t>(0);
};

void define_attention(py::module_& m);

}  // namespace gingham
