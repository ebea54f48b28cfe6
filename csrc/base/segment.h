// Memory that all ranks of a host map: one memfd (nothing in /dev/shm, gone with the last process), sparse, pages reserved by
// fallocate as the heaps grow so that too little memory is an error and never SIGBUS.
//   [ control block | boards | heap of rank 0 | heap of rank 1 | ... ]
// Addresses travel as offsets from the start, since every process maps the segment elsewhere.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace gingham {

class Segment {
 public:
  explicit Segment(size_t bytes);                  // creates
  Segment(const std::string& path, size_t bytes);  // opens another process's: /proc/<pid>/fd/<n>
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  char* base() const { return base_; }
  size_t bytes() const { return bytes_; }
  std::string path() const;
  void* at(uint64_t offset) const { return base_ + offset; }
  bool holds(const void* p) const { return p >= base_ && p < base_ + bytes_; }
  uint64_t offset_of(const void* p) const { return static_cast<uint64_t>(static_cast<const char*>(p) - base_); }
  // Reserves memory for [begin, begin + bytes); false when the host has too little.
  bool reserve(uint64_t begin, size_t bytes) const;
  // For a fork: a private mapping of the same memory elsewhere (null: none to be had), and in the child that mapping in this one's place.
  char* map_copy() const;
  void drop_copy(char* copy) const;
  void become_copy(char* copy);

 private:
  void map();
  int fd_ = -1;
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace gingham
