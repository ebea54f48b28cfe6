#include "collectives/reduce.h"

#include <algorithm>

#include "collectives/broadcast.h"
#include "collectives/resident.h"
#include "kernels/accumulate.h"

namespace gingham {

void reduce(Axis& axis, const Matrix& x, int root, const Stream& stream) {
  if (axis.size() == 1) return;
  CHECK(ShapeError, x.empty() || x.rows == 1 || x.row_stride == x.cols, "reduce of a strided matrix");
  Session session(axis, {}, x.count());
  session.finish();
  Ring& ring = axis.ring();
  const bool first = axis.next(-1) == root, last = axis.rank() == root;
  const Matrix flat = dense(x.data, 1, x.count(), x.dtype);
  const int64_t step = static_cast<int64_t>(ring.chunk_bytes() / size_of(x.dtype));
  Relay relay(axis, stream, std::min(ring.chunk_bytes(), x.bytes()));
  for (int64_t c = 0; c < chunks_of(axis, x.bytes()); c++) {
    const Matrix part = flat.slice(1, c * step, std::min(flat.cols, (c + 1) * step));
    const Matrix sum = dense(relay.next(), 1, part.cols, part.dtype);
    if (first)
      cast(part, sum, stream);
    else
      ring.take(axis.next(-1), sum.data, sum.bytes());
    if (last) {
      accumulate(sum, part, stream);
      continue;
    }
    if (!first) accumulate(part, sum, stream);
    relay.send(sum.bytes());
  }
  relay.drain();
  session.end();
}

}  // namespace gingham
