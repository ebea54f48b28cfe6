// The engines between hosts, for Python: to test them alone, and to serve the one whose operations are handed over.
#pragma once
#include <pybind11/pybind11.h>

namespace gingham {

void define_engine(pybind11::module_& m);

}  // namespace gingham
