#include "transport/push.h"

#include <cuda.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace gingham {
namespace {

constexpr size_t kAxis = size_t{64} << 20, kUnit = 256, kTrial = 4096;
constexpr double kTrialSeconds = 10, kLeaveSeconds = 1;

// The driver's operations on memory in the order of a stream; nothing links to libcuda.
class StreamMemory {
 public:
  static const StreamMemory& get() {
    static const StreamMemory found;
    return found;
  }
  // Waits until a flag is set and clears it. flush: what other devices wrote before it was set is seen, where the device has to be told.
  void take(cudaStream_t stream, CUdeviceptr flag, unsigned flush) const {
    CUstreamBatchMemOpParams both[2] = {};
    both[0].waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
    both[0].waitValue.address = flag;
    both[0].waitValue.value = 1;
    both[0].waitValue.flags = CU_STREAM_WAIT_VALUE_EQ | flush;
    both[1] = write(flag, 0);
    run(stream, 2, both);
  }
  // After all that the stream did before, seen by everybody.
  void set(cudaStream_t stream, CUdeviceptr flag) const {
    CUstreamBatchMemOpParams one = write(flag, 1);
    run(stream, 1, &one);
  }

 private:
  using Run = CUresult (*)(CUstream, unsigned, CUstreamBatchMemOpParams*, unsigned);
  StreamMemory() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuStreamBatchMemOp", &function, 12000, cudaEnableDefault, &result);
    CHECK(DeviceError, status == cudaSuccess && result == cudaDriverEntryPointSuccess && function,
          "this driver has no cuStreamBatchMemOp of CUDA 12 or newer");
    run_ = reinterpret_cast<Run>(function);
  }
  static CUstreamBatchMemOpParams write(CUdeviceptr flag, uint32_t value) {
    CUstreamBatchMemOpParams out = {};
    out.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
    out.writeValue.address = flag;
    out.writeValue.value = value;
    out.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
    return out;
  }
  void run(cudaStream_t stream, unsigned count, CUstreamBatchMemOpParams* operations) const {
    const CUresult status = run_(stream, count, operations, 0);
    CHECK(DeviceError, status == CUDA_SUCCESS, "cuStreamBatchMemOp: error ", static_cast<int>(status));
  }
  Run run_ = nullptr;
};

// Of an axis, for all its channels.
size_t window_bytes() {
  const char* told = getenv("GINGHAM_COPY_BYTES");
  if (!told) return kAxis;
  char* end = nullptr;
  const size_t bytes = strtoull(told, &end, 10);
  CHECK(DeviceError, *told >= '0' && *told <= '9' && *end == 0, "GINGHAM_COPY_BYTES=", told, ", expected a number of bytes");
  return bytes;
}

size_t channels(size_t ranks) { return (ranks - 1) * Push::kLines; }

void show(char* to, size_t room, const std::string& text) { snprintf(to, room, "%s", text.c_str()); }

}  // namespace

// The messages of a group in one channel, piece by piece.
struct Push::Flow {
  Message::Way way;
  int peer;
  std::vector<const Message*> messages;
  size_t at = 0, moved = 0;
  bool over() const { return at == messages.size(); }
};

std::unique_ptr<Push> Push::make(CudaStream& compute, Program& program, AxisMemory memory, const std::vector<int>& members, int rank,
                                 std::string* why_not) {
  const bool here = std::all_of(members.begin(), members.end(), [&](int member) { return program.here(member); });
  if (members.size() < 2 || !here) {
    *why_not = here ? "an axis of one rank" : "the axis goes over several hosts";
    return nullptr;
  }
  std::unique_ptr<Push> out(new Push(compute, program, memory, members, rank));
  // Every rank goes the same steps: each knows of all, after a step, whether they could.
  if (out->agree(1, [&] { out->offer(); }) && out->agree(2, [&] { out->accept(); }) && out->agree(3, [&] { out->check(); })) return out;
  for (size_t peer = 0; peer < members.size() && why_not->empty(); peer++)
    if (const Shown& shown = out->shown(static_cast<int>(peer)); shown.why_not[0])
      *why_not = concat("rank ", program.member(members[peer]), ": ", shown.why_not);
  out->leave(true);
  return nullptr;
}

