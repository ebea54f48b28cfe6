// An axis between GPUs: messages are queued on streams and the host never waits for data. Base of nccl and copy, which differ in how a
// group of messages is carried.
//   compute stream   the caller's; kernels run here
//   lines            one communication stream for each direction of the axis: gathers (lanes 0-3) and sums (lanes 4-7)
//   order            send() and recv() come after all kernels queued so far; drain() and arrived() hold the kernels queued later back
// A send waits on the host for the recv that follows it, so that both leave in one group: each step of a ring is {send to next, receive
// from previous}, which no rank can block. group_start() and group_end() put any number of messages into one group.
// Groups of all lines run one after the other in the order in which the host queued them (GroupOrder). Ranks queue the same groups, so that
// no two of them can wait for each other on different communicators, even where a device progresses only one at a time.
// Messages that take no kernels (transport/push) go by streams of their own, for all axes: those on which they leave, in turns, and one on which they
// come. What leaves waits for earlier groups only where they brought it, so that a group's messages may leave before those of the one before have
// come. A call that an error leaves does not come to its arrived() and drain(), but its memory is free to be used again: GroupOrder::break_off()
// holds the compute stream back in their place, and drops what was not queued yet. Where messages never end the watch aborts their communicators, and
// the stream goes on.
// In a graph capture no stream may wait for what was queued outside of it, nor the other way round (GroupEnd::capture).
// Keys, rows and shapes of a call are compared through shared memory on the host, as on the CPU (shm).
#pragma once
#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "base/cuda_stream.h"
#include "transport/shm.h"

namespace gingham {

// A group on its line. A wait for its end across the boundary of a graph capture is an error of CUDA's (905, 907) and is left out: every call
// ends with its groups joined to the compute stream, so that what came before the capture, or was captured, is already ordered before or
// behind the call in hand by that stream alone.
struct Group {
  Event begin, end;
  unsigned long long capture = 0;
  void hold_back(cudaStream_t stream, unsigned long long in_capture) const {
    if (capture == in_capture) end.hold_back(stream);
  }
};

class Queued;

// One message of a group; lane: of the ring.
struct Message {
  enum class Way { send, recv };
  Way way;
  int peer;
  void* data;
  size_t bytes;
  int lane;
  bool meets(const Message& other) const {
    const char *mine = static_cast<const char*>(data), *theirs = static_cast<const char*>(other.data);
    return mine < theirs + other.bytes && theirs < mine + bytes;
  }
};

// The streams of messages that take no kernels: those on which they leave, in turns, so that one copy begins while another ends, and that on which
// they come. A round is one piece of every message of a group, out and in. Waits for flags are not known to CUDA, which may put streams, and
// branches of a graph, behind each other as it likes; so a rank's rounds are ordered in its sight as well: what comes in a round after what leaves
// in it and after what came before, what leaves after what came kAhead rounds earlier. With kAhead slots a channel, no order of a rank's pieces
// that keeps to that can block: what is waited for in a round is, at last, a piece that comes to another rank in an earlier one.
class Engines {
 public:
  static constexpr uint64_t kAhead = 4, kOut = 2;
  Engines();
  ~Engines();
  Engines(const Engines&) = delete;
  void enter(unsigned long long in_capture);  // of a graph, that of the group which comes
  unsigned long long capture() const { return capture_; }
  cudaStream_t leaving();  // the round's stream of what leaves, ..
  cudaStream_t coming();   // .. and then that of what comes
  void end_round();
  // What comes from here on comes after all that left, which each round sees to by itself, and after what the streams merely waited for: all
  // streams of a capture have to come back to its origin.
  void join();
  void hold_back_leaving(const Event& event) const;
  const std::array<cudaStream_t, kOut>& out() const { return out_; }
  cudaStream_t in() const { return in_; }

 private:
  cudaStream_t out_of_round() const { return out_[rounds_ % kOut]; }
  std::array<cudaStream_t, kOut> out_{};
  cudaStream_t in_;
  Event left_;
  std::array<Event, kAhead> came_;
  uint64_t rounds_ = 0;  // of this capture
  unsigned long long capture_ = 0;
};

// What the axes of one rank share: its compute stream, the group queued last and the stream to which it went, whole or in part.
struct GroupOrder {
  explicit GroupOrder(CudaStream& compute) : compute(compute) {}
  // Kernels queued from here on come after all that the lines have been given so far, what still waits on the host is never sent.
  void break_off();
  CudaStream& compute;
  std::vector<Queued*> axes;
  Event entry, all;
  const Group* last = nullptr;
  cudaStream_t last_stream = nullptr;

