#include "collectives/broadcast.h"

#include <algorithm>

#include "collectives/resident.h"

namespace gingham {

void broadcast(Axis& axis, const Matrix& x, int root, const Stream& stream) {
  if (axis.size() == 1) return;
  CHECK(ShapeError, x.empty() || x.rows == 1 || x.row_stride == x.cols, "broadcast of a strided matrix");
  const Resident resident(x, axis, stream);
  Session session(axis, {}, x.count());
  session.finish();
  Ring& ring = axis.ring();
  const bool forwards = axis.next() != root;
  const size_t chunk = ring.chunk_bytes();
  char* data = static_cast<char*>(resident.view().data);
  for (int64_t c = 0; c < chunks_of(axis, x.bytes()); c++) {
    const size_t begin = static_cast<size_t>(c) * chunk, bytes = std::min(chunk, x.bytes() - begin);
    if (axis.rank() != root) ring.recv(axis.next(-1), data + begin, bytes);
    if (forwards) ring.send(axis.next(), data + begin, bytes);
  }
  if (axis.rank() != root) ring.arrived(0);
  if (forwards) ring.drain(axis.next());
  if (data != x.data && axis.rank() != root) cast(resident.view(), x, stream);
  session.end();
}

}  // namespace gingham
