// An engine whose operations other threads carry out: post_*() puts them into a queue for each lane, which is a (peer, tag, direction);
// take() gives the next one of a lane, ended() completes it. So an engine of Python's (torch's Gloo) serves the core.
//   server:  lane = take_lane();  // used for the first time: from now on a thread of its own serves it
//            while (await_work(lane)) { .. ;  work = take(lane);  .. move work.data ..;  ended(work.ticket, got, error); }
// Until it is taken, an operation can be withdrawn at once: so a server takes a receive when the message has begun to come. A send can be
// until begin() says where its data are from then on.
#pragma once
#include <atomic>
#include <compare>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "transport/engine.h"

namespace gingham {

class HandedEngine final : public Engine {
 public:
  struct Lane {
    int peer = -1;
    uint32_t tag = 0;
    bool receives = false;
    auto operator<=>(const Lane&) const = default;
  };
  struct Work {
    Ticket ticket = 0;
    void* data = nullptr;
    size_t bytes = 0;
  };

  HandedEngine(int rank, std::string name) : rank_(rank), name_(std::move(name)) {}

  const char* name() const override { return name_.c_str(); }
  std::string address() const override { return {}; }
  void connect(const std::vector<EnginePeer>& peers, double seconds) override;  // the server has connected them
  Ticket post_send(int peer, uint32_t tag, const void* data, size_t bytes) override;
  Ticket post_recv(int peer, uint32_t tag, void* data, size_t bytes) override;
  bool done(Ticket ticket) override;
  void withdraw(Ticket ticket) override;  // throws MeshError where a message has begun and its peer does not go on
  uint64_t changes() const override { return changes_.load(std::memory_order_acquire); }
  void rest(double seconds, uint64_t since) override;
  std::string failure(int peer) override;
  bool left(int peer) override;
  void close(double seconds) override;  // take_lane() and take() give nothing from now on; the server says goodbye to the peers

  // The server's side. These wait, at most `seconds` long; nothing: the time is over, or closing().
  std::optional<Lane> take_lane(double seconds);
  bool await_work(const Lane& lane, double seconds);  // there is something to take
  std::optional<Work> take(const Lane& lane, double seconds);
  bool closing() const { return closed_.load(std::memory_order_acquire); }
  void* begin(Ticket ticket);  // of a send whose peer takes it: where its data are until ended()
  // got: the size of the message that came, in bytes. error: "" or why the peer cannot be reached.
  void ended(Ticket ticket, size_t got, const std::string& error);
  void set_failure(int peer, const std::string& why);
  void set_left(int peer);

 private:
  struct Peer {
    std::string failure;
    bool left = false;
    double left_at = 0;
  };
  struct Operation {
    Lane lane;
    void* data = nullptr;
    size_t bytes = 0, got = 0;
    bool taken = false, begun = false, ended = false, orphaned = false;
    std::string error;
    std::vector<char> copy;  // of what a withdrawn send has still to give
  };
  struct Queue {
    std::deque<Ticket> tickets;
    std::condition_variable posted;  // its own, so that a message wakes one server
  };
  Peer& peer(int rank);
  Ticket post(const Lane& lane, void* data, size_t bytes);
  void change();
  void judge(const Operation& operation, const Peer& peer) const;

  const int rank_;
  const std::string name_;
  std::mutex mutex_;
  std::condition_variable ended_, opened_;
  std::atomic<uint64_t> changes_{0};
  std::atomic<bool> closed_{false};
  std::unordered_map<int, Peer> peers_;
  std::unordered_map<Ticket, Operation> operations_;
  std::map<Lane, Queue> lanes_;
  std::deque<Lane> fresh_;
  Ticket next_ = 1;
};

}  // namespace gingham
