// The ranks of one mesh axis, seen from one of them. Two ways for data to travel, both counted here and nowhere else:
//   window  post() publishes matrices; peers read them in place (panel()) after fetch(); finish() and retire() end the call.
//           Sums are built in place too: the ranks of an axis take turns at an owner's matrix, advance() and await_turn() order the turns.
//   ring    send() and recv(): one message to any peer, received in order on each of kLanes lanes, so that several rings can share an
//           axis; the data must stay until drain(). A transport that queues() (GPUs) returns from both at once: what was received may be
//           read by kernels after arrived(), and hold() .. release() keep sends and receives of one exchange from waiting for each other.
// Counting: payload bytes as received or mapped, one message each; posts, keys and turns are control and not counted.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/matrix.h"

namespace gingham {

struct Traffic {
  uint64_t bytes_sent = 0, bytes_received = 0, messages = 0;
};

// The shape of a posted tensor where it is more than a matrix (all_gather of tensors of any rank).
struct Shape {
  int32_t ndim = 0;
  int64_t dims[8] = {};
};

enum class Source { window, ring };
constexpr int kLanes = 8;

class Transport {
 public:
  virtual ~Transport() = default;
  int rank() const { return rank_; }
  int size() const { return size_; }
  int next(int hops = 1) const { return ((rank_ + hops) % size_ + size_) % size_; }

  virtual bool holds(const void* data) const = 0;  // peers can read it where it stands

  // --- window
  // Starts a call on this axis: publishes up to 8 matrices of the shared heap (they must stay as they are until retire()), the rows this
  // rank holds (-1: not compared among the ranks of the axis, else they must agree unless `uneven`) and the key of the job's current call.
  virtual void post(std::span<const Matrix> panels, int64_t rows, bool uneven, const Shape& shape = {}) = 0;
  virtual Matrix panel(int peer, int index) = 0;  // waits for the peer's post and compares its key first
  virtual int64_t rows(int peer) = 0;
  // Waits for every peer's post and compares its key, so that not a byte is read in a call on which the ranks disagree.
  void meet() {
    for (int hop = 1; hop < size_; hop++) rows(next(hop));
  }
  virtual Shape shape(int peer) = 0;
  virtual void finish() = 0;  // I shall read nothing more of this call
  virtual void retire() = 0;  // returns when no peer reads my posts any more
  // Turns of this call: every rank takes the same number; await_turn() returns when the previous rank has done as many as this one.
  virtual void advance() = 0;
  virtual void await_turn() = 0;
  // Begins to move `bytes` from a peer's window; arrive() returns when they are here. Counts one message.
  virtual double fetch(int peer, size_t bytes) = 0;
  virtual void arrive(double ticket) = 0;
  void offered(size_t bytes) {
    if (counting_) traffic_.bytes_sent += bytes;
  }  // what peers read of mine in this call

  // --- ring
  virtual void send(int peer, const void* data, size_t bytes, int lane = 0) = 0;
  virtual bool ready(int peer, int lane = 0) = 0;  // a message from `peer` has arrived
  virtual void recv(int peer, void* data, size_t bytes, int lane = 0) = 0;
  virtual void drain(int peer, int lane = 0, uint32_t left = 0) = 0;  // until `peer` has taken all but the last `left` I sent it
  virtual bool queues() const { return false; }
  virtual void arrived(int) {}  // (lane)
  virtual void hold() {}
  virtual void release() {}
  virtual size_t chunk_bytes() const { return size_t{256} << 10; }  // of a pipelined message: large against a message's latency
  void take(int peer, void* data, size_t bytes, int lane = 0) {
    recv(peer, data, bytes, lane);
    arrived(lane);
  }

  Traffic traffic(bool reset) {
    Traffic out = traffic_;
    if (reset) traffic_ = {};
    return out;
  }
  void set_counting(bool on) { counting_ = on; }

 protected:
  Transport(int rank, int size) : rank_(rank), size_(size) {}
  void count_received(size_t bytes) {
    if (!counting_) return;
    traffic_.bytes_received += bytes;
    traffic_.messages++;
  }
  int rank_, size_;
  bool counting_ = true;
  Traffic traffic_;
};

// Counts nothing while in scope: scatter, gather and other set-up traffic.
class Uncounted {
 public:
  Uncounted(Transport& transport, bool counted) : transport_(transport) { transport_.set_counting(counted); }
  ~Uncounted() { transport_.set_counting(true); }

 private:
  Transport& transport_;
};

}  // namespace gingham
