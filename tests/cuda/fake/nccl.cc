// NCCL's point-to-point half without a GPU: ranks are processes or threads that share a memory file, a group of sends and receives is one
// piece of work on its stream whose messages progress side by side. Environment:
//   FAKE_NCCL_BUFFERED=1      a send ends when its data fits into the mailbox; otherwise only when it has been received (rendezvous)
//   FAKE_NCCL_ONE_AT_A_TIME=1 a device runs one group to its end before it starts another, of whichever communicator
//   FAKE_NCCL_FAIL=rank,n     the n-th group of that rank reports ncclRemoteError and never ends until it is aborted
//   FAKE_NCCL_HANG=rank,n     the same without a report
// A receive whose size differs from its send's is an asynchronous error, where the real one would hang or corrupt memory.
#include "mailbox.h"

namespace fake {
namespace {

bool flag(const char* name) {
  const char* text = getenv(name);
  return text && atoi(text) != 0;
}

thread_local int depth = 0;
thread_local std::vector<std::pair<Comm*, Group>> pending;

std::atomic<uint64_t> received{0};

// Whether the variable names this rank and its group.
bool chosen(const char* name, const Comm& comm, int number) {
  int rank = -1, group = -1;
  const char* text = getenv(name);
  return text && sscanf(text, "%d,%d", &rank, &group) == 2 && comm.device->rank == rank && number == group;
}

void run(Comm& comm, Group& group) {
  std::unique_lock<std::mutex> alone;
  if (flag("FAKE_NCCL_ONE_AT_A_TIME")) alone = std::unique_lock(comm.device->mutex);
  const int number = static_cast<int>(comm.device->groups++);
  const bool fails = chosen("FAKE_NCCL_FAIL", comm, number), broken = fails || chosen("FAKE_NCCL_HANG", comm, number);
  const bool buffered = flag("FAKE_NCCL_BUFFERED");
  if (fails) comm.error = ncclRemoteError;
  Jitter jitter;
  for (int idle = 0; !comm.aborted.load();) {
    bool moved = false, left = broken;
    for (size_t i = 0; i < group.ops.size() && !broken; i++) {
      Op& op = group.ops[i];
      if (op.done) continue;
      left = true;
      bool blocked = false;  // an earlier message of the same peer and way goes first
      for (size_t j = 0; j < i; j++) blocked |= !group.ops[j].done && group.ops[j].peer == op.peer && group.ops[j].sends == op.sends;
      if (!blocked) moved |= comm.progress(op, buffered);
    }
    if (!left) break;
    if (!moved) nap(idle++ < 20 ? 1 : 50);
    if (moved) jitter.pause();
  }
  for (const Op& op : group.ops)
    if (!op.sends) received += op.bytes;
}

ncclResult_t launch() {
  for (auto& [comm, group] : pending) {
    auto* shared = new Group(std::move(group));
    Comm* held = comm;
    enqueue(shared->stream, [held, shared] {
      run(*held, *shared);
      delete shared;
    });
  }
  pending.clear();
  return ncclSuccess;
}

ncclResult_t add(Comm* comm, Op op, cudaStream_t stream) {
  if (comm->aborted.load()) return ncclInvalidUsage;
  Group* group = nullptr;
  for (auto& [other, theirs] : pending)
    if (other == comm && theirs.stream == stream) group = &theirs;
  if (!group) {
    pending.push_back({comm, Group{stream, {}}});
    group = &pending.back().second;
  }
  group->ops.push_back(op);
  return depth == 0 ? launch() : ncclSuccess;
}

}  // namespace
}  // namespace fake

using fake::Comm;

extern "C" {

unsigned long long fake_nccl_received() { return fake::received.load(); }

ncclResult_t ncclGetVersion(int* version) {
  *version = 22800;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) { return result == ncclRemoteError ? "remote error (injected)" : "an error of the fake NCCL"; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  fake::File::create(id->internal, sizeof(id->internal));
  return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* out, int size, ncclUniqueId id, int rank) {
  auto file = std::make_shared<fake::File>(id.internal);
  auto device = std::make_shared<fake::Device>();
  device->rank = rank;
  std::vector<int> members;
  for (int i = 0; i < size; i++) members.push_back(i);
  auto* comm = new Comm(file, device, 0, rank, members);
  comm->meet();
  *out = reinterpret_cast<ncclComm_t>(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* out, ncclConfig_t*) {
  *out = reinterpret_cast<ncclComm_t>(reinterpret_cast<Comm*>(parent)->split(color, key));
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }  // the process' end frees it: work of its streams may still name it
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  reinterpret_cast<Comm*>(comm)->aborted.store(true);
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  *error = static_cast<ncclResult_t>(reinterpret_cast<Comm*>(comm)->error.load());
  return ncclSuccess;
}
ncclResult_t ncclGroupStart() {
  fake::depth++;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() { return --fake::depth == 0 ? fake::launch() : ncclSuccess; }
ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * (type == ncclInt8 ? 1 : 4);
  return fake::add(reinterpret_cast<Comm*>(comm), {true, peer, static_cast<char*>(const_cast<void*>(data)), bytes}, stream);
}
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * (type == ncclInt8 ? 1 : 4);
  return fake::add(reinterpret_cast<Comm*>(comm), {false, peer, static_cast<char*>(data), bytes}, stream);
}
// Not modelled: gingham calls these in its microbenchmark only.
ncclResult_t ncclAllGather(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t) { return ncclInvalidUsage; }
ncclResult_t ncclReduceScatter(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) { return ncclInvalidUsage; }
ncclResult_t ncclAllReduce(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) { return ncclInvalidUsage; }

}  // extern "C"
