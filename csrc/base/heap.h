// One rank's part of the shared segment: tensors that peers read in place and the workspace of steps. Freed blocks go to free lists by
// size class (eighths of a power of two), so that a training step allocates nothing new in steady state.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "base/segment.h"

namespace gingham {

class Heap {
 public:
  struct Usage {
    size_t tensors = 0, workspace = 0, workspace_peak = 0, reserved = 0;
    uint64_t grown = 0;  // times the heap took new memory from the host
  };
  enum class Kind { tensor, lasting, workspace };  // lasting: parameters and gradients, which a fork does not copy

  Heap(Segment& segment, uint64_t begin, size_t bytes, int rank);
  void* allocate(size_t bytes, Kind kind);  // 64-byte aligned; throws OutOfMemory with the size needed
  void free(void* p);
  Usage usage() const;
  void reset_peak();
  // Around a fork (transport/fork.h): no other thread may hold the heap; copy: where a private mapping of the segment begins.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }
  void copy_tensors(char* copy) const;

 private:
  struct Block {
    size_t size;
    Kind kind;
  };
  Segment& segment_;
  const uint64_t begin_;
  const size_t limit_;
  const int rank_;
  mutable std::mutex mutex_;
  uint64_t top_ = 0, reserved_ = 0;
  std::map<size_t, std::vector<uint64_t>> unused_;
  std::map<uint64_t, Block> blocks_;
  Usage usage_;
};

}  // namespace gingham
