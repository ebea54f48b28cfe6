// Streams, events and the points that streams reach.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "capture.h"
#include "fake.h"

namespace fake {

class Stream;
bool tracing();  // of trace.cc
void trace(const Stream& stream, char what, const std::string& text);

// A point that a stream reaches.
class Ticket {
 public:
  void punch() {
    const std::lock_guard lock(mutex_);
    done_ = true;
    when_ = std::chrono::steady_clock::now();
    changed_.notify_all();
  }
  bool done() {
    const std::lock_guard lock(mutex_);
    return done_;
  }
  std::chrono::steady_clock::time_point when() {
    const std::lock_guard lock(mutex_);
    return when_;
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::chrono::steady_clock::time_point when_;

 public:
  static inline std::atomic<uint64_t> made{0};
  const uint64_t number = made++;
  std::map<const Stream*, uint64_t> clock;  // of the stream where the event was recorded
  std::shared_ptr<Capture> capture;         // that the stream was part of
};

// Where several streams of a device share one, work waits for all that the host queued before it.
class HardwareQueue {
 public:
  uint64_t add() { return next_++; }
  void await(uint64_t turn) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return turn_ == turn; });
  }
  void done() {
    const std::lock_guard lock(mutex_);
    turn_++;
    changed_.notify_all();
  }
  // Of the process; null where each stream has its own.
  static HardwareQueue* of(int device, int stream) {
    static const int count = getenv("FAKE_CUDA_QUEUES") ? atoi(getenv("FAKE_CUDA_QUEUES")) : 0;
    if (count == 0) return nullptr;
    static std::mutex mutex;
    static auto& queues = *new std::map<std::pair<int, int>, std::unique_ptr<HardwareQueue>>;
    const std::lock_guard lock(mutex);
    auto& found = queues[{device, stream % count}];
    if (!found) found = std::make_unique<HardwareQueue>();
    return found.get();
  }

 private:
  std::atomic<uint64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t turn_ = 0;
};

// A piece of captured work, and the ticket that it punches or waits for.
struct Node {
  std::function<void()> work;
  const Ticket* punches;
  const Ticket* waits;
};

inline std::atomic<uint64_t> legacy_uses{0}, legacy_joins{0};
inline thread_local int current_device = 0;

