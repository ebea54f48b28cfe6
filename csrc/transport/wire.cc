#include "transport/wire.h"

#include <algorithm>

namespace gingham {
namespace {

constexpr int kHeaderLane = kLanes;  // above the ring's

}  // namespace

Wire::Wire(Program& program, Hosts& hosts, int index, std::vector<int> members, std::unique_ptr<Shm> local)
    : Axis(static_cast<int>(std::find(members.begin(), members.end(), program.rank()) - members.begin()), static_cast<int>(members.size())),
      program_(program),
      hosts_(hosts),
      engine_(hosts.engine()),
      members_(std::move(members)),
      local_(std::move(local)),
      tag_(static_cast<uint32_t>(program.id() % 65536) << 10 | static_cast<uint32_t>(index) << 4),
      peers_(members_.size()) {
  CHECK(MeshError, rank_ < size_, "rank ", program.member(program.rank()), " is not among the members of its own axis");
  CHECK(MeshError, index < 64, "axis ", index, " of a program over several hosts, expected at most 63");
  int locals = 0;
  for (size_t i = 0; i < members_.size(); i++) {
    peers_[i].rank = program.member(members_[i]);
    peers_[i].here = program.here(members_[i]);
    if (peers_[i].here) peers_[i].local = locals++;
  }
}

template <class F>
void Wire::for_each_move(F&& visit) {
  for (Peer& peer : peers_) {
    visit(peer.sent);
    visit(peer.coming);
    for (auto* lanes : {peer.sends, peer.receives})
      for (int lane = 0; lane < kLanes; lane++)
        for (Move& move : lanes[lane]) visit(move);
  }
}

// What an error left open must not be written to any more.
Wire::~Wire() {
  for_each_move([this](Move& move) {
    if (!move.open) return;
    try {
      engine_.withdraw(move.ticket);
    } catch (const std::exception&) {
      // its peer does not go on: the engine keeps it until it is closed, which is before the memory goes
    }
  });
}

bool Wire::ended(Move& move) {
  if (move.open && engine_.done(move.ticket)) move.open = false;
  return !move.open;
}

struct Wire::Arrival : Condition {
  Arrival(Wire& wire, Move& move) : wire(wire), move(move) {}
  bool met() override {
    seen = wire.engine_.changes();
    return wire.ended(move);
  }
  void sleep(int milliseconds) override { wire.engine_.rest(1e-3 * milliseconds, seen); }
  Wire& wire;
  Move& move;
  uint64_t seen = 0;
};

void Wire::await(int peer, Move& move) {
  if (!move.open) return;
  Arrival arrival(*this, move);
  try {
    program_.wait(arrival, members_[static_cast<size_t>(peer)]);
  } catch (const PeerDied& error) {  // the job's own, or the engine's, which the others are to know
    const int rank = at(peer).rank;
    const std::string where = concat("rank ", rank, " on ", hosts_.host(rank));
    program_.fail(ErrorKind::died, rank,
                  engine_.left(rank) ? concat(where, " left the job (destroy or exit) while others wait for it")
                                     : concat(where, " died, or cannot be reached: ", error.what()));
    program_.control().raise();
  } catch (const ShapeError& error) {
    program_.fail(ErrorKind::shape, program_.control().rank(), error.what());
    program_.control().raise();
  }
}

Wire::Move Wire::begin_send(Peer& peer, int lane, const void* data, size_t bytes) {
  return {engine_.post_send(peer.rank, tag(lane), data, bytes), true, bytes};
}

Wire::Move Wire::begin_recv(Peer& peer, int lane, void* data, size_t bytes) {
  return {engine_.post_recv(peer.rank, tag(lane), data, bytes), true, bytes};
}

void Wire::post(std::span<const Matrix>, int64_t rows, bool uneven, const Shape& shape) {
  if (local_) local_->post({}, rows, uneven, shape);
  mine_ = {program_.key(), rows, uneven, shape, program_.call()};
  for (Peer& peer : peers_) {
    if (peer.here) continue;
    peer.checked = false;
    peer.coming = begin_recv(peer, kHeaderLane, &peer.header, sizeof(Header));
    peer.sent = begin_send(peer, kHeaderLane, &mine_, sizeof(Header));
  }
}

const Wire::Header& Wire::header_of(int peer) {
  Peer& theirs = at(peer);
  if (theirs.checked) return theirs.header;
  await(peer, theirs.coming);
  if (theirs.header.key != mine_.key || (!mine_.uneven && theirs.header.rows != mine_.rows)) program_.mismatch(members_);
  theirs.checked = true;
  return theirs.header;
}

int64_t Wire::rows(int peer) {
  if (peer == rank_) return mine_.rows;
  return at(peer).here ? local_->rows(at(peer).local) : header_of(peer).rows;
}

Shape Wire::shape(int peer) {
  if (peer == rank_) return mine_.shape;
  return at(peer).here ? local_->shape(at(peer).local) : header_of(peer).shape;
}

void Wire::finish() {
  if (local_) local_->finish();
  for (int peer = 0; peer < size_; peer++)
    if (!at(peer).here) header_of(peer);
}

void Wire::retire() {
  if (local_) local_->retire();
  for (int hop = 1; hop < size_; hop++)
    if (const int peer = next(hop); !at(peer).here) await(peer, at(peer).sent);
}

void Wire::send(int peer, const void* data, size_t bytes, int lane) {
  Peer& to = at(peer);
  if (to.here)
    local_->send(to.local, data, bytes, lane);
  else
    to.sends[lane].push_back(begin_send(to, lane, data, bytes));
  count_sent(bytes);
}

void Wire::expect(int peer, void* data, size_t bytes, int lane) {
  Peer& from = at(peer);
  if (!from.here) from.receives[lane].push_back(begin_recv(from, lane, data, bytes));
}

bool Wire::ready(int peer, int lane) {
  Peer& from = at(peer);
  if (from.here) return local_->ready(from.local, lane);
  return !from.receives[lane].empty() && ended(from.receives[lane].front());
}

void Wire::recv(int peer, void* data, size_t bytes, int lane) {
  Peer& from = at(peer);
  if (from.here) {
    local_->recv(from.local, data, bytes, lane);
  } else {
    auto& coming = from.receives[lane];
    if (coming.empty()) coming.push_back(begin_recv(from, lane, data, bytes));
    await(peer, coming.front());
    coming.pop_front();
  }
  count_received(bytes, !from.here);
}

void Wire::drain(int peer, int lane, uint32_t left) {
  Peer& to = at(peer);
  if (to.here) return local_->drain(to.local, lane, left);
  for (auto& sends = to.sends[lane]; sends.size() > left; sends.pop_front()) await(peer, sends.front());
}

}  // namespace gingham
