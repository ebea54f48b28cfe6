#include "transport/job.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <random>

#include "base/memory.h"
#include "transport/fork.h"
#include "transport/link.h"
#include "transport/shm.h"
#include "transport/wire.h"

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

std::vector<int> all_of(int size) {
  std::vector<int> ranks(static_cast<size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

std::shared_ptr<Segment> open(int rank, int size, size_t locals, const std::string& path, size_t heap) {
  CHECK(MeshError, size >= 1 && size <= kMaxRanks, "a job has 1 to ", kMaxRanks, " ranks, got ", size);
  CHECK(MeshError, rank >= 0 && rank < size, "rank ", rank, " of ", size);
  return path.empty() ? Job::make_segment(locals ? static_cast<int>(locals) : size, heap) : std::make_shared<Segment>(path);
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

Job::Job(int rank, int size, const std::string& path, double timeout, size_t heap, std::vector<int> locals, uint64_t nonce)
    : Job(rank, size, open(rank, size, locals.size(), path, heap), timeout, locals) {
  auto* block = static_cast<ControlBlock*>(segment_->at(0));
  if (path.empty()) {
    while (block->nonce == 0) block->nonce = std::random_device()() | static_cast<uint64_t>(std::random_device()()) << 32;
  } else {
    CHECK(MeshError, nonce == 0 || block->nonce == nonce, "what lies at ", path, " is the memory of another job");
  }
}

Job::Job(int rank, int size, std::shared_ptr<Segment> segment, double timeout, std::vector<int> locals) : segment_(std::move(segment)) {
  if (locals.empty()) locals = all_of(size);
  CHECK(MeshError, locals.size() <= kMaxHostRanks, "a host has at most ", kMaxHostRanks, " ranks of a job, got ", locals.size());
  const auto place = static_cast<size_t>(std::find(locals.begin(), locals.end(), rank) - locals.begin());
  CHECK(MeshError, place < locals.size(), "rank ", rank, " is not among the ranks of its own host");
  const size_t ranks = locals.size(), shared = control_bytes(), bytes = segment_->bytes();
  heap_bytes_ = bytes > shared ? (bytes - shared) / ranks : 0;
  CHECK(MeshError, heap_bytes_ > 0 && shared + heap_bytes_ * ranks == bytes && heap_bytes_ % kPage == 0, "the memory that rank ", locals[0],
        " shares has ", bytes, " bytes, which ", ranks, " ranks of this version do not divide: another file, or another version of gingham");
  control_ = std::make_unique<Control>(static_cast<ControlBlock*>(segment_->at(0)), rank, size, std::move(locals), timeout);
  heap_ = std::make_unique<Heap>(*segment_, shared + heap_bytes_ * place, heap_bytes_, rank);
  stream_ = std::make_unique<CpuStream>(*heap_);
  control_->broken_off = [this] { heap_->hold(true); };
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
  size_t room = 0, locals = 0;
  for (int r : members) locals += r >= 0 && r < size() && control_->here(r);
  for (int line : lines) room += AxisMemory::bytes(members.size(), std::min(static_cast<size_t>(line), locals));
  auto made = std::make_shared<Program>(*control_, *segment_, *heap_, id, std::move(members), lines, room, timeout);
  Program* program = made.get();
  program->fail_allocation = [this] { gpu_ ? gpu_->fail_next() : heap_->fail_after(0); };
  program->given_up = [this] { heap_->hold(true); };
  program->reset = [this, program] { reset(*program); };
  const std::lock_guard lock(programs_lock_);
  std::erase_if(programs_, [](const auto& each) { return each.expired(); });
  programs_.push_back(made);
  return made;
}

void Job::span(std::unique_ptr<Hosts> hosts) {
  hosts_ = std::move(hosts);
  control_->span(hosts_.get());
}

uint64_t Job::nonce() const { return static_cast<const ControlBlock*>(segment_->at(0))->nonce; }

std::string Job::told(uint64_t program) {
  const ProgramEntry* entry = program ? control_->program(program) : nullptr;
  if (program && !entry) return {};
  return Hosts::words(told_of(*control_, entry ? static_cast<ProgramBlock*>(segment_->at(entry->offset.load())) : nullptr));
}

void Job::end_call(Program& program) {
  if (!program.inside()) return;
  program.end();
  if (!program.beside() && !control_->failed()) heap_->hold(false);  // of a job that is over nothing is used again
}

namespace {

// Lines have channels between ranks of one host only.
AxisMemory memory_of(const Program& program, int index) {
  const size_t members = static_cast<size_t>(program.size());
  const auto line = [&](int i) { return std::min(program.lines()[static_cast<size_t>(i)], program.locals()); };
  char* at = program.room();
  for (int i = 0; i < index; i++) at += AxisMemory::bytes(members, static_cast<size_t>(line(i)));
  AxisMemory memory;
  memory.line = line(index);
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

void Job::use_gpu(int ordinal, Carrier carrier) {
  gpu_ = make_gpu(*control_, ordinal, carrier);
  gpu_->tell_refusals([this](const std::string& message) { out_of_memory(concat("rank ", rank(), ": ", message)); });
}

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
  const int line = program.lines()[static_cast<size_t>(index)];
  CHECK(MeshError, static_cast<int>(members.size()) <= line, "axis ", index, " of ", members.size(), " ranks, expected at most ", line);
  std::vector<int> locals;
  std::copy_if(members.begin(), members.end(), std::back_inserter(locals), [&](int r) { return program.here(r); });
  if (locals.size() < members.size()) {
    CHECK(MeshError, latency == 0 && bandwidth == 0, "link= slows shared memory; this axis goes over several hosts");
    auto local = locals.size() > 1 ? std::make_unique<Shm>(*segment_, program, memory, locals, false) : nullptr;
    auto wire = std::make_unique<Wire>(program, *hosts_, index, members, std::move(local));
    if (gpu_) return gpu_->axis(program, std::move(wire), memory, members);
    return wire;
  }
  if (gpu_) {
    CHECK(MeshError, latency == 0 && bandwidth == 0, "link= slows shared memory; a GPU mesh has none");
    return gpu_->axis(program, std::make_unique<Shm>(*segment_, program, memory, members), memory, members);
  }
  if (latency > 0 || bandwidth > 0) return std::make_unique<Link>(*segment_, program, memory, members, windowed, latency, bandwidth);
  return std::make_unique<Shm>(*segment_, program, memory, members, windowed);
}

}  // namespace gingham
