// The ranks of one mesh axis, seen from one of them: a board, a ring and, where they share memory, a window.
//   Board   control of a call: each rank posts its key, rows and shape; nobody reads a byte before all keys agree.
//   Ring    messages to any peer, received in order on each of kLanes lanes, so that several rings can share an axis.
//   Window  what a peer posted, read where it stands; sums are built in place too: the ranks take turns at an owner's matrix.
// A step and the collectives take the window where there is one, the ring where there is none; the bits of their results are the same.
// Counting: payload bytes as received or mapped, one message each; posts, keys and turns are control and not counted.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/matrix.h"

namespace gingham {

struct Traffic {
  uint64_t bytes_sent = 0, bytes_received = 0, messages = 0;
  uint64_t bytes_crossed = 0;  // of those received, what came from another host
};

// The shape of a posted tensor where it is more than a matrix (all_gather of tensors of any rank).
struct Shape {
  int32_t ndim = 0;
  int64_t dims[8] = {};
};

constexpr int kLanes = 8;

class Board {
 public:
  virtual ~Board() = default;
  // Starts a call on this axis: the key of the job's current call, the rows this rank holds (-1: not compared, else they must agree
  // unless `uneven`), and for windows up to 8 matrices of the shared heap, which must stay as they are until retire().
  virtual void post(std::span<const Matrix> panels, int64_t rows, bool uneven, const Shape& shape) = 0;
  virtual int64_t rows(int peer) = 0;  // waits for the peer's post and compares its key first
  virtual Shape shape(int peer) = 0;
  virtual void finish() = 0;  // I shall read nothing more of this call
  virtual void retire() = 0;  // returns when no peer reads my posts any more
};

// A place in what a rank has queued on its device.
class Point {
 public:
  virtual ~Point() = default;
};

class Ring {
 public:
  virtual ~Ring() = default;
  virtual void send(int peer, const void* data, size_t bytes, int lane = 0) = 0;  // the data must stay until drain()
  virtual void expect(int, void*, size_t, int = 0) {}  // where recv() will ask the next message from a peer in the lane to be put
  virtual bool ready(int peer, int lane = 0) = 0;      // a message from `peer` has arrived
  virtual void recv(int peer, void* data, size_t bytes, int lane = 0) = 0;
  virtual void drain(int peer, int lane = 0, uint32_t left = 0) = 0;  // waits until at most `left` of my messages to `peer` are unread
  // A ring that queues (GPUs) returns from send() and recv() at once: kernels may read what was received after arrived(), and
  // group_start() .. group_end() keep the sends and receives of one exchange from waiting for each other.
  virtual bool queues() const { return false; }
  virtual void arrived(int) {}  // (lane)
  virtual void group_start() {}
  virtual void group_end() {}
  // Where the compute stream is now, and a group that comes after that point rather than after all kernels queued before the group.
  virtual std::unique_ptr<Point> point() { return nullptr; }
  virtual void group_start(const Point&) { group_start(); }
  // Of messages beside a call: the number of the group queued last in the lane, and kernels queued from here on come after its end.
  virtual uint64_t queued(int) const { return 0; }                  // (lane)
  virtual void settle(int, uint64_t) {}                             // (lane, number)
  virtual size_t chunk_bytes() const { return size_t{256} << 10; }  // of a pipelined message: large against a message's latency
  void take(int peer, void* data, size_t bytes, int lane = 0) {
    recv(peer, data, bytes, lane);
    arrived(lane);
  }
};

// When what was asked for is here: a time on the host's clock behind a link; 0: at once.
struct Request {
  double due = 0;
};

class Window {
 public:
  virtual ~Window() = default;
  virtual Matrix panel(int peer, int index) = 0;  // the peer's posted matrix; waits for its post and compares its key first
  // Begins to read `bytes` of a peer's panels; wait_get() returns when they are here. Counts one message.
  virtual Request begin_get(int peer, size_t bytes) = 0;
  virtual void wait_get(Request request) = 0;
  // Turns of this call: every rank takes the same number; await_turn() returns when the previous rank has done as many as this one.
  virtual void advance() = 0;
  virtual void await_turn() = 0;
};

class Axis {
 public:
  virtual ~Axis() = default;
  int rank() const { return rank_; }
  int size() const { return size_; }
  int next(int hops = 1) const { return ((rank_ + hops) % size_ + size_) % size_; }

  virtual Board& board() = 0;
  virtual Ring& ring() = 0;
  virtual Window* window() = 0;                          // null: data travels along the ring
  virtual bool holds(const void* data) const = 0;        // peers can have it from where it stands
  virtual int host(int) const { return 0; }              // a number that the peers on one host have alike
  virtual std::string carried_by() const { return ""; }  // what takes messages between GPUs, and why nothing better does
  // Whether a graph was captured whose replay and a call beside it must not overlap: they would use the same slots.
  virtual bool replays() const { return false; }
  bool crosses(int peer) const { return host(peer) != host(rank_); }
  bool crosses_any() const {
    for (int peer = 0; peer < size_; peer++)
      if (crosses(peer)) return true;
    return false;
  }

  void count_sent(size_t bytes) {
    if (counting_) traffic_.bytes_sent += bytes;
  }
  void count_received(size_t bytes, bool crossed = false) {
    if (!counting_) return;
    traffic_.bytes_received += bytes;
    if (crossed) traffic_.bytes_crossed += bytes;
    traffic_.messages++;
  }
  Traffic traffic(bool reset) {
    Traffic out = traffic_;
    if (reset) traffic_ = {};
    return out;
  }
  void count_call() { calls_++; }
  uint64_t calls() const { return calls_; }  // begun on this axis: in each, this rank waits for all others of the axis
  void set_counting(bool on) { counting_ = on; }

 protected:
  Axis(int rank, int size) : rank_(rank), size_(size) {}
  int rank_, size_;

 private:
  bool counting_ = true;
  uint64_t calls_ = 0;
  Traffic traffic_;
};

// One call on one axis, from the first post to the last rank's leave. It is open when every rank of the axis has posted the same key, so
// that not a byte is read in a call on which the ranks disagree.
//   Session session(axis, panels, rows);  .. read peers' panels, send and receive ..  session.end();
// After an error it is left open: the job is over, or its axes begin anew.
class Session {
 public:
  explicit Session(Axis& axis, std::span<const Matrix> panels = {}, int64_t rows = -1, bool uneven = false, const Shape& shape = {}) : axis_(axis) {
    axis.count_call();
    axis.board().post(panels, rows, uneven, shape);
    for (int hop = 1; hop < axis.size(); hop++) axis.board().rows(axis.next(hop));
  }
  Axis& axis() const { return axis_; }
  // Says that this rank reads nothing more of the peers' posts; messages may still travel.
  void finish() {
    if (!finished_) axis_.board().finish();
    finished_ = true;
  }
  void end() {
    finish();
    axis_.board().retire();
  }

 private:
  Axis& axis_;
  bool finished_ = false;
};

// Counts nothing while in scope: scatter, gather and other set-up traffic.
class Uncounted {
 public:
  Uncounted(Axis& axis, bool counted) : axis_(axis) { axis_.set_counting(counted); }
  ~Uncounted() { axis_.set_counting(true); }

 private:
  Axis& axis_;
};

}  // namespace gingham
