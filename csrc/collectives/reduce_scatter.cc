#include "collectives/reduce_scatter.h"

#include <algorithm>

#include "collectives/resident.h"
#include "kernels/accumulate.h"

namespace gingham {
namespace {

// What all ranks of the axis must agree on before the first byte.
int64_t total(std::span<const Matrix> parts) {
  int64_t count = 0;
  for (const Matrix& part : parts) count += part.count();
  return count;
}

void through_window(Transport& axis, std::span<const Matrix> parts, const Matrix& out, const Stream& stream) {
  const Resident sum(out, axis, stream);
  const Matrix posted[] = {sum.view()};
  axis.post(posted, total(parts), false);
  axis.meet();
  for (int turn = 0; turn < axis.size(); turn++) {
    const int owner = axis.next(-1 - turn);
    const Matrix& part = parts[static_cast<size_t>(owner)];
    const Matrix theirs = owner == axis.rank() ? sum.view() : axis.panel(owner, 0);
    if (turn == 0) {
      cast(part, theirs, stream);
    } else {
      axis.await_turn();
      axis.arrive(axis.fetch(axis.next(-1), part.bytes()));
      accumulate(part, theirs, stream);
    }
    if (owner != axis.rank()) axis.offered(part.bytes());
    axis.advance();
  }
  axis.finish();
  axis.retire();
  if (sum.view().data != out.data) cast(sum.view(), out, stream);
}

void through_ring(Transport& axis, std::span<const Matrix> parts, const Matrix& out, const Stream& stream) {
  axis.post({}, total(parts), false);
  axis.meet();
  axis.finish();
  size_t room = 0;
  for (const Matrix& p : parts) room = std::max(room, p.bytes());
  Relay relay(axis, stream, room);
  for (int turn = 0; turn < axis.size(); turn++) {
    const Matrix& part = parts[static_cast<size_t>(axis.next(-1 - turn))];
    const Matrix sum = dense(relay.next(), part.rows, part.cols, part.dtype);
    if (turn == 0)
      cast(part, sum, stream);
    else
      axis.take(axis.next(-1), sum.data, sum.bytes());
    if (turn + 1 == axis.size()) {
      accumulate_into(sum, part, out, stream);
      break;
    }
    if (turn > 0) accumulate(part, sum, stream);
    relay.send(sum.bytes());
  }
  relay.drain();
  axis.retire();
}

}  // namespace

void reduce_scatter(Transport& axis, std::span<const Matrix> parts, const Matrix& out, Source source, const Stream& stream) {
  if (axis.size() == 1) {
    if (parts[0].data != out.data) cast(parts[0], out, stream);
    return;
  }
  if (source == Source::window)
    through_window(axis, parts, out, stream);
  else
    through_ring(axis, parts, out, stream);
}

}  // namespace gingham
