// HandedEngine of every rank, served by one thread: a message moves when both its send and its receive have been posted.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "transport/handed.h"
#include "virtual_hosts.h"

namespace gingham {
namespace {

class HandedNetwork : public Network {
 public:
  explicit HandedNetwork(int size) {
    for (int r = 0; r < size; r++) {
      std::vector<EnginePeer> peers;
      for (int peer = 0; peer < size; peer++)
        if (peer != r) peers.push_back({peer, ""});
      engines_.push_back(std::make_shared<HandedEngine>(r, "test"));
      engines_.back()->connect(peers, 1);
    }
    server_ = std::thread([this] { serve(); });
  }
  ~HandedNetwork() override {
    stopping_ = true;
    server_.join();
  }
  std::shared_ptr<Engine> engine(int rank) override { return engines_[static_cast<size_t>(rank)]; }
  void lose(int rank) override {
    const std::lock_guard lock(mutex_);
    lost_.insert(rank);
  }

 private:
  using Lane = HandedEngine::Lane;
  HandedEngine& at(int rank) { return *engines_[static_cast<size_t>(rank)]; }

  void serve() {
    while (!stopping_) {
      const bool moved = serve_once();
      if (!moved) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  bool serve_once() {
    tell();
    bool moved = false;
    for (int r = 0; r < static_cast<int>(engines_.size()); r++) {
      while (const auto lane = at(r).take_lane(0)) lanes_.insert({r, *lane});
      for (auto each = lanes_.lower_bound({r, {}}); each != lanes_.end() && each->first == r; ++each)
        moved = (gone_.count(each->second.peer) ? refuse(r, each->second) : !each->second.receives && carry(r, each->second)) || moved;
    }
    return moved;
  }
  // Of who is gone: lost, or left in order.
  void tell() {
    const std::lock_guard lock(mutex_);
    for (int r = 0; r < static_cast<int>(engines_.size()); r++) {
      const bool lost = lost_.count(r) != 0;
      if ((!lost && !at(r).closing()) || !gone_.insert(r).second) continue;
      for (int peer = 0; peer < static_cast<int>(engines_.size()); peer++) {
        if (peer == r) continue;
        if (lost)
          at(peer).set_failure(r, "connection reset by peer");
        else
          at(peer).set_left(r);
      }
    }
  }
  bool refuse(int rank, const Lane& lane) {
    bool any = false;
    if (const auto held = held_.find({rank, lane}); held != held_.end()) {
      at(rank).ended(held->second.ticket, 0, "connection reset by peer");
      held_.erase(held);
      any = true;
    }
    while (const auto work = at(rank).take(lane, 0)) {
      at(rank).ended(work->ticket, 0, "connection reset by peer");
      any = true;
    }
    return any;
  }
  // The next message of a lane of sends.
  bool carry(int rank, const Lane& lane) {
    HandedEngine &from = at(rank), &to = at(lane.peer);
    auto held = held_.find({rank, lane});
    if (held == held_.end()) {
      const auto work = from.take(lane, 0);
      if (!work) return false;
      held = held_.insert({{rank, lane}, *work}).first;
    }
    const auto wanted = to.take({rank, lane.tag, true}, 0);
    if (!wanted) return false;
    const HandedEngine::Work sent = held->second;
    held_.erase(held);
    const void* const data = from.begin(sent.ticket);
    if (const size_t fits = std::min(sent.bytes, wanted->bytes); fits > 0) std::memcpy(wanted->data, data, fits);
    from.ended(sent.ticket, sent.bytes, "");
    to.ended(wanted->ticket, sent.bytes, "");
    return true;
  }

  std::vector<std::shared_ptr<HandedEngine>> engines_;
  std::mutex mutex_;
  std::set<int> lost_;
  // The server's own:
  std::set<int> gone_;
  std::set<std::pair<int, Lane>> lanes_;
  std::map<std::pair<int, Lane>, HandedEngine::Work> held_;  // sends that have been taken
  std::atomic<bool> stopping_{false};
  std::thread server_;
};

}  // namespace

std::unique_ptr<Network> handed_network(int size) { return std::make_unique<HandedNetwork>(size); }

}  // namespace gingham
