#include "binding_engine.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "base/check.h"
#include "base/wait.h"
#include "transport/handed.h"
#include "transport/job.h"
#include "transport/tcp_links.h"
#include "transport/ucx.h"

namespace py = pybind11;

namespace gingham {
namespace {

constexpr double kSlice = 0.1;  // seconds between two looks at signals

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
};

// Contiguous memory of the CPU: of a tensor, or of a buffer.
Memory memory_of(const py::object& x, bool written) {
  if (py::hasattr(x, "data_ptr")) {
    CHECK(ShapeError, x.attr("device").attr("type").cast<std::string>() == "cpu" && x.attr("is_contiguous")().cast<bool>(),
          "an engine moves contiguous tensors of the CPU, got one of shape ", py::str(x.attr("shape")).cast<std::string>(), " on ",
          py::str(x.attr("device")).cast<std::string>());
    return {reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>()), x.attr("nbytes").cast<size_t>()};
  }
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(x).request(written);
  py::ssize_t step = info.itemsize;
  for (size_t dim = info.shape.size(); dim-- > 0; step *= info.shape[dim])
    CHECK(ShapeError, info.shape[dim] < 2 || info.strides[dim] == step, "an engine moves contiguous buffers");
  return {info.ptr, static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize)};
}

// An engine with the objects whose memory it uses.
class BoundEngine {
 public:
  explicit BoundEngine(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) { engine_->interrupt = check_signals; }
  Engine& engine() { return *engine_; }
  std::shared_ptr<Engine> shared() const { return engine_; }
  HandedEngine& handed() {
    auto* const handed = dynamic_cast<HandedEngine*>(engine_.get());
    CHECK(MeshError, handed, "the engine ", engine_->name(), " serves itself");
    return *handed;
  }

  Engine::Ticket post(int peer, uint32_t tag, const py::object& x, bool receives) {
    const Memory m = memory_of(x, receives);
    Engine::Ticket ticket = 0;
    {
      const py::gil_scoped_release nogil;
      ticket = receives ? engine_->post_recv(peer, tag, m.data, m.bytes) : engine_->post_send(peer, tag, m.data, m.bytes);
    }
    kept_[ticket] = x;
    return ticket;
  }

  bool done(Engine::Ticket ticket) {
    bool ended = false;
    try {
      const py::gil_scoped_release nogil;
      ended = engine_->done(ticket);
    } catch (...) {
      kept_.erase(ticket);
      throw;
    }
    if (ended) kept_.erase(ticket);
    return ended;
  }

  // True once the operation has ended, false when the time is over.
  bool wait(Engine::Ticket ticket, double seconds) {
    const double end = now() + seconds;
    for (;;) {
      const uint64_t seen = engine_->changes();
      if (done(ticket)) return true;
      const double left = end - now();
      if (left <= 0) return false;
      {
        const py::gil_scoped_release nogil;
        engine_->rest(std::min(left, kSlice), seen);
      }
      check_signals();
    }
  }

  void withdraw(Engine::Ticket ticket) {
    {
      const py::gil_scoped_release nogil;
      engine_->withdraw(ticket);
    }
    kept_.erase(ticket);
  }

  void connect(const std::map<int, py::bytes>& peers, double seconds) {
    std::vector<EnginePeer> all;
    for (const auto& [rank, address] : peers) all.push_back({rank, address});
    const py::gil_scoped_release nogil;
    engine_->connect(all, seconds);
  }

  void close(double seconds) {
    {
      const py::gil_scoped_release nogil;
      engine_->close(seconds);
    }
    kept_.clear();
  }

 private:
  std::map<Engine::Ticket, py::object> kept_;  // guarded by the GIL; outlives the engine
  std::shared_ptr<Engine> engine_;
};

py::dict report() {
  const UcxFound& found = ucx_found();
  py::dict out;
  out["found"] = found.found;
  out["version"] = found.version;
  out["from"] = found.from;
  return out;
}

void define_handed(py::class_<BoundEngine, std::shared_ptr<BoundEngine>>& engine) {
  engine
      .def(
          "take_lane",
          [](BoundEngine& e, double seconds) -> py::object {
            std::optional<HandedEngine::Lane> lane;
            {
              const py::gil_scoped_release nogil;
              lane = e.handed().take_lane(seconds);
            }
            return lane ? py::object(py::make_tuple(lane->peer, lane->tag, lane->receives)) : py::none();
          },
          py::arg("seconds"))
      .def(
          "await_work",
          [](BoundEngine& e, int peer, uint32_t tag, bool receives, double seconds) {
            if (e.handed().await_work({peer, tag, receives}, 0)) return true;  // without giving the GIL away, which a busy thread keeps for 5 ms
            const py::gil_scoped_release nogil;
            return e.handed().await_work({peer, tag, receives}, seconds);
          },
          py::arg("peer"), py::arg("tag"), py::arg("receives"), py::arg("seconds"))
      .def(
          "take",
          [](BoundEngine& e, int peer, uint32_t tag, bool receives, double seconds) -> py::object {
            std::optional<HandedEngine::Work> work = e.handed().take({peer, tag, receives}, 0);
            if (!work) {
              const py::gil_scoped_release nogil;
              work = e.handed().take({peer, tag, receives}, seconds);
            }
            return work ? py::object(py::make_tuple(work->ticket, reinterpret_cast<uintptr_t>(work->data), work->bytes)) : py::none();
          },
          py::arg("peer"), py::arg("tag"), py::arg("receives"), py::arg("seconds"))
      .def(
          "begin", [](BoundEngine& e, uint64_t ticket) { return reinterpret_cast<uintptr_t>(e.handed().begin(ticket)); }, py::arg("ticket"))
      .def_property_readonly("closing", [](BoundEngine& e) { return e.handed().closing(); })
      .def(
          "ended", [](BoundEngine& e, uint64_t ticket, size_t got, const std::string& error) { e.handed().ended(ticket, got, error); },
          py::arg("ticket"), py::arg("got"), py::arg("error") = "")
      .def(
          "set_failure", [](BoundEngine& e, int peer, const std::string& why) { e.handed().set_failure(peer, why); }, py::arg("peer"), py::arg("why"))
      .def("set_left", [](BoundEngine& e, int peer) { e.handed().set_left(peer); }, py::arg("peer"));
}

}  // namespace

