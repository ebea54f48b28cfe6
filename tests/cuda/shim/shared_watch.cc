#include "shared_watch.h"

#include <algorithm>
#include <sstream>

namespace gingham::shim {

void SharedWatch::begin(char* memory, size_t bytes, int threads) {
  memory_ = memory;
  bytes_ = bytes;
  epoch_++;
  words_.resize(std::max(words_.size(), bytes / 4 + 1));
  small_.resize(std::max(small_.size(), bytes + 1));
  clocks_.assign(static_cast<size_t>(threads), 0);
  turns_.assign(static_cast<size_t>(threads), 0);
  requests_.resize(std::max(requests_.size(), static_cast<size_t>(threads / 32)));
  for (auto& requests : requests_) requests.resize(kMost);
  used_.assign(static_cast<size_t>(threads / 32), 0);
  for (Conflicts& c : conflicts) c = {};
}

void SharedWatch::begin_block() {
  epoch_++;
  std::fill(turns_.begin(), turns_.end(), 0u);
  std::fill(used_.begin(), used_.end(), size_t{0});
}

bool SharedWatch::ordered(const Mark& mark, int thread) const {
  if (mark.epoch != epoch_ || (mark.thread == thread && !mark.lanes && !mark.warps)) return true;
  return !mark.warps && mark.thread / 32 == thread / 32 && mark.clock < clocks_[static_cast<size_t>(thread)];
}

// What is wrong, or nullptr.
const char* SharedWatch::check(Word& word, int thread, bool write) {
  const char* wrong = nullptr;
  if (!ordered(word.wrote, thread))
    wrong = "race with another thread's write";
  else if (write && !ordered(word.read, thread))
    wrong = "race with another thread's read";
  Mark mark{epoch_, clocks_[static_cast<size_t>(thread)], static_cast<int16_t>(thread), false, false};
  if (write) {
    word.wrote = mark;
    word.read = {};
    return wrong;
  }
  if (word.read.epoch == epoch_) {
    mark.lanes = word.read.lanes || word.read.thread != thread;
    mark.warps = word.read.warps || word.read.thread / 32 != thread / 32;
    mark.clock = std::max(mark.clock, word.read.clock);
  }
  word.read = mark;
  return wrong;
}

std::string SharedWatch::touch(int thread, const void* at, size_t bytes, Access access) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(memory_);
  const bool write = access == Access::store || access == Access::copy;
  const char* wrong = nullptr;
  if (offset > bytes_ || offset + bytes > bytes_)
    wrong = "outside of what the launch asked for";
  else if (offset % bytes)
    wrong = "misaligned";
  for (size_t b = offset; !wrong && bytes < 4 && b < offset + bytes; b++) wrong = check(small_[b], thread, write);
  for (size_t w = offset / 4; !wrong && bytes >= 4 && w < (offset + bytes) / 4; w++) wrong = check(words_[w], thread, write);
  if (wrong) {
    std::ostringstream out;
    out << "shared memory at " << static_cast<int64_t>(offset) << " of " << bytes_ << ", " << bytes << " bytes: " << wrong;
    return out.str();
  }
  if (access == Access::matrix) return {};
  const size_t warp = static_cast<size_t>(thread / 32), turn = turns_[static_cast<size_t>(thread)]++;
  if (turn >= kMost) return {};
  Request& request = requests_[warp][turn];
  if (turn == used_[warp]) {
    used_[warp]++;
    request.access = access;
    request.bytes = bytes;
    request.lanes = 0;
  }
  if (request.access == access && request.bytes == bytes) {
    request.lanes |= 1u << (thread % 32);
    request.offset[thread % 32] = static_cast<uint32_t>(offset);
  }
  return {};
}

void SharedWatch::landed(int thread, const void* at, size_t bytes) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(at) - memory_);
  for (size_t w = offset / 4; w < (offset + bytes) / 4; w++)
    words_[w].wrote = {epoch_, clocks_[static_cast<size_t>(thread)], static_cast<int16_t>(thread), false, false};
}

void SharedWatch::count_phase(const uint32_t* offsets, int lanes, size_t bytes, Access access) {
  uint32_t words[32][32];
  int used[32] = {}, worst = 0;
  for (int l = 0; l < lanes; l++)
    for (size_t b = 0; b < std::max<size_t>(bytes, 4); b += 4) {
      const uint32_t word = (offsets[l] + static_cast<uint32_t>(b)) / 4, bank = word % 32;
      if (std::find(words[bank], words[bank] + used[bank], word) == words[bank] + used[bank]) words[bank][used[bank]++] = word;
      worst = std::max(worst, used[bank]);
    }
  Conflicts& c = conflicts[static_cast<int>(access)];
  c.phases++;
  c.passes += static_cast<uint64_t>(worst);
  c.worst = std::max(c.worst, worst);
}

void SharedWatch::count_matrix_phase(const void* const (&rows)[8]) {
  uint32_t offsets[8];
  for (int r = 0; r < 8; r++) offsets[r] = static_cast<uint32_t>(static_cast<const char*>(rows[r]) - memory_);
  count_phase(offsets, 8, 16, Access::matrix);
}

// Phases of a warp: all lanes for up to 4 bytes, half of them for 8, a quarter for 16.
void SharedWatch::count(const Request& request) {
  const int group = request.bytes <= 4 ? 32 : (request.bytes == 8 ? 16 : 8);
  for (int first = 0; first < 32; first += group) {
    uint32_t offsets[32];
    int lanes = 0;
    for (int l = first; l < first + group; l++)
      if (request.lanes >> l & 1) offsets[lanes++] = request.offset[l];
    if (lanes) count_phase(offsets, lanes, request.bytes, request.access);
  }
}

void SharedWatch::flush(int warp) {
  const size_t w = static_cast<size_t>(warp);
  for (size_t i = 0; i < used_[w]; i++) count(requests_[w][i]);
  used_[w] = 0;
  std::fill_n(turns_.begin() + warp * 32, 32, 0u);
}

void SharedWatch::flush_all() {
  for (size_t w = 0; w < used_.size(); w++) flush(static_cast<int>(w));
}

}  // namespace gingham::shim
