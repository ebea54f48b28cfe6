// Where the ranks of a communicator meet, for the two libraries that stand in for NCCL (nccl.cc here, ../samegpu): a sparse file in memory
// (nothing in /dev/shm, gone with the last process) that every rank opens by the path in the unique id. It begins with a hall for each
// communicator: number 0 is the world's, then those of its splits by (number, color).
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "transport/nccl_api.h"

namespace standin {

constexpr int kMostRanks = 16, kMostSplits = 32, kHalls = 1 + kMostSplits * kMostRanks;

// What a call answers instead of success, with the words of ncclGetErrorString.
struct Refused : std::runtime_error {
  Refused(ncclResult_t result, const std::string& words) : std::runtime_error(words), result(result) {}
  ncclResult_t result;
};
inline thread_local std::string said = "no error";  // of the last call that was refused in this thread

constexpr auto kCudaError = static_cast<ncclResult_t>(1), kSystemError = static_cast<ncclResult_t>(2);

// One message of a group.
struct Op {
  bool sends;
  int peer;
  char* data;
  size_t bytes;
};

struct Hall {
  std::atomic<uint32_t> arrived;
  struct {
    std::atomic<int32_t> color, key;
  } splits[kMostSplits][kMostRanks];
  std::atomic<uint32_t> split_arrived[kMostSplits];
};

class SharedFile {
 public:
  static void create(char* path, size_t room, size_t bytes) {
    const int fd = memfd_create("nccl stand-in", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) fail("memfd_create");
    snprintf(path, room, "/proc/%d/fd/%d", getpid(), fd);
  }
  // By the rank that created it, once all have opened it.
  static void forget(const char* path) {
    int pid = 0, fd = -1;
    if (sscanf(path, "/proc/%d/fd/%d", &pid, &fd) == 2 && pid == getpid()) close(fd);
  }
  explicit SharedFile(const char* path) : fd_(open(path, O_RDWR | O_CLOEXEC)) {
    if (fd_ < 0) fail(path);
  }
  SharedFile(const SharedFile&) = delete;
  ~SharedFile() { close(fd_); }
  void* map(size_t offset, size_t bytes) const {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, static_cast<off_t>(offset));
    if (p == MAP_FAILED) fail("mmap");
    return p;
  }

 private:
  [[noreturn]] static void fail(const char* what) { throw Refused(kSystemError, std::string(what) + ": " + strerror(errno)); }
  int fd_;
};

// Who is in a communicator: its hall, this rank in it, and the world's ranks in its order.
struct Members {
  int hall = 0, rank = 0;
  std::vector<int> ranks;
  int splits = 0;  // made from it so far
};

inline Members world_of(int size, int rank) {
  if (size > kMostRanks) throw Refused(ncclInvalidUsage, std::to_string(size) + " ranks, at most " + std::to_string(kMostRanks));
  Members out;
  out.rank = rank;
  for (int r = 0; r < size; r++) out.ranks.push_back(r);
  return out;
}

// Returns when all of them have come; throws once the communicator is aborted.
inline void meet(std::atomic<uint32_t>& arrived, const Members& all, const std::atomic<bool>& aborted) {
  arrived++;
  while (arrived.load() < all.ranks.size()) {
    if (aborted.load()) throw Refused(ncclInvalidUsage, "the communicator was aborted while its ranks met");
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

// The communicator of the ranks that gave the same color, by ascending key. Collective.
inline Members split(Hall& hall, Members& from, int color, int key, const std::atomic<bool>& aborted) {
  const int number = from.splits++;
  if (from.hall != 0 || number >= kMostSplits || color < 0 || color >= kMostRanks)
    throw Refused(ncclInvalidUsage, "ncclCommSplit: only the world's communicator is split, at most " + std::to_string(kMostSplits) +
                                        " times, by colors below " + std::to_string(kMostRanks));
  auto& table = hall.splits[number];
  table[from.rank].color = color;
  table[from.rank].key = key;
  meet(hall.split_arrived[number], from, aborted);
  std::vector<std::pair<int, int>> keyed;
  for (size_t r = 0; r < from.ranks.size(); r++)
    if (table[r].color == color) keyed.push_back({table[r].key, static_cast<int>(r)});
  std::sort(keyed.begin(), keyed.end());
  Members out;
  out.hall = 1 + number * kMostRanks + color;
  for (auto& [k, r] : keyed) {
    if (r == from.rank) out.rank = static_cast<int>(out.ranks.size());
    out.ranks.push_back(from.ranks[static_cast<size_t>(r)]);
  }
  return out;
}

}  // namespace standin