Push::Push(CudaStream& compute, Program& program, AxisMemory memory, const std::vector<int>& members, int rank)
    : compute_(compute), program_(program), memory_(memory), members_(members), rank_(rank), windows_(members.size()) {
  pieces_.resize(2 * channels(members_.size()));
}

bool Push::agree(int step, const std::function<void()>& act) {
  Shown& mine = shown(rank_);
  try {
    act();
    mine.able[step] = 1;
  } catch (const Error& error) {
    show(mine.why_not, sizeof(mine.why_not), error.what());
    cudaGetLastError();  // else the next check of a launch would report it
  }
  mine.steps.store(static_cast<uint32_t>(step));
  bool all = true;
  for (size_t peer = 0; peer < members_.size(); peer++) {
    Shown& theirs = shown(static_cast<int>(peer));
    program_.wait(theirs.steps, static_cast<uint32_t>(step), members_[peer], "the start of messages by copy engines");
    all &= theirs.able[step] == 1;
  }
  return all;
}

// A window of its own, and where the others find it; the first rank's flags for all.
void Push::offer() {
  const char* asked = getenv("GINGHAM_COPY_ENGINES");
  CHECK(DeviceError, asked && *asked, "GINGHAM_COPY_ENGINES=1 is not set");
  CHECK(DeviceError, std::string(asked) == "1", "GINGHAM_COPY_ENGINES=", asked, ", 1 asks for them");
  slot_bytes_ = std::max(window_bytes() / (channels(members_.size()) * kSlots) / kUnit * kUnit, kUnit);
  StreamMemory::get();
  compute_.enter();
  int flushes = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&flushes, cudaDevAttrCanFlushRemoteWrites, compute_.ordinal()));
  flush_ = flushes ? CU_STREAM_WAIT_VALUE_FLUSH : 0;
  const size_t bytes = slot_bytes_ * kSlots * channels(members_.size());
  CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&window_), bytes));
  CUDA_CHECK(cudaMemsetAsync(window_, 0, bytes, native(compute_)));
  CUDA_CHECK(cudaStreamSynchronize(native(compute_)));
  cudaIpcMemHandle_t handle{};
  CUDA_CHECK(cudaIpcGetMemHandle(&handle, window_));
  Shown& mine = shown(rank_);
  static_assert(sizeof(handle) == sizeof(mine.window));
  memcpy(mine.window, &handle, sizeof(handle));
  mine.slot_bytes = slot_bytes_;
  if (rank_ > 0) return;
  const size_t ranks = members_.size(), page = 4096;
  flags_ = std::make_unique<Segment>((ranks * ranks * kLines * kSlots * sizeof(Flag) + page - 1) / page * page);
  for (size_t from = 0; from < ranks; from++)
    for (size_t to = 0; to < ranks; to++)
      for (int line = 0; line < kLines; line++)
        for (uint32_t n = 0; n < kSlots; n++) flag(static_cast<int>(from), static_cast<int>(to), line, n).open.store(1);
  show(mine.flags, sizeof(mine.flags), flags_->path());
}

void Push::accept() {
  for (int peer = 0; peer < static_cast<int>(members_.size()); peer++) {
    const Shown& theirs = shown(peer);
    CHECK(DeviceError, theirs.slot_bytes == slot_bytes_, "GINGHAM_COPY_BYTES gives slots of ", slot_bytes_, " bytes, rank ",
          program_.member(members_[static_cast<size_t>(peer)]), " has them of ", theirs.slot_bytes);
    if (peer == rank_) continue;
    cudaIpcMemHandle_t handle{};
    memcpy(&handle, theirs.window, sizeof(handle));
    void* window = nullptr;
    const cudaError_t status = cudaIpcOpenMemHandle(&window, handle, cudaIpcMemLazyEnablePeerAccess);
    CHECK(DeviceError, status == cudaSuccess, "cudaIpcOpenMemHandle of the memory of rank ", program_.member(members_[static_cast<size_t>(peer)]),
          ": ", cudaGetErrorString(status));
    windows_[static_cast<size_t>(peer)] = static_cast<char*>(window);
  }
  if (!flags_) flags_ = std::make_unique<Segment>(std::string(shown(0).flags));
  CUDA_CHECK(cudaHostRegister(flags_->base(), flags_->bytes(), cudaHostRegisterPortable | cudaHostRegisterMapped));
  registered_ = true;
  void* found = nullptr;
  CUDA_CHECK(cudaHostGetDevicePointer(&found, flags_->base(), 0));
  flags_on_device_ = static_cast<char*>(found);
}