namespace {

using Words = std::tuple<std::string, int, std::string>;  // kind, rank, message
Words words_of(const Verdict& verdict) { return {name_of(verdict.kind), verdict.rank, verdict.message}; }

Verdict verdict_of(const Words& words) {
  const auto& [kind, rank, message] = words;
  return {error_kind(kind), rank, message};
}

// Gives the job ranks on other hosts; the functions are those of Hosts::Calls.
void span(const BoundEngine& engine, Job& job, std::vector<int> host_of, std::vector<std::string> names,
          const std::function<Words(const Words&)>& publish, std::function<std::vector<std::string>(uint64_t)> ask,
          const std::function<std::string(uint64_t, bool, const py::bytes&)>& share) {
  Hosts::Calls calls;
  calls.publish = [publish](const Verdict& verdict) { return verdict_of(publish(words_of(verdict))); };
  calls.ask = std::move(ask);
  calls.share = [share](uint64_t program, bool first, const std::string& bytes) {
    const py::gil_scoped_acquire gil;
    return share(program, first, py::bytes(bytes));
  };
  job.span(std::make_unique<Hosts>(job.rank(), std::move(host_of), std::move(names), engine.shared(), std::move(calls)));
}

}  // namespace

void define_engine(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<BoundEngine, std::shared_ptr<BoundEngine>> engine(m, "Engine");
  engine.def_property_readonly("name", [](BoundEngine& e) { return std::string(e.engine().name()); })
      .def_property_readonly("address", [](BoundEngine& e) { return py::bytes(e.engine().address()); })
      .def("connect", &BoundEngine::connect, py::arg("peers"), py::arg("seconds") = 60.0)
      .def(
          "post_send", [](BoundEngine& e, int peer, uint32_t tag, const py::object& data) { return e.post(peer, tag, data, false); }, py::arg("peer"),
          py::arg("tag"), py::arg("data"))
      .def(
          "post_recv", [](BoundEngine& e, int peer, uint32_t tag, const py::object& data) { return e.post(peer, tag, data, true); }, py::arg("peer"),
          py::arg("tag"), py::arg("data"))
      .def("done", &BoundEngine::done, py::arg("ticket"))
      .def("wait", &BoundEngine::wait, py::arg("ticket"), py::arg("seconds"))
      .def("withdraw", &BoundEngine::withdraw, py::arg("ticket"))
      .def_property_readonly("changes", [](BoundEngine& e) { return e.engine().changes(); })
      .def(
          "rest", [](BoundEngine& e, double seconds, uint64_t since) { e.engine().rest(seconds, since); }, py::arg("seconds"), py::arg("since"),
          nogil)
      .def(
          "failure", [](BoundEngine& e, int peer) { return e.engine().failure(peer); }, py::arg("peer"), nogil)
      .def(
          "left", [](BoundEngine& e, int peer) { return e.engine().left(peer); }, py::arg("peer"), nogil)
      .def("span", &span, py::arg("job"), py::arg("host_of"), py::arg("names"), py::arg("publish"), py::arg("ask"), py::arg("share"))
      .def("close", &BoundEngine::close, py::arg("seconds") = 5.0);
  define_handed(engine);
  m.def(
      "ucx_engine",
      [](int rank, const std::map<std::string, std::string>& settings) {
        const py::gil_scoped_release released;
        return std::make_shared<BoundEngine>(std::make_shared<UcxEngine>(rank, settings));
      },
      py::arg("rank"), py::arg("settings") = std::map<std::string, std::string>());
  m.def(
      "handed_engine", [](int rank, const std::string& name) { return std::make_shared<BoundEngine>(std::make_shared<HandedEngine>(rank, name)); },
      py::arg("rank"), py::arg("name"));
  m.def("set_ucx_path", &set_ucx_path, py::arg("folder"));
  m.def("ucx_report", &report);
  m.def("shut_silent_links", &shut_silent_links, py::arg("epoll"));
  m.def("shut_links", &shut_links, py::arg("epoll"));
  m.def("keep_links_alive", &keep_links_alive, py::arg("epoll"));
}

}  // namespace gingham
