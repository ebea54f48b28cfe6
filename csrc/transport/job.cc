#include "transport/job.h"

#include <algorithm>

#include "base/memory.h"
#include "transport/fork.h"
#include "transport/link.h"
#include "transport/shm.h"

namespace gingham {
namespace {

constexpr size_t kPage = 4096;
size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
size_t control_bytes() { return pages(sizeof(ControlBlock)); }
size_t notice_bytes(int size) { return pages(sizeof(Notice) * kMaxAxes * static_cast<size_t>(size)); }
size_t channel_bytes(int size) { return pages(sizeof(Channel) * kMaxAxes * static_cast<size_t>(size) * static_cast<size_t>(size) * kLanes); }
size_t shared_bytes(int size) { return control_bytes() + notice_bytes(size) + channel_bytes(size); }
// All heaps of a job: 16 TiB of the 128 that a process can map, since a job may have two segments and its host terabytes.
constexpr size_t kAddressSpace = size_t{16} << 40, kLeastHeap = size_t{64} << 20;

// Address space for each rank's heap: what memory can be had now, since pages are taken as they are needed.
size_t usual_heap(int size) { return pages(std::clamp(memory_left().bytes, kLeastHeap, kAddressSpace / static_cast<size_t>(size))); }

std::shared_ptr<Segment> open(int rank, int size, const std::string& path, size_t heap) {
  CHECK(MeshError, size >= 1 && size <= kMaxRanks, "a job has 1 to ", kMaxRanks, " ranks, got ", size);
  CHECK(MeshError, rank >= 0 && rank < size, "rank ", rank, " of ", size);
  return path.empty() ? Job::make_segment(size, heap) : std::make_shared<Segment>(path);
}

}  // namespace

std::shared_ptr<Segment> Job::make_segment(int size, size_t heap) {
  if (heap == 0) heap = usual_heap(size);
  auto segment = std::make_shared<Segment>(shared_bytes(size) + pages(heap) * static_cast<size_t>(size));
  const bool reserved = segment->reserve(0, shared_bytes(size));
  const std::string cause = segment->why_not_reserved();
  CHECK(MeshError, reserved || cause.empty(), "cannot reserve the memory that ranks share: ", cause);
  CHECK(OutOfMemory, reserved, "no memory for the control block: it needs ", shared_bytes(size), " bytes");
  return segment;
}

Job::Job(int rank, int size, const std::string& path, double timeout, size_t heap) : Job(rank, size, open(rank, size, path, heap), timeout) {}

Job::Job(int rank, int size, std::shared_ptr<Segment> segment, double timeout) : segment_(std::move(segment)), timeout_(timeout) {
  const size_t ranks = static_cast<size_t>(size), shared = shared_bytes(size), bytes = segment_->bytes();
  heap_bytes_ = bytes > shared ? (bytes - shared) / ranks : 0;
  CHECK(MeshError, heap_bytes_ > 0 && shared + heap_bytes_ * ranks == bytes && heap_bytes_ % kPage == 0, "the memory that rank 0 shares has ", bytes,
        " bytes, which ", size, " ranks of this version do not divide; all ranks must run the same version of gingham with the same world size");
  control_ = std::make_unique<Control>(static_cast<ControlBlock*>(segment_->at(0)), rank, size, timeout);
  heap_ = std::make_unique<Heap>(*segment_, shared + heap_bytes_ * static_cast<size_t>(rank), heap_bytes_, rank);
  stream_ = std::make_unique<CpuStream>(*heap_);
  heap_->refused = [this](const std::string& message) { out_of_memory(message); };
  control_->out_of_memory = [this] { heap_->fail_after(0); };
  control_->given_up = [this] { heap_->hold(true); };
  control_->reset = [this] { reset(); };
  watch_forks(this);
}

void Job::out_of_memory(const std::string& message) {
  if (main_) return main_->out_of_memory(message);
  if (gpu_)
    return control_->fail(Control::Kind::memory, rank(), message + "; on GPUs the mesh must be made anew: gingham.destroy() and gingham.init()");
  control_->refuse(message);
}

void Job::pair_with(Job& background) {
  background.main_ = this;
  control_->pair_with(&background.control());
}

void Job::end_call() {
  if (!control_->inside()) return;
  control_->end();
  heap_->hold(false);
}

// What this rank has written of every axis: its notices, and the channels that it sends through.
void Job::reset() {
  for (int index = 0; index < kMaxAxes; index++) {
    const AxisMemory memory = memory_of(index);
    Notice& notice = memory.notices[rank()];
    for (Word* word : {&notice.posted, &notice.finished, &notice.turns}) word->store(0);
    for (int to = 0; to < size(); to++)
      for (int lane = 0; lane < kLanes; lane++)
        for (Channel& channel = memory.channel(rank(), to, lane); Word* word : {&channel.sent, &channel.consumed}) word->store(0);
  }
  heap_->reuse();
}

Job::~Job() { forget_forks(this); }

void Job::orphan() { control_->orphan(); }

void Job::use_gpu(int ordinal, Carrier carrier) { gpu_ = make_gpu(*control_, ordinal, carrier, timeout_); }

void Job::reset_peak() {
  if (gpu_) return gpu_->reset_peak();
  heap_->reset_peak();
}

void Job::close() { control_->close(); }

AxisMemory Job::memory_of(int index) const {
  const size_t ranks = static_cast<size_t>(control_->size()), at = static_cast<size_t>(index);
  AxisMemory memory;
  memory.ranks = control_->size();
  memory.notices = static_cast<Notice*>(segment_->at(control_bytes())) + at * ranks;
  memory.channels = static_cast<Channel*>(segment_->at(control_bytes() + notice_bytes(memory.ranks))) + at * ranks * ranks * kLanes;
  return memory;
}

std::unique_ptr<Axis> Job::axis(int index, const std::vector<int>& members, bool windowed, double latency, double bandwidth) {
  CHECK(MeshError, index >= 0 && index < kMaxAxes, "axis index ", index, ", expected 0 to ", kMaxAxes - 1);
  for (int r : members) CHECK(MeshError, r >= 0 && r < size(), "axis member ", r, " of a job of ", size());
  const AxisMemory memory = memory_of(index);
  if (gpu_) {
    CHECK(MeshError, latency == 0 && bandwidth == 0, "link= slows shared memory; a GPU mesh has none");
    return gpu_->axis(std::make_unique<Shm>(*segment_, *control_, memory, members), memory, members);
  }
  if (latency > 0 || bandwidth > 0) return std::make_unique<Link>(*segment_, *control_, memory, members, windowed, latency, bandwidth);
  return std::make_unique<Shm>(*segment_, *control_, memory, members, windowed);
}

}  // namespace gingham
