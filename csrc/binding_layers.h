// What layers compute beside products, as Python sees it.
#pragma once
#include "binding_tensor.h"

namespace gingham {

void define_layers(py::module_& m);

}  // namespace gingham
