// The fused step as Python sees it: tensors to views, results made in the shared heap, the GIL released while it runs.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "binding_axis.h"
#include "ops/step.h"

namespace gingham {

// The tensors that one call made, found again by the memory a result view points to.
class Results {
 public:
  explicit Results(std::shared_ptr<Job> job) : job_(std::move(job)) {}
  bool empty() const { return objects_.empty(); }
  Matrix add(const std::vector<int64_t>& shape, const std::string& dtype, Heap::Kind kind = Heap::Kind::tensor) {
    py::gil_scoped_acquire gil;
    const Made m = make_tensor(job_, shape, dtype, kind);
    objects_.push_back(m.object);
    data_.push_back(m.data);
    return Tensor{m.data, dtype_of(dtype), {}, shape}.matrix();
  }
  // None for a view without data.
  py::object of(const Matrix& view) const {
    for (size_t i = 0; i < data_.size(); i++)
      if (view.data && data_[i] == view.data) return objects_[i];
    return py::none();
  }
  Objects of(const std::vector<Matrix>& views) const {
    Objects out;
    for (const Matrix& v : views) out.push_back(of(v));
    return out;
  }

 private:
  std::shared_ptr<Job> job_;
  Objects objects_;
  std::vector<void*> data_;
};

// Operand and Step as Python sees them; they keep the axes they point to alive.
struct OperandSpec {
  std::shared_ptr<BoundAxis> axis;
  int dim;
  std::vector<int64_t> offsets;
  bool replicated;
  Operand operand() const { return {axis ? &axis->axis() : nullptr, dim, offsets, replicated}; }
};

// What BoundStep::early made, with the tensors that it comes into: settled when it goes, so that nothing is written into their memory afterwards.
struct BoundEarly {
  Member member;
  std::vector<std::shared_ptr<BoundAxis>> kept;
  Objects tensors;
  std::unique_ptr<EarlyWeights> weights;
  ~BoundEarly() {
    if (!weights || !weights->begun()) return;
    try {
      const OnCallersStream on_stream(member);
      weights->settle();
    } catch (const std::exception&) {  // the job is over, which its next call tells
    }
  }
};

class BoundStep {
 public:
  BoundStep(Member member, const std::string& name, const OperandSpec& x, const std::vector<OperandSpec>& w, const std::vector<OperandSpec>& y,
            std::shared_ptr<BoundAxis> depth, const std::string& slice_dim, int64_t k, const std::vector<int64_t>& n, int slices, bool out_in)
      : member_(std::move(member)),
        out_in_(out_in),
        step_(*member_.program, member_.job->stream(), config(name, x, w, y, depth, slice_dim, k, n, slices)) {
    kept_ = {x.axis, depth};
    for (const auto& o : w) kept_.push_back(o.axis);
    for (const auto& o : y) kept_.push_back(o.axis);
  }

  // out_dtype: of the results; "": x's. float32 for 16-bit operands: their sums are kept as they are made.
  Objects forward(const py::object& x, const Objects& ws, const Objects& biases, const std::string& kind, const std::string& out_dtype,
                  const std::shared_ptr<BoundEarly>& early) {
    CHECK(ShapeError, ws.size() == maps_ && biases.size() == maps_, "step of ", maps_, " weights got ", ws.size(), " and ", biases.size(), " biases");
    CHECK(ShapeError, kind == "none" || kind == "gelu", "epilogue=", kind, ", expected none or gelu");
    const OnCallersStream on_stream(member_);
    const Tensor tx = tensor_of(x, "x", member_.job);
    CHECK(ShapeError, tx.shape.size() >= 2, "x has ", tx.shape.size(), " dims, expected [..., features] with at least 2");
    Step::Forward call;
    call.x = tx.matrix();
    call.lead = tx.shape[0];
    for (size_t dim = 1; dim + 1 < tx.shape.size(); dim++) call.inner *= tx.shape[dim];
    call.early = early ? early->weights.get() : nullptr;
    for (size_t i = 0; i < maps_; i++) {
      call.w.push_back(weight(ws[i]));
      call.bias.push_back(biases[i].is_none() ? Matrix{} : bias(biases[i], call.w[i]));
      call.has_bias.push_back(!biases[i].is_none());
    }
    call.epilogue = kind == "gelu" ? Epilogue::gelu : Epilogue::none;
    Results made(member_.job);
    std::vector<int64_t> shape = tx.shape;
    call.allocate = [&](int64_t rows, int64_t cols) {
      shape.back() = cols;
      return made.add(rows == call.x.rows ? shape : std::vector<int64_t>{rows, cols}, out_dtype.empty() ? tx.dtype_name : out_dtype);
    };
    std::vector<Matrix> results;
    {
      py::gil_scoped_release nogil;
      results = step_.forward(call);
    }
    return made.of(results);
  }

