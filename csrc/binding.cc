// The Python module gingham._C: tensors to views, the GIL released around every call that may wait, errors to typed exceptions.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <optional>

#include "binding_tensor.h"
#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/broadcast.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"
#include "kernels/blas.h"
#include "kernels/dropout.h"
#include "kernels/epilogue.h"
#include "ops/step.h"

namespace gingham {
namespace {

using Objects = std::vector<py::object>;

// The tensors that one call made, found again by the memory a result view points to.
class Results {
 public:
  explicit Results(std::shared_ptr<Job> job) : job_(std::move(job)) {}
  bool empty() const { return objects_.empty(); }
  Matrix add(const std::vector<int64_t>& shape, const std::string& dtype) {
    py::gil_scoped_acquire gil;
    const Made m = make_tensor(job_, shape, dtype);
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

Source source_of(const std::string& name) {
  CHECK(MeshError, name == "window" || name == "ring", "source=", name, ", expected window or ring");
  return name == "ring" ? Source::ring : Source::window;
}

// A communicator: a transport, and what its collectives need of the job.
class Axis {
 public:
  Axis(std::shared_ptr<Job> job, int index, const std::vector<int>& members, double latency, double bandwidth)
      : job_(std::move(job)), index_(index), transport_(job_->axis(index, members, latency, bandwidth)) {}

  Transport& transport() { return *transport_; }

  void begin(const char* name, DType dtype, int64_t count) {
    Call call;
    call.set_name(name);
    call.dtype = static_cast<int32_t>(dtype);
    call.n = count;
    call.flags = static_cast<uint64_t>(index_);
    job_->control().begin(call);
  }

  Objects all_gather(const py::object& x, const std::string& source, bool counted) {
    const Tensor mine = tensor_of(x, "x");
    CHECK(ShapeError, mine.shape.size() <= 8, "all_gather of a tensor of ", mine.shape.size(), " dims, expected at most 8");
    Shape shape;
    shape.ndim = static_cast<int32_t>(mine.shape.size());
    std::copy(mine.shape.begin(), mine.shape.end(), shape.dims);
    Objects out(static_cast<size_t>(transport_->size()));
    out[static_cast<size_t>(transport_->rank())] = x;
    auto block = [&](int peer, const Shape& theirs) {
      py::gil_scoped_acquire gil;
      const std::vector<int64_t> dims(theirs.dims, theirs.dims + theirs.ndim);
      const Made made = make_tensor(job_, dims, mine.dtype_name);
      out[static_cast<size_t>(peer)] = made.object;
      return Tensor{made.data, mine.dtype, {}, dims}.matrix();
    };
    {
      py::gil_scoped_release nogil;
      const Uncounted scope(*transport_, counted);
      begin("all_gather", mine.dtype, 0);
      gingham::all_gather(*transport_, mine.matrix(), shape, block, source_of(source), job_->stream());
    }
    return out;
  }

  void all_reduce(const py::object& x, const std::string& source, bool counted) {
    const Tensor mine = tensor_of(x, "x");
    py::gil_scoped_release nogil;
    const Uncounted scope(*transport_, counted);
    begin("all_reduce", mine.dtype, mine.count());
    gingham::all_reduce(*transport_, dense(mine.data, 1, mine.count(), mine.dtype), source_of(source), job_->stream());
  }

  py::object reduce_scatter(const py::object& x, const std::vector<int64_t>& sizes, const std::string& source, bool counted) {
    const Tensor mine = tensor_of(x, "x");
    CHECK(ShapeError, !mine.shape.empty() && static_cast<int>(sizes.size()) == transport_->size(), "reduce_scatter wants a size per member");
    int64_t total = 0;
    for (int64_t s : sizes) total += s;
    CHECK(ShapeError, total == mine.shape[0], "sizes add up to ", total, ", x has ", mine.shape[0], " rows");
    std::vector<int64_t> shape = mine.shape;
    shape[0] = sizes[static_cast<size_t>(transport_->rank())];
    const Made out = make_tensor(job_, shape, mine.dtype_name);
    const int64_t width = mine.shape[0] ? mine.count() / mine.shape[0] : 0;
    const Matrix whole = dense(mine.data, mine.shape[0], width, mine.dtype);
    std::vector<Matrix> parts;
    int64_t at = 0;
    for (int64_t s : sizes) {
      parts.push_back(whole.slice(0, at, at + s));
      at += s;
    }
    {
      py::gil_scoped_release nogil;
      const Uncounted scope(*transport_, counted);
      begin("reduce_scatter", mine.dtype, mine.count());
      gingham::reduce_scatter(*transport_, parts, dense(out.data, shape[0], width, mine.dtype), source_of(source), job_->stream());
    }
    return out.object;
  }

  void broadcast(const py::object& x, int root, bool counted) {
    const Tensor mine = tensor_of(x, "x");
    py::gil_scoped_release nogil;
    const Uncounted scope(*transport_, counted);
    begin("broadcast", mine.dtype, mine.count());
    gingham::broadcast(*transport_, dense(mine.data, 1, mine.count(), mine.dtype), root, job_->stream());
  }

  Objects exchange(const std::vector<std::pair<int, py::object>>& sends, const std::vector<std::pair<int, std::vector<int64_t>>>& recvs,
                   const std::string& dtype, bool counted) {
    std::vector<std::pair<int, Tensor>> out;
    for (const auto& [peer, x] : sends) out.emplace_back(peer, tensor_of(x, "x"));
    Objects made;
    std::vector<std::pair<int, Tensor>> in;
    for (const auto& [peer, shape] : recvs) {
      const Made m = make_tensor(job_, shape, dtype);
      made.push_back(m.object);
      in.emplace_back(peer, Tensor{m.data, dtype_of(dtype), dtype, shape});
    }
    {
      py::gil_scoped_release nogil;
      const Uncounted scope(*transport_, counted);
      begin("exchange", dtype_of(dtype), 0);
      transport_->post({}, -1, true);
      for (int peer = 0; peer < transport_->size(); peer++) transport_->rows(peer);
      std::vector<Resident> residents;
      for (const auto& [peer, t] : out) {
        residents.emplace_back(t.matrix(), *transport_, job_->stream());
        transport_->send(peer, residents.back().view().data, t.matrix().bytes());
      }
      for (const auto& [peer, t] : in) transport_->recv(peer, t.data, t.matrix().bytes());
      for (const auto& [peer, t] : out) transport_->drain(peer);
      transport_->finish();
      transport_->retire();
    }
    return made;
  }

 private:
  std::shared_ptr<Job> job_;
  int index_;
  std::unique_ptr<Transport> transport_;
};

// Operand and Step as Python sees them; they keep the axes they point to alive.
struct OperandSpec {
  std::shared_ptr<Axis> axis;
  int dim;
  std::vector<int64_t> offsets;
  bool replicated;
  Operand operand() const { return {axis ? &axis->transport() : nullptr, dim, offsets, replicated}; }
};

class BoundStep {
 public:
  BoundStep(std::shared_ptr<Job> job, const std::string& name, const OperandSpec& x, const std::vector<OperandSpec>& w, const std::vector<OperandSpec>& y,
            std::shared_ptr<Axis> depth, const std::string& slice_dim, int64_t k, const std::vector<int64_t>& n, int slices, const std::string& source,
            bool out_in)
      : job_(std::move(job)), out_in_(out_in), step_(job_->control(), job_->stream(), config(name, x, w, y, depth, slice_dim, k, n, slices, source)) {
    kept_ = {x.axis, depth};
    for (const auto& o : w) kept_.push_back(o.axis);
    for (const auto& o : y) kept_.push_back(o.axis);
  }

  Objects forward(const py::object& x, const Objects& ws, const Objects& biases, const std::string& kind) {
    CHECK(ShapeError, ws.size() == maps_ && biases.size() == maps_, "step of ", maps_, " weights got ", ws.size(), " and ", biases.size(), " biases");
    CHECK(ShapeError, kind == "none" || kind == "gelu", "epilogue=", kind, ", expected none or gelu");
    const Tensor tx = tensor_of(x, "x");
    CHECK(ShapeError, tx.shape.size() >= 2, "x has ", tx.shape.size(), " dims, expected [..., features] with at least 2");
    Step::Forward call;
    call.x = tx.matrix();
    call.lead = tx.shape[0];
    for (size_t i = 0; i < maps_; i++) {
      call.w.push_back(weight(ws[i]));
      call.bias.push_back(biases[i].is_none() ? Matrix{} : bias(biases[i], call.w[i]));
    }
    call.epilogue = kind == "gelu" ? Epilogue::gelu : Epilogue::none;
    Results made(job_);
    std::vector<int64_t> shape = tx.shape;
    call.allocate = [&](int64_t rows, int64_t cols) {
      shape.back() = cols;
      return made.add(rows == call.x.rows ? shape : std::vector<int64_t>{rows, cols}, tx.dtype_name);
    };
    std::vector<Matrix> results;
    {
      py::gil_scoped_release nogil;
      results = step_.forward(call);
    }
    return made.of(results);
  }

  py::tuple backward(const py::object& x, const Objects& ws, const Objects& dys, bool need_x, bool need_w, const std::vector<bool>& need_b,
                     bool reduce_depth) {
    CHECK(ShapeError, ws.size() == maps_ && dys.size() == maps_ && need_b.size() == maps_, "step of ", maps_, " weights got ", dys.size(), " gradients");
    Step::Backward call;
    std::vector<int64_t> shape;
    std::string dtype;
    for (size_t i = 0; i < maps_; i++) {
      const Tensor dy = tensor_of(dys[i], "dy");
      CHECK(ShapeError, dy.shape.size() >= 2, "dy has ", dy.shape.size(), " dims, expected at least 2");
      call.dy.push_back(dy.matrix());
      call.w.push_back(ws[i].is_none() ? Matrix{} : weight(ws[i]));
      call.need_bias.push_back(need_b[i]);
      shape = dy.shape;
      dtype = dy.dtype_name;
    }
    if (!x.is_none()) {
      const Tensor tx = tensor_of(x, "x");
      call.x = tx.matrix();
      shape = tx.shape;
    }
    int64_t rows_there = 1;
    for (size_t i = 0; i + 1 < shape.size(); i++) rows_there *= shape[i];
    call.need_x = need_x;
    call.need_w = need_w;
    call.reduce_depth = reduce_depth;
    Results made(job_);
    call.allocate = [&](int64_t rows, int64_t cols) {
      // dX (and only dX) has the leading dims of X; it is the first tensor made.
      const bool as_x = need_x && made.empty() && rows == rows_there;
      if (as_x) shape.back() = cols;
      return made.add(as_x ? shape : std::vector<int64_t>{rows, cols}, dtype);
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

 private:
  Step::Config config(const std::string& name, const OperandSpec& x, const std::vector<OperandSpec>& w, const std::vector<OperandSpec>& y,
                      const std::shared_ptr<Axis>& depth, const std::string& slice_dim, int64_t k, const std::vector<int64_t>& n, int slices,
                      const std::string& source) {
    CHECK(ShapeError, w.size() == y.size() && w.size() == n.size(), "step with ", w.size(), " weights, ", y.size(), " outputs, ", n.size(), " sizes");
    CHECK(ShapeError, slice_dim == "M" || slice_dim == "K" || slice_dim == "N", "slice_dim=", slice_dim, ", expected M, K or N");
    maps_ = w.size();
    Step::Config c;
    c.name = name;
    c.x = x.operand();
    for (size_t i = 0; i < maps_; i++) c.maps.push_back({w[i].operand(), y[i].operand(), n[i]});
    c.depth = depth ? &depth->transport() : nullptr;
    c.slice_dim = slice_dim == "M" ? Dim::M : slice_dim == "K" ? Dim::K : Dim::N;
    c.k = k;
    c.slices = slices;
    c.source = source_of(source);
    c.order = out_in_ ? Order::column_major : Order::row_major;
    const auto parts = [](const Operand& o) { return o.axis ? o.axis->size() : 1; };
    c.grid = {parts(c.maps[0].w) * (c.depth ? c.depth->size() : 1), parts(c.x), parts(c.maps[0].y)};
    return c;
  }

  Matrix weight(const py::object& object) const {
    const Tensor t = tensor_of(object, "weight");
    CHECK(ShapeError, t.shape.size() == 2, "weight has ", t.shape.size(), " dims, expected 2");
    return out_in_ ? t.matrix().t() : t.matrix();
  }

  Matrix bias(const py::object& object, const Matrix& w) const {
    const Matrix b = tensor_of(object, "bias").matrix();
    CHECK(ShapeError, b.rows == 1 && b.dtype == w.dtype, "bias is a ", name_of(b.dtype), " of ", b.rows, " rows, expected a vector of ", name_of(w.dtype));
    return b;
  }

  std::shared_ptr<Job> job_;
  bool out_in_;
  size_t maps_ = 0;
  Step step_;
  std::vector<std::shared_ptr<Axis>> kept_;
};

// torch.empty_like where no job's heap is at hand.
py::object like(const py::object& x) { return py::module_::import("torch").attr("empty_like")(x); }

py::object gelu_of(const py::object& x) {
  py::object out = like(x);
  const Matrix z = tensor_of(x, "x").matrix(), y = tensor_of(out, "y").matrix();
  {
    py::gil_scoped_release nogil;
    gelu(z, y);
  }
  return out;
}

py::object gelu_gradient(const py::object& dy, const py::object& x) {
  py::object out = like(x);
  const Matrix g = tensor_of(dy, "dy").matrix(), z = tensor_of(x, "x").matrix(), dz = tensor_of(out, "dx").matrix();
  CHECK(ShapeError, g.rows == z.rows && g.cols == z.cols && g.dtype == z.dtype, "gelu_backward: dy and x differ in shape or dtype");
  {
    py::gil_scoped_release nogil;
    gelu_backward(g, z, dz);
  }
  return out;
}

py::object dropout_of(const py::object& x, double p, uint64_t seed, uint64_t name, uint64_t call, const std::vector<int64_t>& global,
                      const std::vector<int64_t>& offsets, const std::shared_ptr<Job>& job) {
  const Tensor in = tensor_of(x, "x");
  CHECK(ShapeError, global.size() == in.shape.size() && offsets.size() == in.shape.size(), "dropout of ", in.shape.size(), " dims with ", global.size(),
        " global sizes and ", offsets.size(), " offsets");
  CHECK(ShapeError, p >= 0 && p <= 1, "dropout probability is ", p, ", expected 0 to 1");
  py::object out = job ? make_tensor(job, in.shape, in.dtype_name).object : like(x);
  void* data = tensor_of(out, "y").data;
  {
    py::gil_scoped_release nogil;
    dropout(in.data, data, in.dtype, in.shape, global, offsets, {seed, name, call, p});
  }
  return out;
}

void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void define_errors(py::module_& m) {
  py::register_exception<ShapeError>(m, "ShapeError", PyExc_ValueError);
  py::register_exception<MeshError>(m, "MeshError", PyExc_ValueError);
  static py::exception<PeerDied> died(m, "PeerDied", PyExc_RuntimeError);
  static py::exception<PeerStalled> stalled(m, "PeerStalled", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr p) {
    auto raise = [](py::handle type, const PeerError& error) {
      py::object instance = type(error.what());
      instance.attr("rank") = error.rank;
      PyErr_SetObject(type.ptr(), instance.ptr());
    };
    try {
      if (p) std::rethrow_exception(p);
    } catch (const PeerDied& error) {
      raise(died, error);
    } catch (const PeerStalled& error) {
      raise(stalled, error);
    } catch (const OutOfMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    }
  });
}

py::dict traffic_of(Axis& axis, bool reset) {
  const Traffic t = axis.transport().traffic(reset);
  py::dict out;
  out["bytes_sent"] = t.bytes_sent;
  out["bytes_received"] = t.bytes_received;
  out["messages"] = t.messages;
  return out;
}

py::dict memory_of(Job& job) {
  const Heap::Usage u = job.heap().usage();
  py::dict out;
  out["tensors"] = u.tensors;
  out["workspace"] = u.workspace;
  out["workspace_peak"] = u.workspace_peak;
  out["reserved"] = u.reserved;
  out["allocations"] = u.grown;
  return out;
}

}  // namespace
}  // namespace gingham

PYBIND11_MODULE(_C, m) {
  using namespace gingham;
  m.doc() = "gingham's C++ core";
  define_errors(m);
  Control::interrupt = check_signals;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  py::class_<Job, std::shared_ptr<Job>>(m, "Job")
      .def(py::init<int, int, const std::string&, double>(), py::arg("rank"), py::arg("size"), py::arg("path") = "", py::arg("timeout") = 60.0)
      .def_property_readonly("path", &Job::path)
      .def_property_readonly("rank", &Job::rank)
      .def_property_readonly("size", &Job::size)
      .def("ready", [](Job& job) { job.attach(GINGHAM_VERSION); }, nogil)
      .def("fail", [](Job& job, int rank, const std::string& message) { job.control().fail(Control::Kind::died, rank, message); })
      .def("close", &Job::close)
      .def("empty", [](const std::shared_ptr<Job>& job, const std::vector<int64_t>& shape, const std::string& dtype) { return make_tensor(job, shape, dtype).object; })
      .def("memory", &memory_of)
      .def("reset_peak", [](Job& job) { job.heap().reset_peak(); });

  py::class_<Axis, std::shared_ptr<Axis>>(m, "Axis")
      .def(py::init<std::shared_ptr<Job>, int, const std::vector<int>&, double, double>(), py::arg("job"), py::arg("index"), py::arg("members"),
           py::arg("latency") = 0.0, py::arg("bandwidth") = 0.0)
      .def_property_readonly("rank", [](Axis& a) { return a.transport().rank(); })
      .def_property_readonly("size", [](Axis& a) { return a.transport().size(); })
      .def("traffic", &traffic_of, py::arg("reset") = false)
      .def("all_gather", &Axis::all_gather, py::arg("x"), py::arg("source") = "window", py::arg("counted") = true)
      .def("all_reduce_", &Axis::all_reduce, py::arg("x"), py::arg("source") = "window", py::arg("counted") = true)
      .def("reduce_scatter", &Axis::reduce_scatter, py::arg("x"), py::arg("sizes"), py::arg("source") = "window", py::arg("counted") = true)
      .def("broadcast_", &Axis::broadcast, py::arg("x"), py::arg("root"), py::arg("counted") = true)
      .def("exchange", &Axis::exchange, py::arg("sends"), py::arg("recvs"), py::arg("dtype"), py::arg("counted") = true);

  py::class_<OperandSpec>(m, "Operand")
      .def(py::init([](std::shared_ptr<Axis> axis, int dim, std::vector<int64_t> offsets, bool replicated) {
             const bool cut = axis && axis->transport().size() > 1 && !replicated;
             const size_t points = cut && !offsets.empty() ? static_cast<size_t>(axis->transport().size()) + 1 : offsets.size();
             CHECK(ShapeError, offsets.size() == points, "operand cut over ", points - 1, " ranks with ", offsets.size(), " cut points");
             return OperandSpec{std::move(axis), dim, std::move(offsets), replicated};
           }),
           py::arg("axis"), py::arg("dim"), py::arg("offsets"), py::arg("replicated") = false);

  py::class_<BoundStep, std::shared_ptr<BoundStep>>(m, "Step")
      .def(py::init<std::shared_ptr<Job>, const std::string&, const OperandSpec&, const std::vector<OperandSpec>&, const std::vector<OperandSpec>&,
                    std::shared_ptr<Axis>, const std::string&, int64_t, const std::vector<int64_t>&, int, const std::string&, bool>(),
           py::arg("job"), py::arg("name"), py::arg("x"), py::arg("w"), py::arg("y"), py::arg("depth"), py::arg("slice_dim"), py::arg("k"), py::arg("n"),
           py::arg("slices") = 1, py::arg("source") = "window", py::arg("out_in") = true)
      .def("forward", &BoundStep::forward, py::arg("x"), py::arg("ws"), py::arg("biases"), py::arg("epilogue") = "none")
      .def("backward", &BoundStep::backward, py::arg("x"), py::arg("ws"), py::arg("dys"), py::arg("need_x"), py::arg("need_w"), py::arg("need_b"),
           py::arg("reduce_depth") = true);

  m.def("gelu", &gelu_of);
  m.def("gelu_backward", &gelu_gradient, py::arg("dy"), py::arg("x"));
  m.def("dropout", &dropout_of, py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("name"), py::arg("call"), py::arg("global_shape"), py::arg("offsets"),
        py::arg("job") = std::shared_ptr<Job>());
  m.def("version", [] { return GINGHAM_VERSION; });
  m.def("blas", [] { return blas().from; });
  m.def("set_num_threads", &set_blas_threads);
}
