// Messages beside a program's calls as Python sees them.
#pragma once
#include <pybind11/pybind11.h>

namespace gingham {

void define_mailbox(pybind11::module_& m);

}  // namespace gingham
