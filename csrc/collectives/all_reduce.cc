#include "collectives/all_reduce.h"

#include <vector>

#include "collectives/all_gather.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"

namespace gingham {

void all_reduce(Axis& axis, const Matrix& x, const Stream& stream) {
  if (axis.size() == 1) return;
  CHECK(ShapeError, x.empty() || x.rows == 1 || x.row_stride == x.cols, "all_reduce of a strided matrix");
  const Matrix flat = dense(x.data, 1, x.count(), x.dtype);
  const std::vector<int64_t> cuts = chunk(flat.cols, axis.size());
  std::vector<Matrix> parts;
  for (size_t i = 0; i + 1 < cuts.size(); i++) parts.push_back(flat.slice(1, cuts[i], cuts[i + 1]));
  const Matrix& own = parts[static_cast<size_t>(axis.rank())];
  const Scratch room(stream, own.bytes());
  const Matrix sum = dense(room.data(), 1, own.cols, x.dtype);
  reduce_scatter(axis, parts, sum, stream);
  all_gather(axis, sum, parts, stream);
}

}  // namespace gingham
