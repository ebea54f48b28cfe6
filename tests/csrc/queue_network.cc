// Messages between queues of one process, carried by threads of its own. A short send has ended when it is posted, as one that an engine
// copies; a long one when it has been carried, and until then its memory may not change. Of one (peer, tag) messages are matched in order and
// may end in any.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <unordered_map>

#include "base/check.h"
#include "virtual_hosts.h"

namespace gingham {
namespace {

constexpr size_t kShort = 2048;  // bytes
constexpr int kCarriers = 2;

class QueueNetwork : public Network {
 public:
  explicit QueueNetwork(int size);
  ~QueueNetwork() override;
  std::shared_ptr<Engine> engine(int rank) override;
  void lose(int rank) override;

 private:
  class End;
  using Ticket = Engine::Ticket;
  using Key = std::tuple<int, int, uint32_t>;  // from, to, tag
  struct Operation {
    Key key;
    bool receives = false, matched = false, ended = false;
    char* data = nullptr;
    size_t bytes = 0, got = 0;
    std::string error;
    int owner() const { return receives ? std::get<1>(key) : std::get<0>(key); }
    int peer() const { return receives ? std::get<0>(key) : std::get<1>(key); }
  };
  struct Message {
    Ticket ticket = 0;  // of a long send; else `copy` has its data
    std::vector<char> copy;
  };
  struct Channel {
    std::deque<Message> sent;
    std::deque<Ticket> wanted;
  };
  struct Pair {
    Message message;
    Ticket receive;
  };
  struct Rank {
    std::atomic<uint64_t> changes{0};
    std::condition_variable changed;
    bool lost = false, left = false;
    int carried = 0;  // messages of its that are on their way
  };
  Rank& at(int rank) { return *ranks_[static_cast<size_t>(rank)]; }
  Ticket post(const Key& key, bool receives, void* data, size_t bytes);
  void match(Channel& channel);
  void put(const Pair& pair);
  void end(Ticket ticket, size_t got, const std::string& error);
  void carry();
  void end_all_with(int rank);
  std::string why_not(int rank);

  std::mutex mutex_;
  std::condition_variable paired_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::unordered_map<Ticket, Operation> operations_;
  std::map<Key, Channel> channels_;
  std::deque<Pair> pairs_;
  Ticket next_ = 1;
  bool stopping_ = false;
  std::vector<std::thread> carriers_;
};

class QueueNetwork::End final : public Engine {
 public:
  End(QueueNetwork& network, int rank) : network_(network), rank_(rank), me_(network.at(rank)) {}
  const char* name() const override { return "queues"; }
  std::string address() const override { return {}; }
  void connect(const std::vector<EnginePeer>&, double) override {}
  Ticket post_send(int peer, uint32_t tag, const void* data, size_t bytes) override {
    return network_.post({rank_, peer, tag}, false, const_cast<void*>(data), bytes);
  }
  Ticket post_recv(int peer, uint32_t tag, void* data, size_t bytes) override { return network_.post({peer, rank_, tag}, true, data, bytes); }
  bool done(Ticket ticket) override;
  void withdraw(Ticket ticket) override;
  uint64_t changes() const override { return me_.changes.load(); }
  void rest(double seconds, uint64_t since) override {
    std::unique_lock lock(network_.mutex_);
    me_.changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return changes() != since; });
  }
  std::string failure(int peer) override {
    const std::lock_guard lock(network_.mutex_);
    return network_.at(peer).lost ? network_.why_not(peer) : std::string();
  }
  bool left(int peer) override {
    const std::lock_guard lock(network_.mutex_);
    return network_.at(peer).left;
  }
  void close(double) override {
    std::unique_lock lock(network_.mutex_);
    me_.changed.wait(lock, [&] { return me_.carried == 0; });  // that it left is not told before what it sent
    me_.left = true;
    network_.end_all_with(rank_);
  }

 private:
  QueueNetwork& network_;
  const int rank_;
  Rank& me_;
};

QueueNetwork::QueueNetwork(int size) {
  for (int r = 0; r < size; r++) ranks_.push_back(std::make_unique<Rank>());
  for (int i = 0; i < kCarriers; i++) carriers_.emplace_back([this] { carry(); });
}

QueueNetwork::~QueueNetwork() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  paired_.notify_all();
  for (std::thread& carrier : carriers_) carrier.join();
}

std::shared_ptr<Engine> QueueNetwork::engine(int rank) { return std::make_shared<End>(*this, rank); }

std::string QueueNetwork::why_not(int rank) { return concat("rank ", rank, at(rank).lost ? ": connection reset by peer" : " has closed its engine"); }

