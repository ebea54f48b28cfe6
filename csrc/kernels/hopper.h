// The gemm for Hopper (gemm_sm90.cuh) stays off until it has been compared with the others on the device at hand.
#pragma once
#include <string>

#include "base/stream.h"

namespace gingham {

// Compares it, at the start of a GPU's job and not in the first step, which must not wait for the device; whether it is on. The CPU has none.
bool check_hopper(const Stream& stream);
std::string hopper_status();  // "on", or why it is off, for the calling thread's device

}  // namespace gingham
