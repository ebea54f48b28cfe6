// Watches shared memory: bounds, alignment, races (two threads touch a word, one writes, and no barrier lies between) and bank conflicts.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "shim.h"

namespace gingham::shim {

class SharedWatch {
 public:
  Conflicts conflicts[4];

  void begin(char* memory, size_t bytes, int threads);  // of a launch
  void begin_block();
  std::string touch(int thread, const void* at, size_t bytes, Access access);  // "" or what is wrong
  void landed(int thread, const void* at, size_t bytes);                       // a copy came in: a write as of now
  void count_matrix_phase(const void* const (&rows)[8]);
  void warp_passed(int thread) { clocks_[static_cast<size_t>(thread)]++; }
  void block_passed() { epoch_++; }
  void flush(int warp);  // all lanes have met: their requests since the last meeting are complete
  void flush_all();

 private:
  // Who touched a word last, in which epoch of the block, and when by the clock of its warp's barriers.
  struct Mark {
    uint64_t epoch = 0;
    uint32_t clock = 0;
    int16_t thread = -1;
    bool lanes = false, warps = false;  // more than one of them
  };
  struct Word {
    Mark wrote, read;
  };
  // The n-th request of every lane since the warp last met is taken to be one instruction.
  struct Request {
    Access access{};
    size_t bytes = 0;
    uint32_t lanes = 0;
    uint32_t offset[32];
  };
  bool ordered(const Mark& mark, int thread) const;
  const char* check(Word& word, int thread, bool write);
  void count(const Request& request);
  void count_phase(const uint32_t* offsets, int lanes, size_t bytes, Access access);

  char* memory_ = nullptr;
  size_t bytes_ = 0;
  uint64_t epoch_ = 1;
  std::vector<Word> words_, small_;  // by 4 bytes; for accesses of 1 and 2 bytes, by byte
  std::vector<uint32_t> clocks_, turns_;
  static constexpr size_t kMost = 512;          // requests between two meetings that are looked at
  std::vector<std::vector<Request>> requests_;  // of each warp, made beforehand: fibers must not allocate for each other
  std::vector<size_t> used_;
};

}  // namespace gingham::shim
