#include "ops/step.h"

namespace gingham {

Step::Step(Program& program, const Stream& stream, Config config) : program_(program), stream_(stream), config_(std::move(config)) {
  CHECK(ShapeError, !config_.maps.empty() && config_.maps.size() <= 3, "a step takes 1 to 3 weights, got ", config_.maps.size());
  CHECK(ShapeError, config_.slices >= 1, "slices=", config_.slices, ", expected at least 1");
}

}  // namespace gingham
