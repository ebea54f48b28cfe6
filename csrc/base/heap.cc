#include "base/heap.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/memory.h"
#include "base/wait.h"

namespace gingham {
namespace {

constexpr size_t kAlign = 64, kPage = 4096;
constexpr size_t kGrowth = size_t{4} << 20;
constexpr size_t kHole = size_t{256} << 10;  // free ranges of less are kept: a hole costs a system call and new pages
constexpr size_t kSlack = size_t{16} << 20;  // and so much beyond a quarter of what was in use
constexpr size_t kMargin = size_t{8} << 20;  // what ranks that grow at the same time may take together unseen
constexpr uint64_t kWindow = 4096;           // allocations between two looks at what lies idle
constexpr double kPatience = 2.0;

size_t size_class(size_t bytes) {
  bytes = std::max(bytes, size_t{256});
  const size_t step = std::max(kAlign, std::bit_floor(bytes) / 8);
  return (bytes + step - 1) / step * step;
}

}  // namespace

Heap::Heap(Segment& segment, uint64_t begin, size_t bytes, int rank)
    : segment_(segment), begin_(begin), limit_(bytes), rank_(rank), patience_(kPatience) {}

void* Heap::allocate(size_t bytes, Kind kind) {
  std::string why;
  {
    std::lock_guard lock(mutex_);
    const size_t size = bytes > limit_ ? bytes : size_class(bytes);
    uint64_t offset = 0;
    const bool fails = fails_in_ >= 0 && fails_in_-- == 0;
    if (!fails && size <= limit_ && take(size, &offset)) {
      blocks_[offset] = {size, kind};
      count(kind) += size;
      usage_.workspace_peak = std::max(usage_.workspace_peak, usage_.workspace);
      peak_ = std::max(peak_, usage_.tensors + usage_.workspace);
      if (++taken_ >= kWindow) watch();
      return segment_.at(begin_ + offset);
    }
    why = refusal(bytes, size) + (fails ? " (this allocation fails because GINGHAM_FAULT asks for it)" : "");
  }
  if (refused) refused(why);
  throw OutOfMemory(why);
}

size_t& Heap::count(Kind kind) { return kind == Kind::workspace ? usage_.workspace : kind == Kind::control ? control_ : usage_.tensors; }

std::string Heap::refusal(size_t bytes, size_t size) const {
  std::string out = concat("rank ", rank_, ": the shared heap has no memory for a block of ", bytes, " bytes (it holds ", usage_.tensors,
                           " bytes in tensors and ", usage_.workspace, " in workspace, ", usage_.reserved, " reserved, at most ", limit_, "); ");
  const std::string cause = segment_.why_not_reserved();
  if (!cause.empty()) return out + cause;
  const MemoryLeft left = memory_left();
  if (size > limit_ - std::min<size_t>(limit_, top_))
    return out + concat("give every rank a larger one with gingham.init(heap=bytes); ", left.whose, " has ", left.bytes, " bytes left");
  return out + concat(left.whose, " has ", left.bytes, " bytes left: use smaller batches or more ranks, or raise the limit");
}

bool Heap::take(size_t size, uint64_t* offset) {
  const auto list = unused_.find(size);
  if (list != unused_.end() && !list->second.empty()) {
    *offset = list->second.back();
    list->second.pop_back();
    return true;
  }
  if (cut(size, offset)) return true;
  join();
  if (cut(size, offset)) return true;
  if (top_ + size > reserved_ && !grow(top_ + size - reserved_)) return false;
  if (!holes_.empty() && !fill(top_, top_ + size)) return false;
  *offset = top_;
  top_ += size;
  return true;
}

// From the smallest joined range that is large enough; its holes are filled first.
bool Heap::cut(size_t size, uint64_t* offset) {
  const auto found = by_size_.lower_bound({size, 0});
  if (found == by_size_.end()) return false;
  const auto [whole, begin] = *found;
  if (!holes_.empty() && !fill(begin, begin + size)) return false;
  remove_free(free_.find(begin));
  if (whole > size) add_free(begin + size, whole - size);
  *offset = begin;
  return true;
}

bool Heap::grow(size_t size) {
  segment_.forget_errors();
  const size_t more = std::max(kGrowth, (size + kGrowth - 1) / kGrowth * kGrowth);
  const size_t least = (size + kPage - 1) / kPage * kPage;
  const GrowthLock one_at_a_time(segment_);
  for (size_t bytes : {more, least}) {
    if (reserved_ + bytes > limit_ || memory_left().bytes < bytes + kMargin || !segment_.reserve(begin_ + reserved_, bytes)) continue;
    reserved_ += bytes;
    usage_.reserved += bytes;
    usage_.grown++;
    return true;
  }
  return false;
}

// Takes memory for the holes of [begin, end) again.
bool Heap::fill(uint64_t begin, uint64_t end) {
  begin = begin / kPage * kPage;
  end = (end + kPage - 1) / kPage * kPage;
  auto at = holes_.upper_bound(begin);
  if (at != holes_.begin() && std::prev(at)->second > begin) --at;
  if (at == holes_.end() || at->first >= end) return true;
  const GrowthLock one_at_a_time(segment_);
  while (at != holes_.end() && at->first < end) {
    const auto [first, last] = *at;
    const uint64_t from = std::max(first, begin), to = std::min(last, end);
    if (memory_left().bytes < to - from + kMargin || !segment_.reserve(begin_ + from, to - from)) return false;
    at = holes_.erase(at);
    if (first < from) holes_[first] = from;
    if (to < last) holes_[to] = last;
    usage_.reserved += to - from;
    usage_.grown++;
  }
  patience_ *= 2;  // it was not as idle as it seemed
  return true;
}

void Heap::add_free(uint64_t offset, size_t size) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && next->first == offset + size) {
    size += next->second;
    remove_free(next);
  }
  next = free_.lower_bound(offset);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      size += before->second;
      remove_free(before);
    }
  }
  free_[offset] = size;
  by_size_.insert({size, offset});
}

