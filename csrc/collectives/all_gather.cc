#include "collectives/all_gather.h"

#include <algorithm>

#include "collectives/resident.h"
#include "collectives/route.h"

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

// Blocks on their way through this rank: where each lands, and who gets it from here.
class Blocks {
 public:
  Blocks(Axis& axis, std::vector<Matrix> blocks, const Stream& stream)
      : axis_(axis), ring_(axis.ring()), route_(axis), blocks_(std::move(blocks)), stream_(stream), outbox_(axis, stream) {
    for (size_t place = 0; place < blocks_.size(); place++) landings_.push_back(landing(static_cast<int>(place)));
  }

  void run() {
    const int me = axis_.rank();
    for (int place : route_.elsewhere())
      if (hands_on(place)) ring_.expect(place, at(place).data, at(place).bytes());
    ring_.group_start();
    for (const std::vector<int>& host : route_.hosts())
      if (!route_.is_here(host[0])) outbox_.send(route_.taker(host, me), at(me));
    for (int peer : route_.here())
      if (peer != me) outbox_.send(peer, at(me));
    for (int peer : route_.here())
      if (peer != me) recv(peer, peer);
    if (ring_.queues()) receive_what_is_handed_on();
    ring_.group_end();
    ring_.arrived(0);

    ring_.group_start();
    for (int place : route_.elsewhere()) {
      if (!hands_on(place)) {
        recv(route_.taker(route_.here(), place), place);
        continue;
      }
      if (!ring_.queues()) recv(place, place);
      for (int peer : route_.here())
        if (peer != me) outbox_.send(peer, at(place));
    }
    ring_.group_end();
    ring_.arrived(0);
    for (int place = 0; place < axis_.size(); place++)
      if (place != me && at(place).data != block(place).data) cast(at(place), block(place), stream_);
    outbox_.drain();
  }

 private:
  const Matrix& block(int place) const { return blocks_[static_cast<size_t>(place)]; }
  const Matrix& at(int place) const { return landings_[static_cast<size_t>(place)]; }
  bool hands_on(int place) const { return route_.taker(route_.here(), place) == axis_.rank(); }
  void recv(int from, int place) { ring_.recv(from, at(place).data, at(place).bytes()); }
  void receive_what_is_handed_on() {
    for (int place : route_.elsewhere())
      if (hands_on(place)) recv(place, place);
  }
  // The block itself where it is dense and peers can have it from there, if they shall; this rank's own is packed into what it is not.
  Matrix landing(int place) {
    const Matrix& m = block(place);
    if (place == axis_.rank()) return outbox_.packed(m);
    const bool sent_on = !route_.is_here(place) && hands_on(place);
    return m.empty() || (m.flat() && (axis_.holds(m.data) || !sent_on)) ? m : outbox_.room_like(m);
  }

  Axis& axis_;
  Ring& ring_;
  const Route route_;
  std::vector<Matrix> blocks_, landings_;
  const Stream& stream_;
  Outbox outbox_;
};

void through_ring(Axis& axis, const Matrix& mine, const Shape& shape, int64_t agreed, const BlockFor& block_for, const Stream& stream) {
  Session session(axis, {}, agreed, agreed < 0, shape);
  std::vector<Matrix> blocks;
  for (int peer = 0; peer < axis.size(); peer++) blocks.push_back(peer == axis.rank() ? mine : block_for(peer, axis.board().shape(peer)));
  session.finish();
  Blocks(axis, std::move(blocks), stream).run();
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
