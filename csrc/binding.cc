// The Python module gingham._C: tensors to views, the GIL released around every call that may wait, errors to typed exceptions.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "base/crc32c.h"
#include "base/memory.h"
#include "binding_attention.h"
#include "binding_engine.h"
#include "binding_layers.h"
#include "binding_mailbox.h"
#include "binding_step.h"
#include "kernels/blas.h"
#include "kernels/dropout.h"
#include "kernels/epilogue.h"
#include "kernels/hopper.h"

namespace gingham {
namespace {

// For kernels that run on no mesh: on the CPU, without workspace.
const CpuStream kHere;

// torch.empty_like where no job's heap is at hand.
py::object like(const py::object& x) { return py::module_::import("torch").attr("empty_like")(x); }

py::object gelu_gradient(const Member& member, const py::object& dy, const py::object& x) {
  const OnCallersStream on_stream(member);
  const std::shared_ptr<Job>& job = member.job;
  py::object out = like(x);
  const Matrix g = tensor_of(dy, "dy", job).matrix(), z = tensor_of(x, "x", job).matrix(), dz = tensor_of(out, "dx", job).matrix();
  CHECK(ShapeError, g.rows == z.rows && g.cols == z.cols && g.dtype == z.dtype, "gelu_backward: dy and x differ in shape or dtype");
  {
    py::gil_scoped_release nogil;
    gelu_backward(g, z, dz, job->stream());
  }
  return out;
}

py::object dropout_of(const py::object& x, double p, uint64_t seed, uint64_t name, uint64_t call, const std::vector<int64_t>& global,
                      const std::vector<int64_t>& offsets, const std::optional<Member>& on) {
  const Member member = on.value_or(Member{});
  const OnCallersStream on_stream(member);
  const std::shared_ptr<Job>& job = member.job;
  const Tensor in = tensor_of(x, "x", job);
  CHECK(ShapeError, global.size() == in.shape.size() && offsets.size() == in.shape.size(), "dropout of ", in.shape.size(), " dims with ",
        global.size(), " global sizes and ", offsets.size(), " offsets");
  CHECK(ShapeError, p >= 0 && p <= 1, "dropout probability is ", p, ", expected 0 to 1");
  py::object out = job ? make_tensor(job, in.shape, in.dtype_name).object : like(x);
  void* data = tensor_of(out, "y", job).data;
  {
    py::gil_scoped_release nogil;
    dropout(in.data, data, in.dtype, in.shape, global, offsets, {seed, name, call, p}, job ? job->stream() : kHere);
  }
  return out;
}

// The CRC-32C of a buffer that follows bytes whose sum is `before`.
uint32_t crc32c_of(const py::buffer& data, uint32_t before) {
  const py::buffer_info info = data.request();
  py::ssize_t expected = info.itemsize;
  for (auto dim = info.ndim; dim-- > 0; expected *= info.shape[static_cast<size_t>(dim)]) {
    const auto at = static_cast<size_t>(dim);
    CHECK(ShapeError, info.shape[at] < 2 || info.strides[at] == expected, "crc32c of a buffer that is not contiguous");
  }
  const auto bytes = static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize);
  py::gil_scoped_release nogil;
  return crc32c(before, info.ptr, bytes);
}

void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Raises the class of gingham/errors.py of that name; it is looked up where one is raised, so that the module below needs no core.
void raise_in_python(const char* name, const Error& error, std::optional<int> rank = std::nullopt) {
  py::object instance = py::module_::import("gingham.errors").attr(name)(error.what());
  if (rank) instance.attr("rank") = *rank;
  PyErr_SetObject(py::type::handle_of(instance).ptr(), instance.ptr());
}

void define_errors() {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const ShapeError& error) {
      raise_in_python("ShapeError", error);
    } catch (const MeshError& error) {
      raise_in_python("MeshError", error);
    } catch (const PeerDied& error) {
      raise_in_python("PeerDied", error, error.rank);
    } catch (const PeerStalled& error) {
      raise_in_python("PeerStalled", error, error.rank);
    } catch (const PeerOutOfMemory& error) {
      raise_in_python("PeerOutOfMemory", error, error.rank);
    } catch (const OutOfMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    }
  });
}

