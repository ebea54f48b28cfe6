// Memory that all ranks of a host map: one memfd (nothing in /dev/shm, gone with the last process), sparse, pages reserved by
// fallocate as the heaps grow so that too little memory is an error and never SIGBUS.
//   [ control block | boards | heap of rank 0 | heap of rank 1 | ... ]
// Addresses travel as offsets from the start, since every process maps the segment elsewhere.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace gingham {

class Segment {
 public:
  explicit Segment(size_t bytes);             // creates
  explicit Segment(const std::string& path);  // opens another process's: /proc/<pid>/fd/<n>
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  char* base() const { return base_; }
  size_t bytes() const { return bytes_; }
  std::string path() const;
  void* at(uint64_t offset) const { return base_ + offset; }
  bool holds(const void* p) const { return p >= base_ && p < base_ + bytes_; }
  uint64_t offset_of(const void* p) const { return static_cast<uint64_t>(static_cast<const char*>(p) - base_); }
  // Reserves memory for [begin, begin + bytes), whole pages; false when the host has too little, or does not allow it.
  bool reserve(uint64_t begin, size_t bytes);
  // What kept the last reserve() from it where that was not memory, and how to mend it; else "".
  std::string why_not_reserved() const;
  void forget_errors() { error_ = 0; }
  bool release(uint64_t begin, size_t bytes) const;  // gives the memory back: reads as zeros until it is reserved again
  // For a fork: a private mapping of the same memory elsewhere (null: none to be had), and in the child that mapping in this one's place.
  char* map_copy() const;
  void drop_copy(char* copy) const;
  void become_copy(char* copy);

 private:
  friend class GrowthLock;
  void map();
  int fd_ = -1;
  std::atomic<int> error_{0};
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

// Held while a heap asks what memory is left and takes it, so that two processes do not take the same. Waits a tenth of a second at most:
// its holder may have been stopped.
class GrowthLock {
 public:
  explicit GrowthLock(Segment& segment);
  ~GrowthLock();

 private:
  int fd_;
  bool held_ = false;
};

}  // namespace gingham