  std::unique_ptr<Engines> engines;  // where there are any
  // Of the groups queued last, by way of the engines or not: where their messages came.
  struct Trail {
    const Group* group;
    std::vector<Message> came;
  };
  static constexpr size_t kTrails = 64;
  std::deque<Trail> trails;
};

class Queued : public Axis, public Board, public Ring {
 public:
  Queued(std::unique_ptr<Axis> shared, GroupOrder& order);
  ~Queued() override;

  Board& board() override { return *this; }
  Ring& ring() override { return *this; }
  Window* window() override { return nullptr; }            // peers' memory is not read in place here
  bool holds(const void*) const override { return true; }  // any device memory can be sent from where it stands
  int host(int peer) const override { return shared_->host(peer); }
  bool queues() const override { return true; }
  void post(std::span<const Matrix> panels, int64_t rows, bool uneven, const Shape& shape) override;
  int64_t rows(int peer) override { return shared_->board().rows(peer); }
  Shape shape(int peer) override { return shared_->board().shape(peer); }
  void finish() override;
  void retire() override { shared_->board().retire(); }

  void send(int peer, const void* data, size_t bytes, int lane) override;
  bool ready(int, int) override { return true; }
  void recv(int peer, void* data, size_t bytes, int lane) override;
  void arrived(int lane) override;
  void drain(int peer, int lane, uint32_t left) override;
  void group_start() override { open_groups_++; }
  std::unique_ptr<Point> point() override;
  void group_start(const Point& after) override;  // not inside of another group
  void group_end() override;
  uint64_t queued(int lane) const override { return lines_[static_cast<size_t>(line_of(lane))].groups; }
  void settle(int lane, uint64_t number) override { await_group(lines_[static_cast<size_t>(line_of(lane))], number); }
  size_t chunk_bytes() const override;  // a group costs microseconds to launch; GINGHAM_CHUNK_BYTES, for tests, sets another

  // For a watch, a thread of its own: seconds since the oldest group that has not ended could begin; 0 where there is none. What a group waits
  // for (kernels, groups of other axes) is not its own time, and captured groups are left out: a question about their events breaks the capture.
  double waiting();
  void forget();                               // the messages that wait on the host
  bool captured() const { return captured_; }  // whether any of its groups was: a replay of those may be under way unseen
  bool idle();                                 // whether all its groups have ended, captured ones aside

 protected:
  struct Line {
    cudaStream_t stream = nullptr;
    std::vector<Message> waiting;
    std::vector<Group> last_groups;  // number n, from 1, in place (n - 1) % kRemembered
    uint64_t groups = 0;
    uint64_t seen = 0;  // by the watch: those that have ended
    double since = 0;
  };
  static constexpr int kLines = 2;
  static constexpr uint64_t kRemembered = 1024;  // more than a host gets ahead of its device
  static int line_of(int lane) { return lane < kLanes / 2 ? 0 : 1; }

  // Throws where this axis cannot take part in a graph capture.
  virtual void allow_capture() {}
  // Queues one group on the line's stream.
  virtual void carry(int line, std::span<const Message> group) = 0;
  // Holds the compute stream back until `peer` has taken all but the last `left` messages sent to it in the lane.
  virtual void await_taken(int peer, int lane, uint32_t left);
  CudaStream& compute() { return order_.compute; }
  Engines& engines() { return *order_.engines; }
  // From here on all messages go by the engines.
  void take_engines();

  std::unique_ptr<Axis> shared_;
  std::array<Line, kLines> lines_;

 private:
  struct LaneState {
    std::deque<uint64_t> sends;  // number of the group that carried each of the last sends
    uint64_t received = 0;       // number of the group that carried the last message received
  };
  static Group& group(Line& line, uint64_t number) { return line.last_groups[(number - 1) % kRemembered]; }
  static double waiting(Line& line);
  bool owns(const Group& group) const;
  void flush(Line& line);
  void follow(Line& line, const Event& entry, unsigned long long capture);
  void hold_back_leaving(const Group& group, unsigned long long capture) const;
  void follow_trails(const std::vector<Message>& leaving, unsigned long long capture);
  void leave_trail(const Group& group, const std::vector<Message>& messages, unsigned long long capture);
  void await_group(Line& line, uint64_t group);

  GroupOrder& order_;
  bool by_engines_ = false;
  std::atomic<bool> captured_{false};
  std::array<LaneState, kLanes> lanes_;
  std::mutex mutex_;  // of what the watch sees of the lines
  int open_groups_ = 0;
  const Event* after_ = nullptr;  // of the open group: see point()
};

}  // namespace gingham
