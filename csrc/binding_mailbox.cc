#include "binding_mailbox.h"

#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "base/wait.h"
#include "binding_tensor.h"
#include "transport/mailbox.h"

namespace gingham {
namespace {

class BoundMailbox {
 public:
  BoundMailbox(Member member, int letters) : member_(std::move(member)), box_(*member_.job, *member_.program, letters) {}

  Mailbox& box() { return box_; }

  void send(int peer, int letter, const py::object& x) {
    const Tensor t = tensor_of(x, "x", member_.job);
    const py::gil_scoped_release nogil;
    box_.send(peer, letter, t.data, t.dtype_name, t.shape);
  }

  py::object receive(int peer, int letter) {
    const auto [shape, dtype] = awaited(peer, letter);
    const Calling calling(member_.program.get());
    Made made = make_tensor(member_.job, shape, dtype);
    const Matrix room = Tensor{made.data, dtype_of(dtype), dtype, shape}.matrix();
    {
      const py::gil_scoped_release nogil;
      box_.take(letter, room.data, room.bytes());
    }
    return std::move(made.object);
  }

  // x: of any device; its data go another way.
  void tell(int peer, int letter, const py::object& x) {
    const Tensor t = tensor_of(x, "x", member_.job);
    const py::gil_scoped_release nogil;
    box_.tell(peer, letter, t.dtype_name, t.shape);
  }

  std::pair<std::vector<int64_t>, std::string> hear(int peer, int letter) {
    auto found = awaited(peer, letter);
    box_.take(letter, nullptr, 0);
    return found;
  }

 private:
  std::pair<std::vector<int64_t>, std::string> awaited(int peer, int letter) {
    const py::gil_scoped_release nogil;
    const Letter& found = box_.await(peer, letter);
    return {{found.shape.dims, found.shape.dims + found.shape.ndim}, found.dtype};
  }

  Member member_;
  Mailbox box_;
};

// Something that another thread of this process does, and a rank waits for as it does for its peers.
struct Flag {
  Word word;
};

}  // namespace

void define_mailbox(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<BoundMailbox, std::shared_ptr<BoundMailbox>>(m, "Mailbox")
      .def(py::init<Member, int>(), py::arg("program"), py::arg("letters"))
      .def_property_readonly("offset", [](BoundMailbox& each) { return each.box().offset(); })
      .def(
          "open", [](BoundMailbox& each, int peer, uint64_t offset) { each.box().open(peer, offset); }, py::arg("peer"), py::arg("offset"))
      .def("send", &BoundMailbox::send, py::arg("peer"), py::arg("letter"), py::arg("x"))
      .def("receive", &BoundMailbox::receive, py::arg("peer"), py::arg("letter"))
      .def("tell", &BoundMailbox::tell, py::arg("peer"), py::arg("letter"), py::arg("x"))
      .def("hear", &BoundMailbox::hear, py::arg("peer"), py::arg("letter"))
      .def(
          "await_taken", [](BoundMailbox& each, int peer, int letter) { each.box().await_taken(peer, letter); }, py::arg("peer"), py::arg("letter"),
          nogil);

  py::class_<Flag, std::shared_ptr<Flag>>(m, "Flag")
      .def(py::init<>())
      .def("set", [](Flag& flag) { flag.word.store(1); })
      .def(
          "wait",
          [](Flag& flag, const Member& member, int peer, const std::string& doing) { member.program->wait(flag.word, 1, peer, doing.c_str()); },
          py::arg("program"), py::arg("peer"), py::arg("doing"), nogil);
}

}  // namespace gingham
