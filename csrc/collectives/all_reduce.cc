#include "collectives/all_reduce.h"

#include "collectives/all_gather.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"

namespace gingham {

void all_reduce(Axis& axis, const Matrix& x, const Stream& stream) {
  if (axis.size() == 1) return;
  CHECK(ShapeError, x.empty() || x.rows == 1 || x.row_stride == x.cols, "all_reduce of a strided matrix");
  const Matrix flat = dense(x.data, 1, x.count(), x.dtype);
  const Shares shares{flat, 1, chunk(flat.cols, axis.size())};
  const Matrix own = shares[axis.rank()];
  reduce_scatter(axis, shares, own, stream);
  all_gather(axis, own, shares.all(), stream);
}

}  // namespace gingham