  // wide_w: gradients of weights in 16 bits are float32, as they are summed.
  py::tuple backward(const py::object& x, const Objects& ws, const Objects& dys, bool need_x, bool need_w, const std::vector<bool>& need_b,
                     bool reduce_depth, bool reduce_bias, const std::shared_ptr<BoundEarly>& early, bool wide_w) {
    CHECK(ShapeError, ws.size() == maps_ && dys.size() == maps_ && need_b.size() == maps_, "step of ", maps_, " weights got ", dys.size(),
          " gradients");
    const OnCallersStream on_stream(member_);
    Step::Backward call;
    std::vector<int64_t> shape;
    std::string dtype;
    for (size_t i = 0; i < maps_; i++) {
      const Tensor dy = tensor_of(dys[i], "dy", member_.job);
      CHECK(ShapeError, dy.shape.size() >= 2, "dy has ", dy.shape.size(), " dims, expected at least 2");
      call.dy.push_back(dy.matrix());
      call.w.push_back(ws[i].is_none() ? Matrix{} : weight(ws[i]));
      call.need_bias.push_back(need_b[i]);
      shape = dy.shape;
      dtype = dy.dtype_name;
    }
    if (!x.is_none()) {
      const Tensor tx = tensor_of(x, "x", member_.job);
      call.x = tx.matrix();
      shape = tx.shape;
    }
    int64_t rows_there = 1;
    for (size_t i = 0; i + 1 < shape.size(); i++) rows_there *= shape[i];
    call.need_x = need_x;
    call.need_w = need_w;
    call.reduce_depth = reduce_depth;
    call.reduce_bias = reduce_bias;
    call.early = early ? early->weights.get() : nullptr;
    Results made(member_.job);
    call.allocate = [&](int64_t rows, int64_t cols) {
      // dX (and only dX) has the leading dims of X; it is the first tensor made.
      const bool as_x = need_x && made.empty() && rows == rows_there;
      if (as_x) shape.back() = cols;
      return made.add(as_x ? shape : std::vector<int64_t>{rows, cols}, dtype, as_x ? Heap::Kind::tensor : Heap::Kind::lasting);
    };
    if (wide_w)
      call.allocate_w = [&](int64_t rows, int64_t cols) {
        return made.add({rows, cols}, size_of(call.dy[0].dtype) == 2 ? "float32" : dtype, Heap::Kind::lasting);
      };
    Step::Gradients g;
    {
      py::gil_scoped_release nogil;
      g = step_.backward(call);
    }
    Objects db = made.of(g.db);
    for (auto& b : db)
      if (!b.is_none()) b = b.attr("view")(-1);
    return py::make_tuple(made.of(g.dx), made.of(g.dw), db);
  }

  bool gathers_early() const { return step_.gathers_early(); }

  // Room for ws, of a later call, which gather() fills.
  std::shared_ptr<BoundEarly> early(const Objects& ws) {
    CHECK(ShapeError, ws.size() == maps_, "step of ", maps_, " weights got ", ws.size());
    const OnCallersStream on_stream(member_);
    auto out = std::make_shared<BoundEarly>();
    out->member = member_;
    out->kept = kept_;
    std::vector<Matrix> w;
    for (const py::object& each : ws) w.push_back(weight(each));
    const std::string dtype = tensor_of(ws[0], "weight", member_.job).dtype_name;
    const auto allocate = [&](int64_t rows, int64_t cols) {
      py::gil_scoped_acquire gil;
      const Made made = make_tensor(member_.job, {rows, cols}, dtype, Heap::Kind::workspace);
      out->tensors.push_back(made.object);
      return Tensor{made.data, dtype_of(dtype), {}, {rows, cols}}.matrix();
    };
    for (const py::object& each : ws) out->tensors.push_back(each);
    out->weights = step_.early(w, allocate);
    return out;
  }
  void gather(const std::shared_ptr<BoundEarly>& early) {
    const OnCallersStream on_stream(member_);
    py::gil_scoped_release nogil;
    step_.gather(*early->weights);
  }

 private:
  Step::Config config(const std::string& name, const OperandSpec& x, const std::vector<OperandSpec>& w, const std::vector<OperandSpec>& y,
                      const std::shared_ptr<BoundAxis>& depth, const std::string& slice_dim, int64_t k, const std::vector<int64_t>& n, int slices) {
    CHECK(ShapeError, w.size() == y.size() && w.size() == n.size(), "step with ", w.size(), " weights, ", y.size(), " outputs, ", n.size(), " sizes");
    CHECK(ShapeError, slice_dim == "M" || slice_dim == "K" || slice_dim == "N", "slice_dim=", slice_dim, ", expected M, K or N");
    maps_ = w.size();
    Step::Config c;
    c.name = name;
    c.x = x.operand();
    for (size_t i = 0; i < maps_; i++) c.maps.push_back({w[i].operand(), y[i].operand(), n[i]});
    c.depth = depth ? &depth->axis() : nullptr;
    c.slice_dim = slice_dim == "M" ? Dim::M : slice_dim == "K" ? Dim::K : Dim::N;
    c.k = k;
    c.slices = slices;
    c.storage = out_in_ ? Storage::column_major : Storage::row_major;
    const auto parts = [](const Operand& o) { return o.axis ? o.axis->size() : 1; };
    c.grid = {parts(c.maps[0].w) * (c.depth ? c.depth->size() : 1), parts(c.x), parts(c.maps[0].y)};
    return c;
  }

  Matrix weight(const py::object& object) const {
    const Tensor t = tensor_of(object, "weight", member_.job);
    CHECK(ShapeError, t.shape.size() == 2, "weight has ", t.shape.size(), " dims, expected 2");
    return out_in_ ? t.matrix().t() : t.matrix();
  }

  Matrix bias(const py::object& object, const Matrix& w) const {
    const Matrix b = tensor_of(object, "bias", member_.job).matrix();
    CHECK(ShapeError, b.rows == 1 && b.dtype == w.dtype, "bias is a ", name_of(b.dtype), " of ", b.rows, " rows, expected a vector of ",
          name_of(w.dtype));
    return b;
  }

  Member member_;
  bool out_in_;
  size_t maps_ = 0;
  Step step_;
  std::vector<std::shared_ptr<BoundAxis>> kept_;
};

}  // namespace gingham
