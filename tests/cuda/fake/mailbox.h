// The fake NCCL's communicators: a region of the shared memory file each, with a mailbox for every ordered pair of ranks.
#pragma once
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>

#include "fake.h"
#include "transport/nccl_api.h"

namespace fake {

constexpr int kMostRanks = 16, kMostSplits = 32, kSlots = 4;
constexpr size_t kPiece = 16 << 10;

// One way from one rank to another: pieces of messages, written and read in turn.
struct Mailbox {
  std::atomic<uint32_t> written{0}, read{0};
  struct Slot {
    uint64_t message_bytes, piece_bytes;
    char data[kPiece];
  } slots[kSlots];
};

struct Region {
  std::atomic<uint32_t> arrived{0};
  struct {
    std::atomic<int32_t> color, key;
  } splits[kMostSplits][kMostRanks];
  std::atomic<uint32_t> split_arrived[kMostSplits];
  Mailbox boxes[kMostRanks][kMostRanks];
};

// A sparse file in memory: region 0 is the world's, then those of the splits by (number, color).
class File {
 public:
  static size_t bytes() { return sizeof(Region) * (1 + kMostSplits * kMostRanks); }
  static void create(char* path, size_t room) {
    const int fd = memfd_create("fake nccl", 0);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes())) != 0) abort();
    snprintf(path, room, "/proc/%d/fd/%d", getpid(), fd);
  }
  explicit File(const char* path) {
    const int fd = open(path, O_RDWR);
    void* p = fd < 0 ? MAP_FAILED : mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (p == MAP_FAILED) abort();
    close(fd);
    regions_ = static_cast<Region*>(p);
  }
  Region& region(int index) { return regions_[index]; }

 private:
  Region* regions_;
};

// What all communicators of one rank share.
struct Device {
  int rank = 0;
  std::mutex mutex;
  std::atomic<uint32_t> groups{0};
};

struct Op {
  bool sends;
  int peer;
  char* data;
  size_t bytes;
  size_t moved = 0;
  uint32_t last = 0;  // piece that must have been read before a rendezvous send ends
  bool begun = false, done = false;
};

struct Group {
  cudaStream_t stream;
  std::vector<Op> ops;
};

class Comm {
 public:
  Comm(std::shared_ptr<File> file, std::shared_ptr<Device> on, int index, int rank, std::vector<int> members)
      : device(std::move(on)), file_(std::move(file)), region_(file_->region(index)), rank_(rank), members_(std::move(members)) {}

  void meet() { gather(region_.arrived, 1); }

  Comm* split(int color, int key) {
    const int number = splits_++;
    auto& table = region_.splits[number];
    table[rank_].color = color;
    table[rank_].key = key;
    gather(region_.split_arrived[number], 1);
    std::vector<std::pair<int, int>> keyed;
    for (size_t r = 0; r < members_.size(); r++)
      if (table[r].color == color) keyed.push_back({table[r].key, static_cast<int>(r)});
    std::sort(keyed.begin(), keyed.end());
    std::vector<int> members;
    int rank = 0;
    for (auto& [k, r] : keyed) {
      if (r == rank_) rank = static_cast<int>(members.size());
      members.push_back(r);
    }
    return new Comm(file_, device, 1 + number * kMostRanks + color, rank, members);
  }

  // Moves one piece of the message, or sees that it has been taken; false: nothing could be done.
  bool progress(Op& op, bool buffered) {
    Mailbox& box = op.sends ? region_.boxes[rank_][op.peer] : region_.boxes[op.peer][rank_];
    return op.sends ? push(op, box, buffered) : pull(op, box);
  }

  std::shared_ptr<Device> device;
  std::atomic<bool> aborted{false};
  std::atomic<int> error{0};

 private:
  void gather(std::atomic<uint32_t>& count, uint32_t lives) {
    count++;
    while (count.load() < members_.size() * lives) nap(200);
  }
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
      error = ncclInvalidUsage;
      return false;
    }
    if (slot.piece_bytes) memcpy(op.data + op.moved, slot.data, slot.piece_bytes);
    op.moved += slot.piece_bytes;
    box.read.store(n + 1);
    op.done = op.moved == op.bytes;
    return true;
  }

  std::shared_ptr<File> file_;
  Region& region_;
  int rank_;
  std::vector<int> members_;
  int splits_ = 0;
};

}  // namespace fake
