// The fake NCCL's communicators: a hall of the memory file each, with a mailbox for every ordered pair of ranks.
#pragma once
#include <memory>
#include <mutex>

#include "fake.h"
#include "meeting.h"

namespace fake {

using standin::kMostRanks, standin::kHalls;

constexpr int kSlots = 4;
constexpr size_t kPiece = 16 << 10;

// One way from one rank to another: pieces of messages, written and read in turn.
struct Mailbox {
  std::atomic<uint32_t> written{0}, read{0};
  struct Slot {
    uint64_t message_bytes, piece_bytes;
    char data[kPiece];
  } slots[kSlots];
};

// A communicator's part of the file.
struct Region {
  standin::Hall hall;
  Mailbox boxes[kMostRanks][kMostRanks];
};
constexpr size_t kFileBytes = sizeof(Region) * kHalls;

// What all communicators of one rank share.
struct Device {
  explicit Device(const char* path, int rank) : regions(static_cast<Region*>(standin::SharedFile(path).map(0, kFileBytes))), rank(rank) {}
  Region* regions;  // of the whole file
  int rank = 0;
  std::mutex mutex;
  std::atomic<uint32_t> groups{0}, launched{0}, sends{0};
};

// A message under way.
struct Op : standin::Op {
  size_t moved = 0;
  uint32_t last = 0;  // piece that must have been read before a rendezvous send ends
  bool begun = false, done = false;
};

class Comm {
 public:
  static size_t file_bytes() { return kFileBytes; }
  Comm(const char* path, int size, int rank) : Comm(std::make_shared<Device>(path, rank), standin::world_of(size, rank)) {
    standin::meet(region_.hall.arrived, members_, aborted);
  }
  Comm* split(int color, int key) { return new Comm(device, standin::split(region_.hall, members_, color, key, aborted)); }
  void accept(const standin::Op& op);
  void launch(cudaStream_t stream, const std::vector<standin::Op>& ops);
  void destroy() {}  // the process' end frees it: work of its streams may still name it
  // NCCL frees what a call of another thread may be using. When it returns no kernel of the communicator's moves data any more, and those that are
  // queued behind will not.
  void abort() {
    if (inside.load()) {
      fprintf(stderr, "fake NCCL: a communicator is aborted under a call of its rank's\n");
      ::abort();
    }
    aborted.store(true);
    while (running.load()) nap(50);
  }
  ncclResult_t error() {
    const auto found = static_cast<ncclResult_t>(failure.load());
    if (found != ncclSuccess) standin::said = found == ncclRemoteError ? "remote error (injected)" : "an error of the fake NCCL";
    return found;
  }

  // Moves one piece of the message, or sees that it has been taken; false: nothing could be done.
  bool progress(Op& op, bool buffered) {
    Mailbox& box = op.sends ? region_.boxes[members_.rank][op.peer] : region_.boxes[op.peer][members_.rank];
    return op.sends ? push(op, box, buffered) : pull(op, box);
  }

  std::shared_ptr<Device> device;
  const int on = current();  // the device of the thread that made it
  std::atomic<bool> aborted{false};
  std::atomic<int> failure{0}, inside{0}, running{0};

 private:
  static int current() {
    int device = 0;
    cudaGetDevice(&device);
    return device;
  }
  Comm(std::shared_ptr<Device> on, standin::Members members)
      : device(std::move(on)), members_(std::move(members)), region_(device->regions[members_.hall]) {}
  bool push(Op& op, Mailbox& box, bool buffered) {
    if (op.begun && op.moved == op.bytes) {
      op.done = static_cast<int32_t>(box.read.load() - op.last) >= 0;
      return op.done;
    }
    const uint32_t n = box.written.load();
    if (n - box.read.load() >= kSlots) return false;
    Mailbox::Slot& slot = box.slots[n % kSlots];
    slot.message_bytes = op.bytes;
    slot.piece_bytes = std::min(kPiece, op.bytes - op.moved);
    if (slot.piece_bytes) memcpy(slot.data, op.data + op.moved, slot.piece_bytes);
    op.moved += slot.piece_bytes;
    op.begun = true;
    op.last = n + 1;
    box.written.store(n + 1);
    if (op.moved == op.bytes && buffered) op.done = true;
    return true;
  }
  bool pull(Op& op, Mailbox& box) {
    const uint32_t n = box.read.load();
    if (box.written.load() == n) return false;
    const Mailbox::Slot& slot = box.slots[n % kSlots];
    if (slot.message_bytes != op.bytes) {
      failure = ncclInvalidUsage;
      return false;
    }
    if (slot.piece_bytes) memcpy(op.data + op.moved, slot.data, slot.piece_bytes);
    op.moved += slot.piece_bytes;
    box.read.store(n + 1);
    op.done = op.moved == op.bytes;
    return true;
  }

  standin::Members members_;
  Region& region_;
};

}  // namespace fake
