// Messages between GPUs of one host that take none of NCCL's kernels: copy engines push them into windows of device memory which the ranks of an axis
// open for each other (CUDA IPC), and streams wait for flags in host memory that all of them map. GINGHAM_COPY_ENGINES=1 asks for it; an axis on
// which any rank cannot, or whose first messages do not come right, stays with NCCL, and says why.
//   window   of each rank: a channel from every other rank and line, of kSlots slots
//   flags    of each slot: `full` (set by the sender's stream, cleared by the receiver's) and `open` (the other way round)
//   send     on the stream on which messages leave: wait for open, clear it, copy into the slot, set full
//   receive  on the one on which they come: wait for full, clear it, copy out of the slot, set open
// No host waits for another. A message longer than a slot goes in pieces; those of a group take turns, in rounds (Engines, transport/queued). Flags
// are set and cleared rather than counted, so that a captured graph can be replayed.
// A rank that aborts sets what its own streams wait for, from the host.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/segment.h"
#include "transport/queued.h"

namespace gingham {

class Push {
 public:
  static constexpr int kSlots = Engines::kAhead, kLines = 2;
  struct Flag {
    alignas(64) std::atomic<uint32_t> full;
    alignas(64) std::atomic<uint32_t> open;
  };

  // Collective over the axis; all its ranks get the same answer. members: the program's ranks in axis order. Null: NCCL it is, for `why_not`.
  static std::unique_ptr<Push> make(CudaStream& compute, Program& program, AxisMemory memory, const std::vector<int>& members, int rank,
                                    std::string* why_not);
  ~Push() { leave(false); }
  void carry(int line, std::span<const Message> group, Engines& engines);
  void release();          // by the watch: whatever this rank's streams wait for comes
  void leave(bool ended);  // this rank's groups have ended, or may still run: then its memory stays until the process ends

 private:
  struct Flow;
  Push(CudaStream& compute, Program& program, AxisMemory memory, const std::vector<int>& members, int rank);
  Shown& shown(int peer) { return memory_.notices[members_[static_cast<size_t>(peer)]].shown; }
  bool agree(int step, const std::function<void()>& act);
  void offer();
  void accept();
  void check();
  bool end(Engines& engines, double patience);
  std::string compare(int line, int round, char* room, size_t bytes, Engines& engines);
  Flag& flag(int from, int to, int line, uint32_t slot) const;
  unsigned long long on_device(const std::atomic<uint32_t>& word) const;
  char* slot(char* window, int ahead, int line, uint32_t number) const;
  void piece(Flow& flow, int line, cudaStream_t stream);

  CudaStream& compute_;
  Program& program_;
  AxisMemory memory_;
  std::vector<int> members_;
  int rank_;
  size_t slot_bytes_ = 0;
  char* window_ = nullptr;
  std::vector<char*> windows_;  // the peers', as they are mapped here
  std::unique_ptr<Segment> flags_;
  char* flags_on_device_ = nullptr;
  // By channel, out and in: pieces queued so far, outside of captures, and in the present one, which may end early on some ranks.
  std::vector<uint32_t> pieces_, captured_;
  std::vector<uint32_t>* counted_ = nullptr;
  unsigned long long capture_ = 0;
  unsigned flush_ = 0;
  bool registered_ = false;
};

}  // namespace gingham