// Known bytes through every slot from every rank, compared on the host: what the driver allows it may still not do.
void Push::check() {
  const size_t peers = members_.size() - 1;
  void* room = nullptr;
  CUDA_CHECK(cudaMalloc(&room, 2 * peers * kTrial));
  const std::unique_ptr<void, cudaError_t (*)(void*)> held(room, cudaFree);
  Engines engines;
  std::string wrong;  // the others go on with their rounds, too
  try {
    for (int line = 0; line < kLines; line++)
      for (int round = 0; round < kSlots; round++)
        if (const std::string found = compare(line, round, static_cast<char*>(room), peers * kTrial, engines); wrong.empty()) wrong = found;
  } catch (const DeviceError&) {
    end(engines, 0);
    throw;
  }
  CHECK(DeviceError, wrong.empty(), wrong);
}

// Waits for what is queued; what has not ended after `patience` seconds is let go.
bool Push::end(Engines& engines, double patience) {
  Event over;
  engines.join();
  over.record(engines.in());
  bool late = false;
  for (const double start = now(); cudaEventQuery(over.get()) == cudaErrorNotReady; nap(0.0002)) {
    late |= now() - start > patience;
    if (late) release();
  }
  return !late;
}

std::string Push::compare(int line, int round, char* room, size_t bytes, Engines& engines) {
  const int size = static_cast<int>(members_.size());
  const auto value = [&](int from, int to) { return static_cast<char>(1 + (((from * size + to) * kLines + line) * kSlots + round) % 251); };
  std::vector<Message> group;
  std::vector<char> sent(bytes), got(bytes);
  for (int hop = 1; hop < size; hop++) {
    const int to = (rank_ + hop) % size, from = (rank_ + size - hop) % size;
    const size_t at = static_cast<size_t>(hop - 1) * kTrial;
    std::fill_n(sent.begin() + static_cast<std::ptrdiff_t>(at), kTrial, value(rank_, to));
    group.push_back({Message::Way::send, to, room + at, kTrial, 0});
    group.push_back({Message::Way::recv, from, room + bytes + at, kTrial, 0});
  }
  CUDA_CHECK(cudaMemcpyAsync(room, sent.data(), bytes, cudaMemcpyHostToDevice, engines.in()));
  CUDA_CHECK(cudaMemsetAsync(room + bytes, 0, bytes, engines.in()));
  Event filled;
  filled.record(engines.in());
  engines.hold_back_leaving(filled);
  carry(line, group, engines);
  const double most = std::min(kTrialSeconds, program_.timeout() / 2);
  CHECK(DeviceError, end(engines, most), "messages of the start-up check did not come within ", most, " s");
  CUDA_CHECK(cudaMemcpyAsync(got.data(), room + bytes, bytes, cudaMemcpyDeviceToHost, engines.in()));
  CUDA_CHECK(cudaStreamSynchronize(engines.in()));
  for (int hop = 1; hop < size; hop++) {
    const int from = (rank_ + size - hop) % size;
    const auto begin = got.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(hop - 1) * kTrial);
    if (!std::all_of(begin, begin + kTrial, [&](char each) { return each == value(from, rank_); }))
      return concat("what rank ", program_.member(members_[static_cast<size_t>(from)]), " pushed in the start-up check came wrong");
  }
  return {};
}

Push::Flag& Push::flag(int from, int to, int line, uint32_t slot) const {
  const size_t ranks = members_.size();
  const size_t channel = (static_cast<size_t>(from) * ranks + static_cast<size_t>(to)) * kLines + static_cast<size_t>(line);
  return reinterpret_cast<Flag*>(flags_->base())[channel * kSlots + slot];
}

unsigned long long Push::on_device(const std::atomic<uint32_t>& word) const {
  return reinterpret_cast<CUdeviceptr>(flags_on_device_ + flags_->offset_of(&word));
}

// In a window the channels stand by the sender's distance, ahead of the window's rank, and by line.
char* Push::slot(char* window, int ahead, int line, uint32_t number) const {
  const size_t channel = static_cast<size_t>(ahead - 1) * kLines + static_cast<size_t>(line);
  return window + (channel * kSlots + number) * slot_bytes_;
}