Engine::Ticket QueueNetwork::post(const Key& key, bool receives, void* data, size_t bytes) {
  const std::lock_guard lock(mutex_);
  const Ticket ticket = next_++;
  Operation& operation = operations_[ticket];
  operation.key = key;
  operation.receives = receives;
  operation.data = static_cast<char*>(data);
  operation.bytes = bytes;
  Channel& channel = channels_[key];
  const Rank& peer = at(operation.peer());
  const bool gone = peer.lost || peer.left;
  if (receives) {
    channel.wanted.push_back(ticket);
    match(channel);
    if (gone && !operation.matched) {
      channel.wanted.pop_back();
      end(ticket, 0, why_not(operation.peer()));
    }
  } else if (gone) {
    end(ticket, 0, why_not(operation.peer()));
  } else {
    Message message{ticket, {}};
    if (bytes <= kShort) {
      message = {0, std::vector<char>(operation.data, operation.data + bytes)};
      end(ticket, bytes, "");
    }
    channel.sent.push_back(std::move(message));
    match(channel);
  }
  return ticket;
}

void QueueNetwork::match(Channel& channel) {
  while (!channel.sent.empty() && !channel.wanted.empty()) {
    Pair pair{std::move(channel.sent.front()), channel.wanted.front()};
    channel.sent.pop_front();
    channel.wanted.pop_front();
    operations_.at(pair.receive).matched = true;
    if (pair.message.ticket) operations_.at(pair.message.ticket).matched = true;
    Rank& sender = at(operations_.at(pair.receive).peer());
    if (sender.left) {
      put(pair);
      continue;
    }
    sender.carried++;
    pairs_.push_back(std::move(pair));
    paired_.notify_one();
  }
}

// At once, what a rank that has left had sent.
void QueueNetwork::put(const Pair& pair) {
  const std::vector<char>& copy = pair.message.copy;
  const Operation& receive = operations_.at(pair.receive);
  if (const size_t fits = std::min(copy.size(), receive.bytes); fits > 0) std::memcpy(receive.data, copy.data(), fits);
  end(pair.receive, copy.size(), "");
}

void QueueNetwork::end(Ticket ticket, size_t got, const std::string& error) {
  Operation& operation = operations_.at(ticket);
  operation.got = got;
  operation.error = error;
  operation.ended = true;
  Rank& owner = at(operation.owner());
  owner.changes++;
  owner.changed.notify_all();
}

void QueueNetwork::carry() {
  uint32_t state = 1;
  std::unique_lock lock(mutex_);
  for (;;) {
    paired_.wait(lock, [&] { return stopping_ || !pairs_.empty(); });
    if (stopping_) return;
    state = state * 1664525 + 1013904223;
    const Pair pair = std::move(pairs_.front());
    pairs_.pop_front();
    const Operation& receive = operations_.at(pair.receive);
    const Operation* const send = pair.message.ticket ? &operations_.at(pair.message.ticket) : nullptr;
    const char* const from = send ? send->data : pair.message.copy.data();
    const size_t bytes = send ? send->bytes : pair.message.copy.size(), fits = std::min(bytes, receive.bytes);
    char* const to = receive.data;
    lock.unlock();
    if (state >> 28 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    if (fits > 0) std::memcpy(to, from, fits);
    lock.lock();
    Rank& sender = at(receive.peer());
    sender.carried--;
    sender.changed.notify_all();
    end(pair.receive, bytes, "");
    if (send) end(pair.message.ticket, bytes, "");
  }
}

void QueueNetwork::end_all_with(int rank) {
  for (auto& [key, channel] : channels_) {
    const auto& [from, to, tag] = key;
    if (from == rank)
      for (; !channel.wanted.empty(); channel.wanted.pop_front()) end(channel.wanted.front(), 0, why_not(rank));
    if (to != rank) continue;
    for (const Message& message : channel.sent)
      if (message.ticket) end(message.ticket, 0, why_not(rank));
    channel.sent.clear();
  }
  for (const auto& each : ranks_) {
    each->changes++;
    each->changed.notify_all();
  }
}

void QueueNetwork::lose(int rank) {
  const std::lock_guard lock(mutex_);
  at(rank).lost = true;
  end_all_with(rank);
}

bool QueueNetwork::End::done(Ticket ticket) {
  const std::lock_guard lock(network_.mutex_);
  const auto found = network_.operations_.find(ticket);
  CHECK(MeshError, found != network_.operations_.end(), "rank ", rank_, ": ticket ", ticket, " has ended already, or was never given");
  if (!found->second.ended) return false;
  const Operation ended = std::move(found->second);
  network_.operations_.erase(found);
  if (!ended.error.empty()) throw PeerDied(ended.peer(), ended.error);
  CHECK(ShapeError, ended.got == ended.bytes, "rank ", rank_, " expected ", ended.bytes, " bytes, got a message of ", ended.got);
  return true;
}

void QueueNetwork::End::withdraw(Ticket ticket) {
  std::unique_lock lock(network_.mutex_);
  const auto found = network_.operations_.find(ticket);
  if (found == network_.operations_.end()) return;
  Operation& operation = found->second;
  if (operation.matched) {
    me_.changed.wait(lock, [&] { return operation.ended; });
  } else if (!operation.ended) {
    Channel& channel = network_.channels_[operation.key];
    if (operation.receives)
      std::erase(channel.wanted, ticket);
    else
      std::erase_if(channel.sent, [&](const Message& message) { return message.ticket == ticket; });
  }
  network_.operations_.erase(ticket);
}

}  // namespace

std::unique_ptr<Network> queue_network(int size) { return std::make_unique<QueueNetwork>(size); }

}  // namespace gingham
