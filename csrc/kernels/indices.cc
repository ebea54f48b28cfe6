#include "kernels/indices.h"

#include <algorithm>
#include <limits>

namespace gingham {

void find_wrong(const int64_t* ids, int64_t count, int64_t classes, int64_t ignored, int64_t* found, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, find_wrong(ids, count, classes, ignored, found, stream));
  int64_t least = std::numeric_limits<int64_t>::max(), most = std::numeric_limits<int64_t>::min(), wrong = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = ids[i];
    if ((id >= 0 && id < classes) || id == ignored) continue;
    least = std::min(least, id);
    most = std::max(most, id);
    wrong++;
  }
  found[0] = least;
  found[1] = most;
  found[2] = wrong;
}

}  // namespace gingham
