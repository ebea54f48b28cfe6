#include "binding_attention.h"

namespace gingham {

void define_attention(py::module_& m) {
  py::class_<BoundAttention>(m, "Attention")
      .def(py::init([](Member member, std::shared_ptr<BoundAxis> axis, std::vector<int64_t> lengths, int place, const py::object& mask, bool causal,
                       double scale, bool zigzag, int64_t past, double p, std::vector<int64_t> dropout) {
             return BoundAttention(std::move(member), std::move(axis),
                                   {std::move(lengths), place, zigzag, past, causal, scale, p, std::move(dropout)}, mask);
           }),
           py::arg("program"), py::arg("axis"), py::arg("lengths"), py::arg("place"), py::arg("mask") = py::none(), py::arg("causal") = false,
           py::arg("scale") = 1.0, py::arg("zigzag") = false, py::arg("past") = 0, py::arg("p") = 0.0, py::arg("dropout") = std::vector<int64_t>())
      .def("forward", &BoundAttention::forward, py::arg("q"), py::arg("k"), py::arg("v"))
      .def("backward", &BoundAttention::backward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("dout"))
      .def_static(
          "widest_head", [](const Member& member, const std::string& dtype) { return widest_head(dtype_of(dtype), member.job->stream()); },
          py::arg("program"), py::arg("dtype"))                           // that the kernels of the program's device take
      .def_property_readonly("multiplied", &BoundAttention::multiplied);  // multiply-adds of its calls
}

}  // namespace gingham