class Stream {
 public:
  Stream(int on, bool waits_for_legacy) : device(on), blocking(waits_for_legacy), thread_([this] { run(); }) {
    const std::lock_guard lock(all_mutex);
    all.insert(this);
  }
  ~Stream() {
    if (const auto held = capture()) {
      const std::lock_guard lock(captures_mutex);
      held->broken.store(true);
      held->members.erase(std::find(held->members.begin(), held->members.end(), this));
      leave();
    }
    {
      const std::lock_guard lock(all_mutex);
      all.erase(this);
    }
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  void add(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    clock_[this]++;
    push(std::move(work));
  }
  std::shared_ptr<Ticket> ticket() {
    auto ticket = std::make_shared<Ticket>();
    const std::lock_guard lock(mutex_);
    ticket->clock = clock_;
    ticket->capture = capture_;
    trace(*this, 'R', std::to_string(ticket->number));
    push([ticket] { ticket->punch(); }, ticket.get());
    return ticket;
  }
  void wait_for(const std::shared_ptr<Ticket>& ticket) {
    const std::lock_guard lock(mutex_);
    for (const auto& [stream, work] : ticket->clock) clock_[stream] = std::max(clock_[stream], work);
    trace(*this, 'W', std::to_string(ticket->number));
    push([ticket] { ticket->wait(); }, nullptr, ticket.get());
  }
  std::map<const Stream*, uint64_t> clock() {
    const std::lock_guard lock(mutex_);
    return clock_;
  }
  std::shared_ptr<Capture> capture() {
    const std::lock_guard lock(mutex_);
    return capture_;
  }
  // Its work is kept from now on. With captures_mutex held. That it is part of the capture counts as work, so that it has to come back to the
  // origin even where it did nothing but wait, as CUDA's guide says of all streams of a capture.
  void join(const std::shared_ptr<Capture>& capture) {
    capture->members.push_back(this);
    const std::lock_guard lock(mutex_);
    clock_[this]++;
    capture_ = capture;
  }
  // Its part of a graph, which then is nobody's, and the graph itself, as a launch puts it on this stream.
  std::deque<Node> leave() {
    const std::lock_guard lock(mutex_);
    capture_.reset();
    return std::exchange(kept_, {});
  }
  void launch(std::deque<Node> nodes) {
    const std::lock_guard lock(mutex_);
    for (Node& node : nodes) push(std::move(node.work));
  }
  // Whether it has waited for all that the others have been given.
  bool has_joined(const std::vector<Stream*>& others) {
    const auto known = clock();
    return std::all_of(others.begin(), others.end(), [&](Stream* other) {
      const auto theirs = other->clock();
      const auto own = theirs.find(other), seen = known.find(other);
      return own == theirs.end() || (seen != known.end() && seen->second >= own->second);
    });
  }
  // CUDA's default stream and those made without cudaStreamNonBlocking on the same device wait for each other.
  void order_legacy(const Stream* legacy) {
    if (!blocking) return;
    std::vector<Stream*> others;
    {
      const std::lock_guard lock(all_mutex);
      std::copy_if(all.begin(), all.end(), std::back_inserter(others), [&](const Stream* other) {
        return other != this && other->blocking && other->device == device && (this == legacy || other == legacy);
      });
    }
    for (Stream* other : others) {
      if (const auto capture = other->capture()) {
        capture->fail(cudaErrorStreamCaptureImplicit);
      } else if (!has_joined({other})) {
        legacy_joins++;
        wait_for(other->ticket());
      }
    }
  }
  int unjoined() {
    const std::lock_guard lock(all_mutex);
    return static_cast<int>(std::count_if(all.begin(), all.end(), [this](Stream* other) { return !has_joined({other}); }));
  }

 private:
  void run() {
    Jitter jitter;
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return ended_ || !queue_.empty(); });
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      jitter.pause();
      work();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  void push(std::function<void()> work, const Ticket* punches = nullptr, const Ticket* waits = nullptr) {
    if (HardwareQueue* shared = capture_ ? nullptr : HardwareQueue::of(device, number)) {
      work = [shared, turn = shared->add(), inner = std::move(work)] {
        shared->await(turn);
        inner();
        shared->done();
      };
    }
    if (capture_)
      kept_.push_back({std::move(work), punches, waits});
    else
      queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  static inline std::mutex all_mutex;
  static inline std::set<Stream*> all;
  std::map<const Stream*, uint64_t> clock_;
  std::deque<std::function<void()>> queue_;
  std::deque<Node> kept_;
  std::shared_ptr<Capture> capture_;
  bool ended_ = false;

 public:
  static inline std::atomic<int> made{0};
  const int number = made++;
  const int device;
  const bool blocking;  // by the default stream of its device

 private:
  std::thread thread_;
};

struct Event {
  bool timed = false;
  int device = 0;
  std::mutex mutex;
  std::shared_ptr<Ticket> latest;
  std::shared_ptr<Ticket> get() {
    const std::lock_guard lock(mutex);
    return latest;
  }
};

// Of this process, also after a fork, which leaves the threads behind; never joined: the process may end from any thread.
inline Stream& legacy_of(int device) {
  static std::mutex mutex;
  static pid_t owner = 0;
  static std::map<int, Stream*> legacy;
  const std::lock_guard lock(mutex);
  if (owner != getpid()) legacy.clear();
  owner = getpid();
  Stream*& found = legacy[device];
  if (!found) found = new Stream(device, true);
  return *found;
}

inline Stream& stream_of(cudaStream_t handle) {
  if (handle) return *reinterpret_cast<Stream*>(handle);
  legacy_uses++;
  return legacy_of(current_device);
}

// Work comes to a stream: what the default stream's rules put before it.
inline Stream& entered(cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  if (stream.blocking) stream.order_legacy(&legacy_of(stream.device));
  return stream;
}

inline Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

}  // namespace fake
