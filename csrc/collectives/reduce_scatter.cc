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

void through_window(Axis& axis, std::span<const Matrix> parts, const Matrix& out, const Stream& stream) {
  const Resident sum(out, axis, stream);
  const Matrix posted[] = {sum.view()};
  Session session(axis, posted, total(parts));
  Window& window = *axis.window();
  for (int turn = 0; turn < axis.size(); turn++) {
    const int owner = axis.next(-1 - turn);
    const Matrix& part = parts[static_cast<size_t>(owner)];
    const Matrix theirs = owner == axis.rank() ? sum.view() : window.panel(owner, 0);
    if (turn == 0) {
      cast(part, theirs, stream);
    } else {
      window.await_turn();
      window.wait_get(window.begin_get(axis.next(-1), part.bytes()));
      accumulate(part, theirs, stream);
    }
    if (owner != axis.rank()) axis.count_sent(part.bytes());
    window.advance();
  }
  session.end();
  if (sum.view().data != out.data) cast(sum.view(), out, stream);
}

void through_ring(Axis& axis, std::span<const Matrix> parts, const Matrix& out, const Stream& stream) {
  Session session(axis, {}, total(parts));
  session.finish();
  size_t room = 0;
  for (const Matrix& p : parts) room = std::max(room, p.bytes());
  Relay relay(axis, stream, room);
  for (int turn = 0; turn < axis.size(); turn++) {
    const Matrix& part = parts[static_cast<size_t>(axis.next(-1 - turn))];
    const Matrix sum = dense(relay.next(), part.rows, part.cols, part.dtype);
    if (turn == 0)
      cast(part, sum, stream);
    else
      axis.ring().take(axis.next(-1), sum.data, sum.bytes());
    if (turn + 1 == axis.size()) {
      accumulate_into(sum, part, out, stream);
      break;
    }
    if (turn > 0) accumulate(part, sum, stream);
    relay.send(sum.bytes());
  }
  relay.drain();
  session.end();
}

}  // namespace

void reduce_scatter(Axis& axis, std::span<const Matrix> parts, const Matrix& out, const Stream& stream) {
  if (axis.size() == 1) {
    if (parts[0].data != out.data) cast(parts[0], out, stream);
    return;
  }
  if (axis.window())
    through_window(axis, parts, out, stream);
  else
    through_ring(axis, parts, out, stream);
}

}  // namespace gingham
