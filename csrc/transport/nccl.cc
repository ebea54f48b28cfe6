#include "transport/nccl.h"

#include <algorithm>
#include <chrono>
#include <future>

namespace gingham {
namespace {

constexpr auto kLookEvery = std::chrono::milliseconds(50);
constexpr double kMostInACall = 2;  // seconds

// A group of NCCL's, which counts them for each thread: one left open where a call in it throws would hold back all that the thread asks of
// NCCL from then on, torch's calls too.
class NcclGroup {
 public:
  NcclGroup() { NCCL_CHECK(nccl().GroupStart()); }
  ~NcclGroup() {
    if (open_) nccl().GroupEnd();
  }
  void end() {
    open_ = false;
    NCCL_CHECK(nccl().GroupEnd());
  }

 private:
  bool open_ = true;
};

}  // namespace

NcclWorld::NcclWorld(Program& program, CudaStream& compute)
    : program_(program), control_(program.control()), compute_(compute), timeout_(program.timeout()) {
  ncclUniqueId id{};
  if (program.rank() == 0) NCCL_CHECK(nccl().GetUniqueId(&id));
  program.share(id.internal, sizeof(id.internal));
  world_ = patiently([&](ncclComm_t* out) { return nccl().CommInitRank(out, program_.size(), id, program_.rank()); }, "ncclCommInitRank");
  thread_ = std::thread([this] { watch(); });
}

NcclWorld::~NcclWorld() {
  stop_.store(true);
  if (thread_.joinable()) thread_.join();
  if (letting_go_.joinable()) letting_go_.join();
  if (world_ && !aborted_.load()) nccl().CommDestroy(world_);
}

// Making a communicator waits for all its ranks: done beside this thread, which looks meanwhile whether they are alive.
ncclComm_t NcclWorld::patiently(const std::function<ncclResult_t(ncclComm_t*)>& make, const char* what) {
  struct Made {
    ncclComm_t comm = nullptr;
    ncclResult_t status = ncclSuccess;
  };
  auto made = std::make_shared<std::promise<Made>>();
  std::future<Made> later = made->get_future();
  const int ordinal = compute_.ordinal();
  std::thread([made, make, ordinal] {
    cudaSetDevice(ordinal);
    Made out;
    out.status = make(&out.comm);
    made->set_value(out);
  }).detach();
  const double start = now();
  while (later.wait_for(kLookEvery) != std::future_status::ready) {
    control_.look();
    if (now() - start > timeout_) {
      control_.fail(Control::Kind::stalled, control_.rank(), concat(what, " on rank ", control_.rank(), " took longer than ", timeout_, " s"));
      control_.check();
    }
  }
  const Made out = later.get();
  NCCL_CHECK(out.status);
  return out.comm;
}

ncclComm_t NcclWorld::split(int color, int key) {
  return patiently([this, color, key](ncclComm_t* out) { return nccl().CommSplit(world_, color, key, out, nullptr); }, "ncclCommSplit");
}

void NcclWorld::add(Nccl* axis) {
  const std::lock_guard lock(mutex_);
  axes_.push_back(axis);
  const std::lock_guard others(pushes_mutex_);
  if (axis->push_) pushes_.push_back(axis->push_.get());
}

// An axis ends with its groups. What can no longer end, as a rank has died, left or hangs, is aborted: NCCL would wait for it for ever. Ranks
// leave at the end of a job too, once their own groups have ended, which then ends the others'.
bool NcclWorld::ends(Nccl& axis) {
  constexpr double kLast = 1;
  const double start = now();
  while (!axis.idle()) {
    bool left = false;
    for (int r = 0; r < program_.size(); r++) left |= r != program_.rank() && control_.left(program_.member(r));
    if (aborted_.load() || control_.failed() || now() - start > (left ? std::min(kLast, timeout_) : timeout_)) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// From the moment at which this job is over, and for good: what copy engines wait for comes, whatever is queued later. Replays of a graph are seen by
// nobody, and communicators that are aborted may wait for the device, so that this is a thread of its own.
void NcclWorld::let_go() {
  const std::lock_guard lock(pushes_mutex_);
  if (letting_go_.joinable() || pushes_.empty()) return;
  letting_go_ = std::thread([this] {
    for (; !stop_.load(); std::this_thread::sleep_for(std::chrono::microseconds(200))) {
      const std::lock_guard lock(pushes_mutex_);
      for (Push* push : pushes_) push->release();
    }
  });
}

void NcclWorld::remove(Nccl* axis) {
  const bool ended = ends(*axis);
  if (!ended && axis->push_) {
    control_.fail(Control::Kind::stalled, program_.behind(), concat("messages of rank ", control_.rank(), " were on their way when its mesh ended"));
    let_go();
    constexpr double kMost = 5;
    for (const double start = now(); !axis->idle() && now() - start < kMost;) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  {
    const std::lock_guard lock(mutex_);
    axes_.erase(std::find(axes_.begin(), axes_.end(), axis));
    if (!aborted_.load())
      for (auto& each : axis->comms_)
        if (ncclComm_t comm = each.load()) ended ? nccl().CommDestroy(comm) : nccl().CommAbort(comm);
  }
  if (!axis->push_) return;
  {
    const std::lock_guard lock(pushes_mutex_);
    std::erase(pushes_, axis->push_.get());
  }
  axis->push_->leave(axis->idle() && !axis->captured());
}

void NcclWorld::watch() {
  cudaSetDevice(compute_.ordinal());
  // Queries from here must not break a graph capture of another thread.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  while (!stop_.load() && !aborted_.load()) {
    std::this_thread::sleep_for(kLookEvery);
    try {
      look();
    } catch (const Error&) {
      abort_all();
    }
  }
}

// Throws the job's error where there is one.
void NcclWorld::look() {
  const std::lock_guard lock(mutex_);
  for (Nccl* axis : axes_) {
    for (auto& each : axis->comms_) {
      ncclComm_t comm = each.load();
      ncclResult_t status = ncclSuccess;
      if (!comm || nccl().CommGetAsyncError(comm, &status) != ncclSuccess || status == ncclSuccess || status == ncclInProgress) continue;
      control_.fail(Control::Kind::died, program_.behind(), concat("NCCL reports on rank ", control_.rank(), ": ", nccl().GetErrorString(status)));
    }
    if (axis->waiting() > timeout_)
      control_.fail(Control::Kind::stalled, program_.behind(),
                    concat("messages of rank ", control_.rank(), " have been on their way for ", timeout_, " s; init(timeout=) sets the limit"));
  }
  control_.look();
}

void NcclWorld::abort_all() {
  const std::lock_guard lock(mutex_);
  std::unique_lock calls(calls_, std::try_to_lock);
  for (const double start = now(); !calls && now() - start < kMostInACall; calls.try_lock())
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  aborted_.store(true);
  let_go();
  for (Nccl* axis : axes_)
    for (auto& each : axis->comms_)
      if (ncclComm_t comm = each.exchange(nullptr)) nccl().CommAbort(comm);
  if (world_) nccl().CommAbort(std::exchange(world_, nullptr));
}

Nccl::Nccl(std::unique_ptr<Axis> shared, GroupOrder& order, Program& program, AxisMemory memory, NcclWorld& world, const std::vector<int>& members)
    : Queued(std::move(shared), order), control_(program.control()), world_(world) {
  for (auto& comm : comms_) comm = world.split(*std::min_element(members.begin(), members.end()), rank_);
  push_ = Push::make(compute(), program, memory, members, rank_, &why_not_);
  if (push_) take_engines();
  world_.add(this);
}

Nccl::~Nccl() { world_.remove(this); }

void Nccl::carry(int line, std::span<const Message> group) {
  control_.check();
  const std::lock_guard calls(world_.calls_);
  const ncclComm_t comm = comms_[static_cast<size_t>(line)].load();
  CHECK(DeviceError, comm, "rank ", control_.rank(), ": the communicator was aborted after an error; call gingham.destroy and init again");
  const cudaStream_t stream = lines_[static_cast<size_t>(line)].stream;
  if (push_) return push_->carry(line, group, engines());
  NcclGroup all;
  for (const Message& m : group) {
    if (m.bytes == 0) continue;
    if (m.way == Message::Way::send)
      NCCL_CHECK(nccl().Send(m.data, m.bytes, ncclInt8, m.peer, comm, stream));
    else
      NCCL_CHECK(nccl().Recv(m.data, m.bytes, ncclInt8, m.peer, comm, stream));
  }
  all.end();
}

}  // namespace gingham
