#include "collectives/exchange.h"

#include <algorithm>

#include "collectives/resident.h"

namespace gingham {

std::vector<std::vector<int64_t>> exchange_sizes(Axis& axis, const std::vector<int64_t>& mine) {
  CHECK(ShapeError, mine.size() <= 8, "sizes of ", mine.size(), " numbers, expected at most 8");
  Shape shape;
  shape.ndim = static_cast<int32_t>(mine.size());
  std::copy(mine.begin(), mine.end(), shape.dims);
  Session session(axis, {}, -1, true, shape);
  std::vector<std::vector<int64_t>> out;
  for (int peer = 0; peer < axis.size(); peer++) {
    const Shape theirs = peer == axis.rank() ? shape : axis.board().shape(peer);
    out.emplace_back(theirs.dims, theirs.dims + theirs.ndim);
  }
  session.end();
  return out;
}

void exchange(Axis& axis, const Messages& sends, const Messages& receives, int64_t rows, const Stream& stream) {
  Session session(axis, {}, rows, rows < 0);
  Ring& ring = axis.ring();
  std::vector<Resident> residents;
  ring.group_start();
  for (const auto& [peer, m] : sends) {
    residents.emplace_back(m, axis, stream);
    ring.send(peer, residents.back().view().data, m.bytes());
  }
  for (const auto& [peer, m] : receives) ring.recv(peer, m.data, m.bytes());
  ring.group_end();
  ring.arrived(0);
  for (const auto& [peer, m] : sends) ring.drain(peer);
  session.end();
}

}  // namespace gingham
