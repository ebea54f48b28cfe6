// One rank's part of the shared segment: tensors that peers read in place and the workspace of steps. Freed blocks wait in lists by size
// class (eighths of a power of two), so that a training step allocates nothing new in steady state. Where no list has a block, all that
// are free are joined with their neighbours and the smallest range that holds the block is cut; memory that has long been more than was
// in use is given back to the host.
//   [ block | free | block | hole: free, given back | block | free ... reserved ) never used ... limit )
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/segment.h"

namespace gingham {

class Heap {
 public:
  struct Usage {
    size_t tensors = 0, workspace = 0, workspace_peak = 0, reserved = 0;
    uint64_t grown = 0;  // times the heap took new memory from the host
  };
  // lasting: parameters and gradients, which a fork does not copy; control: what ranks say to each other, which usage() does not count
  enum class Kind { tensor, lasting, workspace, control };

  Heap(Segment& segment, uint64_t begin, size_t bytes, int rank);
  void* allocate(size_t bytes, Kind kind);  // 64-byte aligned; throws OutOfMemory with the size needed
  void free(void* p);
  Usage usage() const;
  void reset_peak();
  // Called before allocate throws OutOfMemory.
  std::function<void(const std::string&)> refused;
  // The allocation after the next `count` is refused, as though the host had no memory.
  void fail_after(int count) { fails_in_ = count; }
  // While blocks are held, what is freed stays as it is: a peer may not know yet that the call it belongs to was given up, or a message to it
  // is on its way. hold(false): blocks freed from now on are free at once; reuse(): and those that were held.
  void hold(bool on);
  void reuse();
  // Gives back what is free, but for `spare` bytes. Happens by itself where much has been free for long.
  void trim(size_t spare);
  // Around a fork (transport/fork.h): no other thread may hold the heap; copy: where a private mapping of the segment begins.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }
  void copy_tensors(char* copy) const;

 private:
  struct Block {
    size_t size;
    Kind kind;
  };
  bool take(size_t size, uint64_t* offset);
  size_t& count(Kind kind);
  bool cut(size_t size, uint64_t* offset);
  bool grow(size_t size);
  bool fill(uint64_t begin, uint64_t end);
  std::string refusal(size_t bytes, size_t size) const;
  void join();
  void add_free(uint64_t offset, size_t size);
  void remove_free(std::map<uint64_t, size_t>::iterator at);
  void give_back(size_t spare);
  void punch(uint64_t begin, uint64_t end, size_t kept);
  void watch();

  Segment& segment_;
  const uint64_t begin_;
  const size_t limit_;
  const int rank_;
  mutable std::mutex mutex_;
  uint64_t top_ = 0, reserved_ = 0;  // blocks and free ranges lie below top_, memory of the host below reserved_ but for the holes
  std::map<size_t, std::vector<uint64_t>> unused_;
  std::map<uint64_t, size_t> free_;  // joined ranges
  std::set<std::pair<size_t, uint64_t>> by_size_;
  std::map<uint64_t, uint64_t> holes_;  // begin, end
  std::map<uint64_t, Block> blocks_;
  std::vector<std::pair<uint64_t, size_t>> held_;
  bool holding_ = false;
  int fails_in_ = -1;
  Usage usage_;
  size_t control_ = 0;
  // Of the watch over unused memory: the most that was in use since `since_`, allocations since, seconds that memory must lie idle.
  size_t peak_ = 0;
  uint64_t taken_ = 0;
  double since_ = 0, patience_;
};

}  // namespace gingham
