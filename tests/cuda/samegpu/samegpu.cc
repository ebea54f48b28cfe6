// A stand-in for NCCL whose ranks, processes of one host, may share one GPU, which the real NCCL refuses: with GINGHAM_NCCL=libsamegpu.so
// a mesh of any size runs on a single real GPU. Its messages go through host memory, so times mean nothing.
// A group is queued wholly on its stream: piece c of all sends, then piece c of all receives, and so on, so that rings of ranks that do the
// same cannot block each other. It cannot be captured in a graph: the counters would not go on from replay to replay.
// A receive whose size differs from its send's is an error on both ranks (where the real NCCL hangs or writes beside the buffer).
#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "channel.h"

namespace samegpu {

using standin::Hall;
using standin::Members;
using standin::Op;

// A communicator's part of the file beside its channels.
struct Room {
  Hall hall;
  std::atomic<int> trouble;  // 0 none, 1 being written, 2 there
  char words[256];
};
constexpr size_t kRooms = (sizeof(Room) * standin::kHalls + 4095) / 4096 * 4096;

// The file, opened by one rank.
struct World {
  explicit World(const char* path) : file(path), rooms(static_cast<Room*>(file.map(0, kRooms))) {}
  ~World() { munmap(rooms, kRooms); }
  standin::SharedFile file;
  Room* rooms;
};

class Comm {
 public:
  static size_t file_bytes() { return channel_at(standin::kHalls, 0, 0); }
  Comm(const char* path, int size, int rank) : Comm(std::make_shared<World>(path), standin::world_of(size, rank)) {
    MemoryOperations::get();  // a driver without them is named here
    standin::meet(room().hall.arrived, members_, aborted_);
  }
  Comm* split(int color, int key) {
    const auto world = world_;
    return new Comm(world, standin::split(world->rooms[members_.hall].hall, members_, color, key, aborted_));
  }
  void launch(cudaStream_t stream, const std::vector<Op>& ops);
  void abort();
  void destroy();
  ncclResult_t error();

 private:
  Comm(std::shared_ptr<World> world, Members members) : world_(std::move(world)), members_(std::move(members)) { cudaGetDevice(&device_); }
  static size_t channel_at(int hall, int from, int to) {
    return kRooms + static_cast<size_t>((hall * standin::kMostRanks + from) * standin::kMostRanks + to) * sizeof(Shared);
  }
  Room& room() { return world_->rooms[members_.hall]; }
  End& end(const Op& op);
  void announce(const std::vector<Op>& ops);
  void follow(cudaStream_t stream);
  void complain(const std::string& words);
  bool idle() const { return !launching_.load() && (!last_ || cudaEventQuery(last_) != cudaErrorNotReady); }
  void leave();

  std::shared_ptr<World> world_;
  Members members_;
  int device_ = 0;
  std::mutex mutex_;
  std::map<std::pair<bool, int>, std::unique_ptr<End>> ends_;  // by way and peer, made at first use
  std::atomic<bool> aborted_{false}, launching_{false};
  cudaEvent_t last_ = nullptr;  // behind the last group
  cudaStream_t stream_ = nullptr;

