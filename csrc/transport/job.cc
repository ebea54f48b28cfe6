#include "transport/job.h"

#include <algorithm>

#include "base/memory.h"
#include "transport/fork.h"
#include "transport/link.h"
#include "transport/shm.h"

namespace gingham {
namespace {

constexpr size_t kPage = 4096;
static_assert(sizeof(Notice) % alignof(Channel) == 0 && sizeof(Channel) % alignof(Notice) == 0);
size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
size_t control_bytes() { return pages(sizeof(ControlBlock)); }
// All heaps of a job: 16 TiB of the 128 that a process can map, since its host may have terabytes.
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
  auto segment = std::make_shared<Segment>(control_bytes() + pages(heap) * static_cast<size_t>(size));
  const bool reserved = segment->reserve(0, control_bytes());
  const std::string cause = segment->why_not_reserved();
  CHECK(MeshError, reserved || cause.empty(), "cannot reserve the memory that ranks share: ", cause);
  CHECK(OutOfMemory, reserved, "no memory for the control block: it needs ", control_bytes(), " bytes");
  return segment;
}

Job::Job(int rank, int size, const std::string& path, double timeout, size_t heap) : Job(rank, size, open(rank, size, path, heap), timeout) {}

Job::Job(int rank, int size, std::shared_ptr<Segment> segment, double timeout) : segment_(std::move(segment)) {
  const size_t ranks = static_cast<size_t>(size), shared = control_bytes(), bytes = segment_->bytes();
  heap_bytes_ = bytes > shared ? (bytes - shared) / ranks : 0;
  CHECK(MeshError, heap_bytes_ > 0 && shared + heap_bytes_ * ranks == bytes && heap_bytes_ % kPage == 0, "the memory that rank 0 shares has ", bytes,
        " bytes, which ", size, " ranks of this version do not divide; all ranks must run the same version of gingham with the same world size");
  control_ = std::make_unique<Control>(static_cast<ControlBlock*>(segment_->at(0)), rank, size, timeout);
  heap_ = std::make_unique<Heap>(*segment_, shared + heap_bytes_ * static_cast<size_t>(rank), heap_bytes_, rank);
  stream_ = std::make_unique<CpuStream>(*heap_);
  heap_->refused = [this](const std::string& message) { out_of_memory(message); };
  watch_forks(this);
}

thread_local Program* Calling::current = nullptr;

void Job::out_of_memory(const std::string& message) {
  if (gpu_)
    return control_->fail(Control::Kind::memory, rank(), message + "; on GPUs the mesh must be made anew: gingham.destroy() and gingham.init()");
  std::shared_ptr<Program> first;
  Program* program = Calling::current;
  if (!program) {
    const std::lock_guard lock(programs_lock_);
    for (size_t i = 0; i < programs_.size() && !first; i++) first = programs_[i].lock();
    program = first.get();
  }
  if (program) (program->main() ? program->main() : program)->refuse(message);
}

std::shared_ptr<Program> Job::program(uint64_t id, std::vector<int> members, const std::vector<int>& lines, double timeout) {
  size_t room = 0;
  for (int line : lines) room += AxisMemory::bytes(members.size(), static_cast<size_t>(line));
  auto made = std::make_shared<Program>(*control_, *segment_, *heap_, id, std::move(members), lines, room, timeout);
  Program* program = made.get();
  program->fail_allocation = [this] { heap_->fail_after(0); };
  program->given_up = [this] { heap_->hold(true); };
  program->reset = [this, program] { reset(*program); };
  const std::lock_guard lock(programs_lock_);
  std::erase_if(programs_, [](const auto& each) { return each.expired(); });
  programs_.push_back(made);
  return made;
}

void Job::end_call(Program& program) {
  if (!program.inside()) return;
  program.end();
  if (!program.beside()) heap_->hold(false);
}

namespace {

AxisMemory memory_of(const Program& program, int index) {
  const size_t members = static_cast<size_t>(program.size());
  char* at = program.room();
  for (int i = 0; i < index; i++) at += AxisMemory::bytes(members, static_cast<size_t>(program.lines()[static_cast<size_t>(i)]));
  AxisMemory memory;
  memory.line = program.lines()[static_cast<size_t>(index)];
  memory.notices = reinterpret_cast<Notice*>(at);
  memory.channels = reinterpret_cast<Channel*>(at + sizeof(Notice) * members);
  return memory;
}

}  // namespace

// What this rank has written of every axis: its notices, and the channels that it sends through.
void Job::reset(Program& program) {
  for (int index = 0; index < static_cast<int>(program.lines().size()); index++) {
    const AxisMemory memory = memory_of(program, index);
    Notice& notice = memory.notices[program.rank()];
    for (Word* word : {&notice.posted, &notice.finished, &notice.turns}) word->store(0);
    for (int to = 0; to < memory.line; to++)
      for (int lane = 0; lane < kLanes; lane++)
        for (Channel& channel = memory.channel(program.rank(), to, lane); Word* word : {&channel.sent, &channel.consumed}) word->store(0);
  }
  heap_->reuse();
}

Job::~Job() { forget_forks(this); }

void Job::orphan() { control_->orphan(); }

void Job::use_gpu(int ordinal, Carrier carrier) { gpu_ = make_gpu(*control_, ordinal, carrier); }

void Job::reset_peak() {
  if (gpu_) return gpu_->reset_peak();
  heap_->reset_peak();
}

void Job::close() { control_->close(); }

std::unique_ptr<Axis> Job::axis(Program& program, int index, const std::vector<int>& members, bool windowed, double latency, double bandwidth) {
  const int axes = static_cast<int>(program.lines().size());
  CHECK(MeshError, index >= 0 && index < axes, "axis index ", index, ", expected 0 to ", axes - 1);
  for (int r : members) CHECK(MeshError, r >= 0 && r < program.size(), "axis member ", r, " of a program of ", program.size());
  const AxisMemory memory = memory_of(program, index);
  CHECK(MeshError, static_cast<int>(members.size()) <= memory.line, "axis ", index, " of ", members.size(), " ranks, expected at most ", memory.line);
  if (gpu_) {
    CHECK(MeshError, latency == 0 && bandwidth == 0, "link= slows shared memory; a GPU mesh has none");
    return gpu_->axis(program, std::make_unique<Shm>(*segment_, program, memory, members), memory, members);
  }
  if (latency > 0 || bandwidth > 0) return std::make_unique<Link>(*segment_, program, memory, members, windowed, latency, bandwidth);
  return std::make_unique<Shm>(*segment_, program, memory, members, windowed);
}

}  // namespace gingham
