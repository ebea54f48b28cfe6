#include "collectives/all_gather.h"

#include <algorithm>

#include "collectives/resident.h"

namespace gingham {
namespace {

void through_window(Axis& axis, const Matrix& mine, const Shape& shape, int64_t agreed, const BlockFor& block_for, const Stream& stream) {
  const Resident resident(mine, axis, stream);
  const Matrix posted[] = {resident.view()};
  Session session(axis, posted, agreed, agreed < 0, shape);
  Window& window = *axis.window();
  for (int hop = 1; hop < axis.size(); hop++) {
    const int peer = axis.next(hop);
    const Matrix theirs = window.panel(peer, 0);
    const Matrix block = block_for(peer, axis.board().shape(peer));
    window.wait_get(window.begin_get(peer, theirs.bytes()));
    cast(theirs, block, stream);
  }
  axis.count_sent(mine.bytes() * static_cast<size_t>(axis.size() - 1));
  session.end();
}

void through_ring(Axis& axis, const Matrix& mine, const Shape& shape, int64_t agreed, const BlockFor& block_for, const Stream& stream) {
  Session session(axis, {}, agreed, agreed < 0, shape);
  std::vector<Matrix> blocks;
  size_t room = mine.bytes();
  for (int peer = 0; peer < axis.size(); peer++) {
    blocks.push_back(peer == axis.rank() ? mine : block_for(peer, axis.board().shape(peer)));
    room = std::max(room, blocks.back().bytes());
  }
  session.finish();
  Relay relay(axis, stream, room);
  cast(mine, dense(relay.next(), mine.rows, mine.cols, mine.dtype), stream);
  for (int hop = 1; hop < axis.size(); hop++) {
    const Matrix& sent = blocks[static_cast<size_t>(axis.next(1 - hop))];
    const Matrix& block = blocks[static_cast<size_t>(axis.next(-hop))];
    relay.send(sent.bytes());
    char* buffer = relay.next();
    axis.ring().take(axis.next(-1), buffer, block.bytes());
    cast(dense(buffer, block.rows, block.cols, block.dtype), block, stream);
  }
  relay.drain();
  session.end();
}

}  // namespace

void all_gather(Axis& axis, const Matrix& mine, const Shape& shape, int64_t agreed, const BlockFor& block, const Stream& stream) {
  if (axis.size() == 1) return;
  if (axis.window())
    through_window(axis, mine, shape, agreed, block, stream);
  else
    through_ring(axis, mine, shape, agreed, block, stream);
}

void all_gather(Axis& axis, const Matrix& mine, std::span<const Matrix> blocks, const Stream& stream) {
  const Matrix& own = blocks[static_cast<size_t>(axis.rank())];
  if (own.data != mine.data) cast(mine, own, stream);
  int64_t total = 0;
  for (const Matrix& block : blocks) total += block.count();
  all_gather(axis, mine, {}, total, [blocks](int peer, const Shape&) { return blocks[static_cast<size_t>(peer)]; }, stream);
}

}  // namespace gingham
