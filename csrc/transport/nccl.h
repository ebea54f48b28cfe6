// GPUs of several processes over NCCL: one communicator for each line of an axis, split from its program's; a group is one
// ncclGroupStart .. ncclGroupEnd of sends and receives, or goes by copy engines (push) where they are asked for. Empty messages are not sent: both
// ends know their size. NCCL's operations never fail on the host when a peer dies, they hang on the device. The watch, a thread of each rank, looks
// every 50 ms at the job's error word, the peers' pids, the communicators' asynchronous errors and the age of the oldest group; on trouble it sets
// the job's error and aborts the communicators, so that streams go on and the next call raises PeerDied or PeerStalled. Communicators are
// blocking: NCCL starts a thread for each group of one that is not. The watch lets a call of the rank's thread end before it aborts, and does so
// under it only where the call itself hangs, as the first group to a dead peer may.
#pragma once
#include <mutex>
#include <thread>

#include "transport/nccl_api.h"
#include "transport/push.h"
#include "transport/queued.h"

namespace gingham {

class Nccl;

// A program's communicator and the watch over all that were split from it.
class NcclWorld {
 public:
  NcclWorld(Program& program, CudaStream& compute);  // collective; throws PeerDied, PeerStalled, DeviceError
  ~NcclWorld();
  ncclComm_t split(int color, int key);  // collective
  void add(Nccl* axis);
  void remove(Nccl* axis);

 private:
  friend class Nccl;
  ncclComm_t patiently(const std::function<ncclResult_t(ncclComm_t*)>& make, const char* what);
  void watch();
  void look();
  void abort_all();
  bool ends(Nccl& axis);
  void let_go();

  Program& program_;
  Control& control_;
  CudaStream& compute_;
  double timeout_;
  ncclComm_t world_ = nullptr;
  std::mutex mutex_;  // of axes_
  std::mutex calls_;  // held by who is inside of a call that takes a communicator, in which nobody may abort it
  std::vector<Nccl*> axes_;
  std::mutex pushes_mutex_;  // of these two
  std::vector<Push*> pushes_;
  std::thread letting_go_;
  std::atomic<bool> stop_{false}, aborted_{false};
  std::thread thread_;
};

class Nccl : public Queued {
 public:
  // members: the program's ranks in axis order.
  Nccl(std::unique_ptr<Axis> shared, GroupOrder& order, Program& program, AxisMemory memory, NcclWorld& world, const std::vector<int>& members);
  ~Nccl() override;
  ncclComm_t communicator() const { return comms_[0]; }  // for the microbenchmark's yardsticks
  bool replays() const override { return push_ && captured(); }
  std::string carried_by() const override { return push_ ? "copy engines" : "NCCL (" + why_not_ + ")"; }

 protected:
  void carry(int line, std::span<const Message> group) override;

 private:
  friend class NcclWorld;
  Control& control_;
  NcclWorld& world_;
  std::array<std::atomic<ncclComm_t>, kLines> comms_{};
  std::unique_ptr<Push> push_;  // instead of NCCL
  std::string why_not_;         // there is none
};

}  // namespace gingham
