#include "base/heap.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"

namespace gingham {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kGrowth = size_t{4} << 20;

size_t size_class(size_t bytes) {
  bytes = std::max(bytes, size_t{256});
  const size_t step = std::max(kAlign, std::bit_floor(bytes) / 8);
  return (bytes + step - 1) / step * step;
}

}  // namespace

Heap::Heap(Segment& segment, uint64_t begin, size_t bytes, int rank) : segment_(segment), begin_(begin), limit_(bytes), rank_(rank) {}

void* Heap::allocate(size_t bytes, Kind kind) {
  const size_t size = size_class(bytes);
  std::lock_guard lock(mutex_);
  uint64_t offset;
  auto& list = unused_[size];
  if (!list.empty()) {
    offset = list.back();
    list.pop_back();
  } else {
    offset = top_;
    const uint64_t end = top_ + size;
    if (end > reserved_) {
      const size_t more = std::max(kGrowth, (size + kGrowth - 1) / kGrowth * kGrowth);
      CHECK(OutOfMemory, reserved_ + more <= limit_ && segment_.reserve(begin_ + reserved_, more), "rank ", rank_, ": shared heap needs ", more,
            " more bytes for a block of ", bytes, " (in use: ", usage_.tensors, " in tensors, ", usage_.workspace,
            " in workspace), and the host has too little memory");
      reserved_ += more;
      usage_.reserved = reserved_;
      usage_.grown++;
    }
    top_ = end;
  }
  blocks_[offset] = {size, kind};
  (kind == Kind::workspace ? usage_.workspace : usage_.tensors) += size;
  usage_.workspace_peak = std::max(usage_.workspace_peak, usage_.workspace);
  return segment_.at(begin_ + offset);
}

void Heap::free(void* p) {
  if (!p) return;
  std::lock_guard lock(mutex_);
  auto it = blocks_.find(segment_.offset_of(p) - begin_);
  if (it == blocks_.end()) return;
  (it->second.kind == Kind::workspace ? usage_.workspace : usage_.tensors) -= it->second.size;
  unused_[it->second.size].push_back(it->first);
  blocks_.erase(it);
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
