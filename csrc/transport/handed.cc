#include "transport/handed.h"

#include <algorithm>
#include <chrono>

#include "base/check.h"
#include "base/wait.h"

namespace gingham {
namespace {

std::chrono::duration<double> of(double seconds) { return std::chrono::duration<double>(std::clamp(seconds, 0.0, 3600.0)); }

}  // namespace

HandedEngine::Peer& HandedEngine::peer(int rank) {
  CHECK(MeshError, !closing(), "rank ", rank_, ": the engine is closed");
  const auto found = peers_.find(rank);
  CHECK(MeshError, found != peers_.end(), "rank ", rank_, ": rank ", rank, " is no peer of this engine; connect() names them");
  return found->second;
}

void HandedEngine::change() {
  changes_.fetch_add(1, std::memory_order_acq_rel);
  ended_.notify_all();
}

void HandedEngine::connect(const std::vector<EnginePeer>& peers, double) {
  const std::lock_guard lock(mutex_);
  for (const EnginePeer& each : peers) {
    CHECK(MeshError, each.rank != rank_, "rank ", rank_, " connects to rank ", each.rank, ", itself");
    CHECK(MeshError, each.address.empty(), "rank ", rank_, ": rank ", each.rank, " gave the address of another engine than ", name_,
          "; all ranks must choose the same engine");
    peers_[each.rank];
  }
}

Engine::Ticket HandedEngine::post(const Lane& lane, void* data, size_t bytes) {
  CHECK(MeshError, lane.tag < kTags, "rank ", rank_, ": tag ", lane.tag, " of a message, expected below 2^31");
  const std::lock_guard lock(mutex_);
  peer(lane.peer);
  const Ticket ticket = next_++;
  Operation& operation = operations_[ticket];
  operation.lane = lane;
  operation.data = data;
  operation.bytes = bytes;
  const auto [queue, is_new] = lanes_.try_emplace(lane);
  queue->second.tickets.push_back(ticket);
  queue->second.posted.notify_one();
  if (is_new) {
    fresh_.push_back(lane);
    opened_.notify_one();
  }
  return ticket;
}

Engine::Ticket HandedEngine::post_send(int peer, uint32_t tag, const void* data, size_t bytes) {
  return post({peer, tag, false}, const_cast<void*>(data), bytes);
}

Engine::Ticket HandedEngine::post_recv(int peer, uint32_t tag, void* data, size_t bytes) { return post({peer, tag, true}, data, bytes); }

bool HandedEngine::done(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  const auto found = operations_.find(ticket);
  CHECK(MeshError, found != operations_.end() && !found->second.orphaned, "rank ", rank_, ": ticket ", ticket,
        " has ended already, or was never given");
  if (!found->second.ended) return false;
  const Operation ended = std::move(found->second);
  operations_.erase(found);
  judge(ended, peers_[ended.lane.peer]);
  return true;
}

void HandedEngine::judge(const Operation& o, const Peer& peer) const {
  const bool receives = o.lane.receives;
  CHECK(ShapeError, !o.error.empty() || o.got == o.bytes, "rank ", rank_, " expected ", o.bytes, " bytes from rank ", o.lane.peer, " under tag ",
        o.lane.tag, ", got a message of ", o.got, " bytes: the two ranks do not run the same call");
  if (o.error.empty()) return;
  throw PeerDied(o.lane.peer, concat("rank ", rank_, receives ? " waited for " : " was sending ", o.bytes,
                                     receives ? " bytes from rank " : " bytes to rank ", o.lane.peer, " under tag ", o.lane.tag, ", ",
                                     peer.left ? "which has closed its engine in order" : "whose connection broke: " + o.error));
}

void HandedEngine::withdraw(Ticket ticket) {
  std::unique_lock lock(mutex_);
  const auto found = operations_.find(ticket);
  if (found == operations_.end() || found->second.orphaned) return;
  Operation& o = found->second;
  if (o.taken && !o.lane.receives && !o.begun && !o.ended) {
    // its peer expects it, so the server sends a copy, when the peer takes it
    const char* data = static_cast<const char*>(o.data);
    o.copy.assign(data, data + o.bytes);
    o.data = o.copy.data();
    o.orphaned = true;
    return;
  }
  if (!o.taken) std::erase(lanes_[o.lane].tickets, ticket);
  constexpr double kPatience = 5;
  const bool free = ended_.wait_for(lock, of(kPatience), [&] { return !o.taken || o.ended; });
  CHECK(MeshError, free, "rank ", rank_, ": a message of ", o.bytes, o.lane.receives ? " bytes from rank " : " bytes to rank ", o.lane.peer,
        " under tag ", o.lane.tag, " is on its way and does not end, so its memory cannot be given back: this job is over");
  operations_.erase(ticket);
}

void HandedEngine::rest(double seconds, uint64_t since) {
  std::unique_lock lock(mutex_);
  ended_.wait_for(lock, of(seconds), [&] { return changes() != since || closing(); });
}

std::string HandedEngine::failure(int rank) {
  const std::lock_guard lock(mutex_);
  const Peer& p = peer(rank);
  return p.left || p.failure.empty() ? std::string() : concat("rank ", rank, ", whose connection broke: ", p.failure);
}

bool HandedEngine::left(int rank) {
  const std::lock_guard lock(mutex_);
  const Peer& p = peer(rank);
  if (!p.left) return false;
  // What the peer sent before its goodbye is here, but the thread that serves the lane may not have said so yet.
  constexpr double kHandingOver = 1;
  const bool under_way = std::any_of(operations_.begin(), operations_.end(), [rank](const auto& each) {
    const Operation& o = each.second;
    return o.lane.receives && o.lane.peer == rank && !o.ended && !o.orphaned;
  });
  return !under_way || now() - p.left_at > kHandingOver;
}

void HandedEngine::close(double) {
  const std::lock_guard lock(mutex_);
  closed_.store(true, std::memory_order_release);
  opened_.notify_all();
  for (auto& [lane, queue] : lanes_) queue.posted.notify_all();
  change();
}

std::optional<HandedEngine::Lane> HandedEngine::take_lane(double seconds) {
  std::unique_lock lock(mutex_);
  opened_.wait_for(lock, of(seconds), [&] { return closing() || !fresh_.empty(); });
  if (closing() || fresh_.empty()) return std::nullopt;
  const Lane lane = fresh_.front();
  fresh_.pop_front();
  return lane;
}

bool HandedEngine::await_work(const Lane& lane, double seconds) {
  std::unique_lock lock(mutex_);
  Queue& queue = lanes_[lane];
  return queue.posted.wait_for(lock, of(seconds), [&] { return closing() || !queue.tickets.empty(); }) && !closing();
}

std::optional<HandedEngine::Work> HandedEngine::take(const Lane& lane, double seconds) {
  std::unique_lock lock(mutex_);
  Queue& queue = lanes_[lane];
  queue.posted.wait_for(lock, of(seconds), [&] { return closing() || !queue.tickets.empty(); });
  if (closing() || queue.tickets.empty()) return std::nullopt;
  const Ticket ticket = queue.tickets.front();
  queue.tickets.pop_front();
  Operation& o = operations_.at(ticket);
  o.taken = true;
  return Work{ticket, o.data, o.bytes};
}

void* HandedEngine::begin(Ticket ticket) {
  const std::lock_guard lock(mutex_);
  Operation& o = operations_.at(ticket);
  o.begun = true;
  return o.data;
}

void HandedEngine::ended(Ticket ticket, size_t got, const std::string& error) {
  const std::lock_guard lock(mutex_);
  const auto found = operations_.find(ticket);
  CHECK(MeshError, found != operations_.end() && !found->second.ended, "ticket ", ticket, " ended twice, or was never given");
  if (found->second.orphaned) {
    operations_.erase(found);
    return;
  }
  found->second.got = got;
  found->second.error = error;
  found->second.ended = true;
  change();
}

void HandedEngine::set_failure(int rank, const std::string& why) {
  const std::lock_guard lock(mutex_);
  Peer& p = peers_[rank];
  if (p.failure.empty()) p.failure = why;
  change();
}

void HandedEngine::set_left(int rank) {
  const std::lock_guard lock(mutex_);
  Peer& p = peers_[rank];
  p.left = true;
  p.left_at = now();
  change();
}

}  // namespace gingham