void Heap::remove_free(std::map<uint64_t, size_t>::iterator at) {
  by_size_.erase({at->second, at->first});
  free_.erase(at);
}

// All listed blocks become ranges; a range at the end is given to what was never used.
void Heap::join() {
  for (const auto& [size, list] : unused_)
    for (uint64_t offset : list) add_free(offset, size);
  unused_.clear();
  if (free_.empty()) return;
  const auto last = std::prev(free_.end());
  if (last->first + last->second != top_) return;
  top_ = last->first;
  remove_free(last);
}

void Heap::free(void* p) {
  if (!p) return;
  std::lock_guard lock(mutex_);
  auto it = blocks_.find(segment_.offset_of(p) - begin_);
  if (it == blocks_.end()) return;
  const auto [offset, block] = *it;
  count(block.kind) -= block.size;
  blocks_.erase(it);
  if (holding_)
    held_.emplace_back(offset, block.size);
  else
    unused_[block.size].push_back(offset);
}

void Heap::hold(bool on) {
  std::lock_guard lock(mutex_);
  holding_ = on;
}

void Heap::reuse() {
  std::lock_guard lock(mutex_);
  holding_ = false;
  for (const auto& [offset, size] : held_) unused_[size].push_back(offset);
  held_.clear();
}

void Heap::trim(size_t spare) {
  std::lock_guard lock(mutex_);
  give_back(spare);
}

void Heap::watch() {
  taken_ = 0;
  const double time = now();
  if (time - since_ < patience_) return;
  if (since_ > 0 && usage_.reserved > peak_ + peak_ / 4 + kSlack)
    give_back(peak_ + peak_ / 4 + kSlack - std::min(peak_, usage_.tensors + usage_.workspace));
  since_ = time;
  peak_ = usage_.tensors + usage_.workspace;
}

// Punches the largest free ranges out of the segment, until `spare` bytes are left beside the blocks in use.
void Heap::give_back(size_t spare) {
  join();
  const size_t kept = usage_.tensors + usage_.workspace + spare;
  if (top_ < reserved_) punch(top_, reserved_, kept);
  for (auto range = by_size_.rbegin(); range != by_size_.rend() && range->first >= kHole; ++range)
    punch(range->second, range->second + range->first, kept);
}

// What of [begin, end) is no hole yet, its end first.
void Heap::punch(uint64_t begin, uint64_t end, size_t kept) {
  begin = (begin + kPage - 1) / kPage * kPage;
  end = end / kPage * kPage;
  while (end > begin && usage_.reserved > kept) {
    auto hole = holes_.lower_bound(end);
    const bool before = hole != holes_.begin() && std::prev(hole)->second > begin;
    const uint64_t from = before ? std::prev(hole)->second : begin, excess = (usage_.reserved - kept + kPage - 1) / kPage * kPage;
    if (from < end && end - from >= kHole) {
      const uint64_t first = std::max(from, end - std::min(end - from, excess));
      if (!segment_.release(begin_ + first, end - first)) return;
      usage_.reserved -= end - first;
      uint64_t last = end;
      if (hole != holes_.end() && hole->first == end) {
        last = hole->second;
        holes_.erase(hole);
      }
      holes_[first] = last;
    }
    end = before ? std::prev(holes_.lower_bound(from))->first : begin;
  }
}

void Heap::copy_tensors(char* copy) const {
  for (const auto& [offset, block] : blocks_)
    if (block.kind == Kind::tensor) memcpy(copy + begin_ + offset, segment_.at(begin_ + offset), block.size);
}

Heap::Usage Heap::usage() const {
  std::lock_guard lock(mutex_);
  return usage_;
}

void Heap::reset_peak() {
  std::lock_guard lock(mutex_);
  usage_.workspace_peak = usage_.workspace;
}

}  // namespace gingham
