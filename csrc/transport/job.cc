#include "transport/job.h"

#include <unistd.h>

#include "transport/fork.h"
#include "transport/link.h"
#include "transport/shm.h"

namespace gingham {
namespace {

constexpr size_t kPage = 4096;
size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
size_t control_bytes() { return pages(sizeof(ControlBlock)); }
size_t board_bytes(int size) { return pages(sizeof(Board) * kMaxAxes * static_cast<size_t>(size)); }
size_t channel_bytes(int size) { return pages(sizeof(Channel) * kMaxAxes * static_cast<size_t>(size) * static_cast<size_t>(size) * kLanes); }
size_t shared_bytes(int size) { return control_bytes() + board_bytes(size) + channel_bytes(size); }
// Address space for each rank's heap: as much as the host has memory. Pages are taken as they are needed.
size_t heap_bytes() { return pages(static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE))); }
size_t segment_bytes(int size) { return shared_bytes(size) + heap_bytes() * static_cast<size_t>(size); }

std::shared_ptr<Segment> open(int rank, int size, const std::string& path) {
  CHECK(MeshError, size >= 1 && size <= kMaxRanks, "a job has 1 to ", kMaxRanks, " ranks, got ", size);
  CHECK(MeshError, rank >= 0 && rank < size, "rank ", rank, " of ", size);
  return path.empty() ? Job::make_segment(size) : std::make_shared<Segment>(path, segment_bytes(size));
}

}  // namespace

std::shared_ptr<Segment> Job::make_segment(int size) {
  auto segment = std::make_shared<Segment>(segment_bytes(size));
  CHECK(OutOfMemory, segment->reserve(0, shared_bytes(size)), "no memory for the control block: needs ", shared_bytes(size), " bytes");
  return segment;
}

Job::Job(int rank, int size, const std::string& path, double timeout) : Job(rank, size, open(rank, size, path), timeout) {}

Job::Job(int rank, int size, std::shared_ptr<Segment> segment, double timeout) : segment_(std::move(segment)), timeout_(timeout) {
  control_ = std::make_unique<Control>(static_cast<ControlBlock*>(segment_->at(0)), rank, size, timeout);
  const uint64_t begin = shared_bytes(size) + heap_bytes() * static_cast<size_t>(rank);
  heap_ = std::make_unique<Heap>(*segment_, begin, heap_bytes(), rank);
  stream_ = std::make_unique<CpuStream>(*heap_);
  watch_forks(this);
}

Job::~Job() { forget_forks(this); }

void Job::orphan() { control_->orphan(); }

void Job::use_gpu(int ordinal, Carrier carrier) { gpu_ = make_gpu(*control_, ordinal, carrier, timeout_); }

void Job::reset_peak() {
  if (gpu_) return gpu_->reset_peak();
  heap_->reset_peak();
}

void Job::close() { control_->close(); }

std::unique_ptr<Transport> Job::axis(int index, const std::vector<int>& members, double latency, double bandwidth) {
  CHECK(MeshError, index >= 0 && index < kMaxAxes, "axis index ", index, ", expected 0 to ", kMaxAxes - 1);
  for (int r : members) CHECK(MeshError, r >= 0 && r < size(), "axis member ", r, " of a job of ", size());
  const size_t ranks = static_cast<size_t>(size()), at = static_cast<size_t>(index);
  AxisMemory memory;
  memory.ranks = size();
  memory.boards = static_cast<Board*>(segment_->at(control_bytes())) + at * ranks;
  memory.channels = static_cast<Channel*>(segment_->at(control_bytes() + board_bytes(size()))) + at * ranks * ranks * kLanes;
  if (gpu_) {
    CHECK(MeshError, latency == 0 && bandwidth == 0, "link= slows shared memory; a GPU mesh has none");
    return gpu_->axis(std::make_unique<Shm>(*segment_, *control_, memory, members), memory, members);
  }
  if (latency > 0 || bandwidth > 0) return std::make_unique<Link>(*segment_, *control_, memory, members, latency, bandwidth);
  return std::make_unique<Shm>(*segment_, *control_, memory, members);
}

}  // namespace gingham
