// Ranks of one host, as processes or threads, over the job's shared segment: nothing is copied but what a receiver takes into memory of
// its own. A Notice is written by its rank and read by its peers; a Channel carries messages from one rank to another.
#pragma once
#include <vector>

#include "base/segment.h"
#include "base/wait.h"
#include "control/program.h"
#include "transport/axis.h"

namespace gingham {

constexpr int kMaxPanels = 8, kSlots = 8;

struct Post {
  uint64_t key;
  int64_t rows;
  int32_t count, uneven;
  Shape shape;
  struct {
    uint64_t offset;
    int64_t rows, cols, row_stride, col_stride;
    DType dtype;
  } panels[kMaxPanels];
};

struct Channel {
  Word sent, consumed;
  struct {
    uint64_t offset, bytes;
    double due;             // when the message is through, on the host's clock; 0: at once
    uint64_t ready, taken;  // events of a device-to-device copy
  } slots[kSlots];
};

// What a rank shows to the others of an axis before messages go by copy engines (transport/push).
struct Shown {
  Word steps;
  int32_t able[4];  // by step
  uint64_t slot_bytes;
  unsigned char window[64];  // its handle
  char flags[48], why_not[200];
};

struct Notice {
  Word posted, finished, turns;
  Post post;
  Shown shown;
};

// Where an axis' shared state stands in its program's room: a notice of each member of the program, and of each the channels to the ranks of
// its line, which are `line` long: channels[(from * line + to) * kLanes + lane], from a member, to a place on its line.
struct AxisMemory {
  Notice* notices;
  Channel* channels;
  int line;
  static size_t bytes(size_t members, size_t line) { return members * (sizeof(Notice) + line * kLanes * sizeof(Channel)); }
  Channel& channel(int from, int to, int lane) const { return channels[(from * line + to) * kLanes + lane]; }
};

class Shm : public Axis, public Board, public Ring, public Window {
 public:
  // members: the program's ranks in axis order. windowed: peers read each other's memory in place.
  Shm(Segment& segment, Program& program, AxisMemory memory, std::vector<int> members, bool windowed = true);

  Board& board() override { return *this; }
  Ring& ring() override { return *this; }
  Window* window() override { return windowed_ ? this : nullptr; }
  bool holds(const void* data) const override { return segment_.holds(data); }
  void post(std::span<const Matrix> panels, int64_t rows, bool uneven, const Shape& shape) override;
  Matrix panel(int peer, int index) override;
  int64_t rows(int peer) override;
  Shape shape(int peer) override;
  void finish() override;
  void retire() override;
  void advance() override;
  void await_turn() override;
  Request begin_get(int peer, size_t bytes) override;
  void wait_get(Request request) override;
  void send(int peer, const void* data, size_t bytes, int lane) override { send_due(peer, data, bytes, lane, 0); }
  bool ready(int peer, int lane) override;
  void recv(int peer, void* data, size_t bytes, int lane) override;
  void drain(int peer, int lane, uint32_t left) override;

  void send_due(int peer, const void* data, size_t bytes, int lane, double due);

 private:
  Notice& notice(int peer) { return memory_.notices[members_[static_cast<size_t>(peer)]]; }
  Channel& channel(int from, int to, int lane) { return memory_.channel(members_[static_cast<size_t>(from)], to, lane); }
  const Post& post_of(int peer);

  Segment& segment_;
  Program& program_;
  AxisMemory memory_;
  std::vector<int> members_;
  bool windowed_;
  std::vector<char> checked_;
  uint32_t call_ = 0, epoch_ = 0;
};

}  // namespace gingham
