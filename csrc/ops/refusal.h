// How a call begins whose arguments this rank may have to refuse.
#pragma once
#include <algorithm>
#include <functional>
#include <string>

#include "control/program.h"

namespace gingham {

// Publishes the call. A refusal (ShapeError) of this rank's own arguments is published too, so that peers name this rank and do not wait.
inline void begin_or_refuse(Program& program, Call& call, const std::string& name, const std::function<void()>& validate) {
  std::string refusal;
  try {
    validate();
  } catch (const ShapeError& error) {
    refusal = error.what();
    call.invalid = 1;
    std::copy_n(refusal.begin(), std::min(refusal.size(), sizeof(call.note) - 1), call.note);
  }
  program.begin(call);
  if (!refusal.empty()) throw ShapeError(concat("rank ", program.control().rank(), ": ", name, ": ", refusal));
}

}  // namespace gingham