py::dict traffic_of(BoundAxis& axis, bool reset) {
  const Traffic t = axis.axis().traffic(reset);
  py::dict out;
  out["bytes_sent"] = t.bytes_sent;
  out["bytes_received"] = t.bytes_received;
  out["messages"] = t.messages;
  if (axis.spans()) out["bytes_crossed"] = t.bytes_crossed;
  return out;
}

py::dict report_of() {
  const DeviceReport r = device_report();
  py::dict out;
  out["built"] = r.built;
  out["devices"] = r.names;
  out["driver"] = r.driver;
  out["runtime"] = r.runtime;
  out["nccl"] = r.nccl;
  out["same_gpu"] = r.same_gpu;
  out["nccl_version"] = r.nccl_version;
  out["nccl_from"] = r.nccl_from;
  out["missing"] = r.missing;
  return out;
}

py::dict memory_of(Job& job) {
  const Heap::Usage u = job.usage();
  py::dict out;
  out["tensors"] = u.tensors;
  out["workspace"] = u.workspace;
  out["workspace_peak"] = u.workspace_peak;
  out["reserved"] = u.reserved;
  out["allocations"] = u.grown;
  return out;
}

void inject(Job& job, const std::vector<std::tuple<std::string, int64_t, std::string>>& faults) {
  std::vector<Fault> out;
  for (const auto& [op, call, kind] : faults) out.push_back({op, call, fault_kind(kind)});
  job.control().inject(std::move(out));
}

void define_job(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  py::class_<Label, std::shared_ptr<Label>>(m, "Label").def(py::init<std::string>(), py::arg("text")).def_readonly("text", &Label::text);

  py::class_<Job, std::shared_ptr<Job>>(m, "Job")
      .def(py::init<int, int, const std::string&, double, size_t, std::vector<int>, uint64_t>(), py::arg("rank"), py::arg("size"),
           py::arg("path") = "", py::arg("timeout") = 60.0, py::arg("heap") = 0, py::arg("locals") = std::vector<int>(), py::arg("nonce") = 0)
      .def_property_readonly("nonce", &Job::nonce)
      .def(
          "told", [](Job& job, uint64_t program) { return py::bytes(job.told(program)); }, py::arg("program"))
      .def(
          "hear",
          [](Job& job, const std::string& kind, int rank, const std::string& message) { job.control().hear({error_kind(kind), rank, message}); },
          py::arg("kind"), py::arg("rank"), py::arg("message"))
      .def_property_readonly("path", &Job::path)
      .def_property_readonly("rank", &Job::rank)
      .def_property_readonly("size", &Job::size)
      .def(
          "ready", [](Job& job, const std::vector<int>& pids) { job.attach(GINGHAM_VERSION, pids); }, py::arg("pids") = std::vector<int>(), nogil)
      .def_property_readonly("watches", [](Job& job) { return job.control().watches(); })
      .def_property_readonly("heap", &Job::heap_bytes)
      .def("inject", &inject, py::arg("faults"))
      .def(
          "trim", [](Job& job, size_t spare) { job.heap().trim(spare); }, py::arg("spare") = 0)
      .def("use_gpu", &use_gpu, py::arg("ordinal"), py::arg("tf32") = false)
      .def("mark", &mark)
      .def("beside", &beside, py::arg("mark") = 0)
      .def("back", &back)
      .def("join", &join)
      .def_property_readonly("has_gpu", [](Job& job) { return job.gpu() != nullptr; })
      .def_property_readonly("gpu", [](Job& job) { return job.gpu() ? job.gpu()->ordinal() : -1; })
      .def_property_readonly("on_host", [](Job& job) { return !job.gpu() || job.gpu()->memory_is_host(); })
      .def("fail", [](Job& job, int rank, const std::string& message) { job.control().fail(Control::Kind::died, rank, message); })
      .def("close", &Job::close)
      .def_property_readonly("orphaned", &Job::orphaned)
      .def("memory", &memory_of)
      .def("reset_peak", &Job::reset_peak);
}