  static inline std::mutex ending_mutex;
  static inline std::list<Comm*> ending;  // destroyed, but queued work may still name their channels
};

End& Comm::end(const Op& op) {
  const std::pair key{op.sends, op.peer};
  if (op.peer < 0 || static_cast<size_t>(op.peer) >= members_.ranks.size())
    throw Refused(ncclInvalidUsage, "a message for rank " + std::to_string(op.peer) + " of " + std::to_string(members_.ranks.size()));
  const auto at = ends_.find(key);
  if (at != ends_.end()) return *at->second;
  const size_t offset = op.sends ? channel_at(members_.hall, members_.rank, op.peer) : channel_at(members_.hall, op.peer, members_.rank);
  auto made = std::make_unique<End>(world_->file, offset, op.sends);
  const std::lock_guard lock(mutex_);
  return *(ends_[key] = std::move(made));
}

void Comm::complain(const std::string& words) {
  int none = 0;
  if (!room().trouble.compare_exchange_strong(none, 1)) return;
  snprintf(room().words, sizeof(room().words), "%s", words.c_str());
  room().trouble.store(2);
}

// Compares the sizes before anything is queued.
void Comm::announce(const std::vector<Op>& ops) {
  for (const Op& op : ops) {
    uint64_t number = 0, theirs = 0;
    bool differs = false;
    std::string words;
    try {
      differs = end(op).differs(op.bytes, &number, &theirs);
    } catch (const Refused& refused) {
      complain(refused.what());
      throw;
    }
    if (!differs) continue;
    const int peer = members_.ranks[static_cast<size_t>(op.peer)], own = members_.ranks[static_cast<size_t>(members_.rank)];
    words = "message " + std::to_string(number) + " from rank " + std::to_string(op.sends ? own : peer) + " to rank " +
            std::to_string(op.sends ? peer : own) + " is sent with " + std::to_string(op.sends ? op.bytes : theirs) + " bytes and received with " +
            std::to_string(op.sends ? theirs : op.bytes) + ": both ranks must name the same size";
    complain(words);
    throw Refused(ncclInvalidUsage, words);
  }
}

namespace {

// The messages of a group in one channel, moved piece by piece.
struct Lane {
  End* end;
  std::vector<const Op*> ops;
  size_t at = 0, moved = 0;
  bool step(cudaStream_t stream) {
    if (at == ops.size()) return false;
    const Op& op = *ops[at];
    const size_t bytes = std::min(kPiece, op.bytes - moved);
    end->move(stream, op.data + moved, bytes);
    moved += bytes;
    if (moved == op.bytes) at++, moved = 0;
    return true;
  }
};

class Flag {
 public:
  explicit Flag(std::atomic<bool>& flag) : flag_(flag) { flag_.store(true); }
  ~Flag() { flag_.store(false); }

 private:
  std::atomic<bool>& flag_;
};

// Records the event when a group was queued, whole or in part.
struct Behind {
  cudaEvent_t event;
  cudaStream_t stream;
  ~Behind() { cudaEventRecord(event, stream); }
};

}  // namespace

// A communicator's groups run one after the other, on whichever stream.
void Comm::follow(cudaStream_t stream) {
  if (!last_) check(cudaEventCreateWithFlags(&last_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  if (stream_ && stream_ != stream) check(cudaStreamWaitEvent(stream, last_, 0), "cudaStreamWaitEvent");
  stream_ = stream;
}

void Comm::launch(cudaStream_t stream, const std::vector<Op>& ops) {
  const Flag launching(launching_);
  if (aborted_.load()) throw Refused(ncclInvalidUsage, "the communicator was aborted");
  cudaStreamCaptureStatus capture{};
  check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone)
    throw Refused(ncclInvalidUsage, "the same-GPU stand-in for NCCL cannot be captured in a graph: its counters would not go on at a replay");
  if (error() != ncclSuccess) throw Refused(ncclInvalidUsage, standin::said);
  announce(ops);
  follow(stream);
  const Behind behind{last_, stream};
  std::map<std::pair<bool, int>, Lane> lanes;  // sends first
  for (const Op& op : ops) {
    Lane& lane = lanes[{!op.sends, op.peer}];
    lane.end = &end(op);
    if (op.bytes) lane.ops.push_back(&op);
  }
  for (bool left = true; left && !aborted_.load();) {
    left = false;
    for (auto& [key, lane] : lanes) left |= lane.step(stream);
  }
}

ncclResult_t Comm::error() {
  if (aborted_.load() || room().trouble.load() != 2) return ncclSuccess;
  standin::said = room().words;
  return ncclInvalidUsage;
}

void Comm::leave() {
  ends_.clear();
  if (last_) cudaEventDestroy(last_);
  last_ = nullptr;
  world_.reset();
}

// What is queued passes, with whatever lies in the slots: again and again, since the devices of others still write the counters.
void Comm::abort() {
  if (aborted_.exchange(true)) return;
  std::thread([this] {
    for (bool first = true; first || !idle(); first = false) {
      {
        const std::lock_guard lock(mutex_);
        for (auto& [key, end] : ends_) end->release();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (first) cudaSetDevice(device_);  // after that: CUDA may be stuck in another thread until streams go on
    }
    leave();
  }).detach();
}

// Never waits: a peer may have died. Memory is given back by a later call, once nothing queued names it.
void Comm::destroy() {
  const std::lock_guard lock(ending_mutex);
  ending.push_back(this);
  for (auto it = ending.begin(); it != ending.end();) {
    if ((*it)->idle()) {
      (*it)->leave();
      it = ending.erase(it);
    } else {
      ++it;
    }
  }
}

}  // namespace samegpu

using Comm = samegpu::Comm;
#include "entries.h"

#pragma GCC visibility push(default)
extern "C" const int ncclSameGpu = 1;  // by this gingham knows that several ranks may share a GPU
#pragma GCC visibility pop
