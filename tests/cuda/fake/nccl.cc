// NCCL's point-to-point half without a GPU: ranks are processes or threads that share a memory file, a group of sends and receives is one
// piece of work on its stream whose messages progress side by side. Environment:
//   FAKE_NCCL_BUFFERED=1      a send ends when its data fits into the mailbox; otherwise only when it has been received (rendezvous)
//   FAKE_NCCL_ONE_AT_A_TIME=1 a device runs one group to its end before it starts another, of whichever communicator
//   FAKE_NCCL_FAIL=rank,n     the n-th group of that rank reports ncclRemoteError and never ends until it is aborted
//   FAKE_NCCL_HANG=rank,n     the same without a report
//   FAKE_NCCL_REFUSE=rank,n   the n-th send of that rank is refused
//   FAKE_NCCL_SLOW=rank,n     the call that queues the n-th group of that rank takes half a second
// A receive whose size differs from its send's is an asynchronous error, where the real one would hang or corrupt memory.
#include <list>

#include "mailbox.h"
#include "stream.h"

namespace fake {
namespace {

bool flag(const char* name) {
  const char* text = getenv(name);
  return text && atoi(text) != 0;
}

std::atomic<uint64_t> received{0};

// A group from its launch to its end, or until what was captured is dropped.
struct Group {
  Group(Comm& comm, const std::vector<standin::Op>& given) : comm(comm) {
    for (const standin::Op& op : given) ops.push_back({op});
    const std::lock_guard lock(all_mutex);
    all.push_back(this);
  }
  Group(const Group&) = delete;
  ~Group() {
    const std::lock_guard lock(all_mutex);
    all.remove(this);
  }
  bool names(const void* data, size_t bytes) const {
    const char* begin = static_cast<const char*>(data);
    return std::any_of(ops.begin(), ops.end(), [&](const Op& op) { return op.data < begin + bytes && begin < op.data + op.bytes; });
  }
  // What an abort ended touches nothing any more, and will not.
  bool over() const { return comm.aborted.load() && comm.running.load() == 0; }

  Comm& comm;
  std::vector<Op> ops;
  static inline std::mutex& all_mutex = *new std::mutex;  // for streams that outlive the process' last line
  static inline std::list<Group*>& all = *new std::list<Group*>;
};

struct Running {
  explicit Running(Comm& comm) : comm(comm) { comm.running++; }
  ~Running() { comm.running--; }
  Comm& comm;
};

// Whether the variable names this rank and its group.
bool chosen(const char* name, const Comm& comm, int number) {
  int rank = -1, group = -1;
  const char* text = getenv(name);
  return text && sscanf(text, "%d,%d", &rank, &group) == 2 && comm.device->rank == rank && number == group;
}

void run(Group& group) {
  Comm& comm = group.comm;
  std::vector<Op>& ops = group.ops;
  std::unique_lock<std::mutex> alone;
  if (flag("FAKE_NCCL_ONE_AT_A_TIME")) alone = std::unique_lock(comm.device->mutex);
  if (comm.aborted.load()) return;
  const Running running(comm);
  const int number = static_cast<int>(comm.device->groups++);
  const bool fails = chosen("FAKE_NCCL_FAIL", comm, number), broken = fails || chosen("FAKE_NCCL_HANG", comm, number);
  const bool buffered = flag("FAKE_NCCL_BUFFERED");
  if (fails) comm.failure = ncclRemoteError;
  Jitter jitter;
  for (int idle = 0; !comm.aborted.load();) {
    bool moved = false, left = broken;
    for (size_t i = 0; i < ops.size() && !broken; i++) {
      Op& op = ops[i];
      if (op.done) continue;
      left = true;
      bool blocked = false;  // an earlier message of the same peer and way goes first
      for (size_t j = 0; j < i; j++) blocked |= !ops[j].done && ops[j].peer == op.peer && ops[j].sends == op.sends;
      if (!blocked) moved |= comm.progress(op, buffered);
    }
    if (!left) break;
    if (!moved) nap(idle++ < 20 ? 1 : 50);
    if (moved) jitter.pause();
  }
  for (const Op& op : ops)
    if (!op.sends) received += op.bytes;
}

}  // namespace

void Comm::accept(const standin::Op& op) {
  if (op.sends && chosen("FAKE_NCCL_REFUSE", *this, static_cast<int>(device->sends++)))
    throw standin::Refused(ncclInvalidUsage, "a send was refused (injected)");
}

void Comm::launch(cudaStream_t stream, const std::vector<standin::Op>& ops) {
  if (device_of(stream) != on) throw standin::Refused(ncclInvalidUsage, "a stream of another device than the communicator's");
  inside++;
  if (chosen("FAKE_NCCL_SLOW", *this, static_cast<int>(device->launched++))) nap(500000);
  inside--;
  if (aborted.load()) throw standin::Refused(ncclInvalidUsage, "the communicator was aborted");
  std::string told;
  for (const standin::Op& op : ops)
    told += std::string(told.empty() ? "" : " ") + (op.sends ? "s," : "r,") + std::to_string(members_.hall) + "," +
            std::to_string(members_.ranks[static_cast<size_t>(op.peer)]) + "," + std::to_string(op.bytes);
  trace(stream_of(stream), 'G', told);
  enqueue(stream, [group = std::make_shared<Group>(*this, ops)] { run(*group); });
}

bool under_way(const void* data, size_t bytes) {
  const std::lock_guard lock(Group::all_mutex);
  return std::any_of(Group::all.begin(), Group::all.end(), [&](const Group* each) { return !each->over() && each->names(data, bytes); });
}

}  // namespace fake

extern "C" unsigned long long fake_nccl_received() { return fake::received.load(); }
// Groups that are queued or move, all communicators together.
extern "C" int fake_nccl_under_way() {
  const std::lock_guard lock(fake::Group::all_mutex);
  return static_cast<int>(std::count_if(fake::Group::all.begin(), fake::Group::all.end(), [](const fake::Group* each) { return !each->over(); }));
}

using Comm = fake::Comm;
#include "entries.h"

extern "C" int fake_nccl_open_groups() { return standin::depth; }  // of the calling thread
