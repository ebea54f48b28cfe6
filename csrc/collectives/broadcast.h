// x of rank `root` to every rank, along the ring in chunks: a rank forwards chunk c while chunk c + 1 is on its way.
//   steps (g - 1) + chunks - 1, bytes received per rank: x (none at the root), messages: chunks
#pragma once
#include "base/stream.h"
#include "transport/axis.h"

namespace gingham {

inline int64_t chunks_of(Axis& axis, size_t bytes) {
  return bytes == 0 ? 1 : static_cast<int64_t>((bytes + axis.ring().chunk_bytes() - 1) / axis.ring().chunk_bytes());
}

void broadcast(Axis& axis, const Matrix& x, int root, const Stream& stream);

}  // namespace gingham