void define_program(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<Member>(m, "Program")
      .def(py::init([](std::shared_ptr<Job> job, uint64_t id, std::vector<int> members, const std::vector<int>& lines, double timeout) {
             std::shared_ptr<Program> program = job->program(id, std::move(members), lines, timeout);
             return Member{std::move(job), std::move(program)};
           }),
           py::arg("job"), py::arg("id"), py::arg("members"), py::arg("lines"), py::arg("timeout") = 60.0, nogil)
      .def_property_readonly("job", [](const Member& member) { return member.job; })
      .def_property_readonly("rank", [](const Member& member) { return member.program->rank(); })
      .def_property_readonly("size", [](const Member& member) { return member.program->size(); })
      .def(
          "pair_with", [](const Member& member, const Member& background) { member.program->pair_with(background.program); }, py::arg("background"))
      .def_property_readonly("epoch", [](const Member& member) { return member.program->epoch(); })
      .def_property_readonly("awaited", [](const Member& member) { return member.program->awaited(); })
      .def_property_readonly("spans", [](const Member& member) { return member.program->spans(); })
      .def(
          "enter", [](const Member& member, uint32_t epoch) { member.program->enter(epoch); }, py::arg("epoch"), nogil)
      .def(
          "leave", [](const Member& member) { member.program->leave(); }, nogil)
      .def("hear", [](const Member& member) { member.program->hear(); })
      .def("close", [](const Member& member) { member.program->close(); })
      .def(
          "empty",
          [](const Member& member, const std::vector<int64_t>& shape, const std::string& dtype, bool lasting) {
            const Calling calling(member.program.get());
            return make_tensor(member.job, shape, dtype, lasting ? Heap::Kind::lasting : Heap::Kind::tensor).object;
          },
          py::arg("shape"), py::arg("dtype"), py::arg("lasting") = false)
      .def("say", [](const Member& member, std::shared_ptr<Label> label) { member.program->say(std::move(label)); })
      .def("note", [](const Member& member, std::shared_ptr<Label> label) { member.program->note(std::move(label)); });

  py::class_<BoundAxis, std::shared_ptr<BoundAxis>>(m, "Axis")
      .def(py::init<Member, int, const std::vector<int>&, const std::string&, double, double>(), py::arg("program"), py::arg("index"),
           py::arg("members"), py::arg("source") = "window", py::arg("latency") = 0.0, py::arg("bandwidth") = 0.0,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("rank", [](BoundAxis& a) { return a.axis().rank(); })
      .def_property_readonly("size", [](BoundAxis& a) { return a.axis().size(); })
      .def_property_readonly("calls", [](BoundAxis& a) { return a.axis().calls(); })
      .def_property_readonly("crosses", [](BoundAxis& a) { return a.axis().crosses_any(); })
      .def_property_readonly("carried_by", [](BoundAxis& a) { return a.axis().carried_by(); })
      .def("traffic", &traffic_of, py::arg("reset") = false)
      .def("all_gather", &BoundAxis::all_gather, py::arg("x"), py::arg("counted") = true, py::arg("rows") = -1)
      .def("all_gather_into", &BoundAxis::all_gather_into, py::arg("x"), py::arg("outs"), py::arg("counted") = true)
      .def("sizes", &BoundAxis::sizes, py::arg("mine"))
      .def("all_reduce_", &BoundAxis::all_reduce, py::arg("x"), py::arg("counted") = true)
      .def("all_reduce_rounded", &BoundAxis::all_reduce_rounded, py::arg("x"), py::arg("dtype"), py::arg("counted") = true)
      .def("reduce_scatter", &BoundAxis::reduce_scatter, py::arg("x"), py::arg("sizes"), py::arg("counted") = true)
      .def("broadcast_", &BoundAxis::broadcast, py::arg("x"), py::arg("root"), py::arg("counted") = true)
      .def("post", &BoundAxis::post, py::arg("sends"), py::arg("recvs"))
      .def("settle", &BoundAxis::settle, py::arg("number"))
      .def("exchange", &BoundAxis::exchange, py::arg("sends"), py::arg("recvs"), py::arg("dtype"), py::arg("counted") = true, py::arg("rows") = -1,
           py::arg("features") = 0);
}

void define_step(py::module_& m) {
  py::class_<OperandSpec>(m, "Operand")
      .def(py::init([](std::shared_ptr<BoundAxis> axis, int dim, std::vector<int64_t> offsets, bool replicated) {
             const bool cut = axis && axis->axis().size() > 1 && !replicated;
             const size_t points = cut && !offsets.empty() ? static_cast<size_t>(axis->axis().size()) + 1 : offsets.size();
             CHECK(ShapeError, offsets.size() == points, "operand cut over ", points - 1, " ranks with ", offsets.size(), " cut points");
             return OperandSpec{std::move(axis), dim, std::move(offsets), replicated};
           }),
           py::arg("axis"), py::arg("dim"), py::arg("offsets"), py::arg("replicated") = false);

  py::class_<BoundEarly, std::shared_ptr<BoundEarly>>(m, "Early");
  py::class_<BoundStep, std::shared_ptr<BoundStep>>(m, "Step")
      .def(py::init<Member, const std::string&, const OperandSpec&, const std::vector<OperandSpec>&, const std::vector<OperandSpec>&,
                    std::shared_ptr<BoundAxis>, const std::string&, int64_t, const std::vector<int64_t>&, int, bool>(),
           py::arg("program"), py::arg("name"), py::arg("x"), py::arg("w"), py::arg("y"), py::arg("depth"), py::arg("slice_dim"), py::arg("k"),
           py::arg("n"), py::arg("slices") = 1, py::arg("out_in") = true)
      .def("forward", &BoundStep::forward, py::arg("x"), py::arg("ws"), py::arg("biases"), py::arg("epilogue") = "none", py::arg("out_dtype") = "",
           py::arg("early") = nullptr)
      .def("early", &BoundStep::early, py::arg("ws"))
      .def("gather", &BoundStep::gather, py::arg("early"))
      .def_property_readonly("gathers_early", &BoundStep::gathers_early)
      .def("backward", &BoundStep::backward, py::arg("x"), py::arg("ws"), py::arg("dys"), py::arg("need_x"), py::arg("need_w"), py::arg("need_b"),
           py::arg("reduce_depth") = true, py::arg("reduce_bias") = true, py::arg("early") = nullptr, py::arg("wide_w") = false);
}

void define_functions(py::module_& m) {
  m.def("gelu_backward", &gelu_gradient, py::arg("program"), py::arg("dy"), py::arg("x"));
  m.def("dropout", &dropout_of, py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("name"), py::arg("call"), py::arg("global_shape"),
        py::arg("offsets"), py::arg("program") = py::none());
  m.def("crc32c", &crc32c_of, py::arg("data"), py::arg("before") = 0);
  m.def("version", [] { return GINGHAM_VERSION; });
  m.attr("max_ranks") = kMaxRanks;
  m.attr("max_host_ranks") = kMaxHostRanks;
  m.def("memory_left", [](const std::string& root) { return memory_left(root).bytes; }, py::arg("root") = "");
  m.def("device_report", &report_of);
  m.def("hopper_status", &hopper_status);
  m.def("set_nccl_path", &set_nccl_path, py::arg("library"));
  m.def("blas", [] { return blas().from; });
  m.def("set_num_threads", &set_blas_threads);
}

}  // namespace
}  // namespace gingham

PYBIND11_MODULE(_C, m) {
  using namespace gingham;
  m.doc() = "gingham's C++ core";
  define_errors();
  Control::interrupt = check_signals;
  define_job(m);
  define_program(m);
  define_step(m);
  define_functions(m);
  define_attention(m);
  define_layers(m);
  define_engine(m);
  define_mailbox(m);
}