void Push::carry(int line, std::span<const Message> group, Engines& engines) {
  std::vector<Flow> out, in;
  for (const Message& m : group) {
    if (m.bytes == 0) continue;
    std::vector<Flow>& flows = m.way == Message::Way::send ? out : in;
    auto at = std::find_if(flows.begin(), flows.end(), [&](const Flow& flow) { return flow.peer == m.peer; });
    if (at == flows.end()) at = flows.insert(flows.end(), Flow{m.way, m.peer, {}});
    at->messages.push_back(&m);
  }
  counted_ = engines.capture() ? &captured_ : &pieces_;
  if (engines.capture() != std::exchange(capture_, engines.capture())) captured_.assign(pieces_.size(), 0);
  const auto left = [](const std::vector<Flow>& flows) { return !std::all_of(flows.begin(), flows.end(), [](const Flow& f) { return f.over(); }); };
  while (left(out) || left(in)) {
    const cudaStream_t leaving = engines.leaving();
    for (Flow& flow : out)
      if (!flow.over()) piece(flow, line, leaving);
    const cudaStream_t coming = engines.coming();
    for (Flow& flow : in)
      if (!flow.over()) piece(flow, line, coming);
    engines.end_round();
  }
}

void Push::piece(Flow& flow, int line, cudaStream_t stream) {
  const StreamMemory& memory = StreamMemory::get();
  const Message& m = *flow.messages[flow.at];
  const bool sends = flow.way == Message::Way::send;
  const int size = static_cast<int>(members_.size()), peer = flow.peer, ahead = ((sends ? rank_ - peer : peer - rank_) + size) % size;
  const size_t channel = static_cast<size_t>(ahead - 1) * kLines + static_cast<size_t>(line);
  const uint32_t number = (*counted_)[2 * channel + sends]++ % kSlots;
  // The first piece of several is a short one, so that the copies of the streams on which they leave do not begin and end together.
  const bool first = flow.moved == 0 && m.bytes > slot_bytes_;
  const size_t bytes = first ? slot_bytes_ / 2 : std::min(slot_bytes_, m.bytes - flow.moved);
  char* data = static_cast<char*>(m.data) + flow.moved;
  char* room = slot(sends ? windows_[static_cast<size_t>(peer)] : window_, ahead, line, number);
  const Flag& flag = sends ? this->flag(rank_, peer, line, number) : this->flag(peer, rank_, line, number);
  memory.take(stream, on_device(sends ? flag.open : flag.full), flush_);
  CUDA_CHECK(cudaMemcpyAsync(sends ? room : data, sends ? data : room, bytes, cudaMemcpyDefault, stream));
  memory.set(stream, on_device(sends ? flag.full : flag.open));
  flow.moved += bytes;
  if (flow.moved == m.bytes) flow.at++, flow.moved = 0;
}

void Push::release() {
  for (int peer = 0; peer < static_cast<int>(members_.size()); peer++)
    for (int line = 0; line < kLines && peer != rank_; line++)
      for (uint32_t n = 0; n < kSlots; n++) {
        flag(peer, rank_, line, n).full.store(1);
        flag(rank_, peer, line, n).open.store(1);
      }
}

// Its own window goes once all others have closed it; those who died or hang have not.
void Push::leave(bool ended) {
  if (!ended) {
    (void)flags_.release();
    return;
  }
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(compute_.ordinal());
  if (std::exchange(registered_, false)) cudaHostUnregister(flags_->base());
  flags_.reset();
  for (char*& each : windows_)
    if (each) cudaIpcCloseMemHandle(std::exchange(each, nullptr));
  constexpr uint32_t kClosed = 4;
  shown(rank_).steps.store(kClosed);
  const auto closed = [&] {
    for (size_t peer = 0; peer < members_.size(); peer++)
      if (shown(static_cast<int>(peer)).steps.load() < kClosed) return false;
    return true;
  };
  for (const double start = now(); !closed() && now() - start < kLeaveSeconds;) nap(0.0005);
  if (window_ && closed()) cudaFree(window_);
  window_ = nullptr;
  cudaSetDevice(before);
  cudaGetLastError();
}

}  // namespace gingham
