// The job's control block in shared memory: who is alive, in which call, and the first error. Every wait of the library goes through
// Control::wait, which watches its word and the error word, polls the peers' pidfds (a killed peer is named within one slice of 50 ms)
// and names the culprit of a stall by following who waits for whom. The first error wins, so that a cascade does not hide its cause.
// An error ends the job. A refusal (an allocation that failed on one rank) ends the call: all ranks raise in it, and before its next call
// each waits for all others, after which counters and keys begin anew on all (recovery.cc).
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/wait.h"
#include "transport/fault.h"
#include "transport/verdict.h"

namespace gingham {

constexpr int kMaxRanks = 64;
struct RankRecord {
  std::atomic<int32_t> pid{0};
  std::atomic<int32_t> closed{0};
  std::atomic<int32_t> waiting_on{-1};
  std::atomic<double> heartbeat{0};
  Word sequence;
  Word met;  // of the barriers of a recovery
  Call calls[kHistory];
};

struct ControlBlock {
  char version[32];
  int32_t size;
  Word attached;
  Word error;  // 0 none, 1 being written, 2 readable
  Word shared;
  char notice[128];  // what rank 0 told all at the start (share)
  int32_t error_kind, error_rank;
  char message[3072];
  Word refused;  // in epoch e: 3e none, 3e + 1 being written, 3e + 2 readable
  int32_t refused_rank;
  uint32_t refused_at;  // the call that was given up
  char refusal[768];
  RankRecord ranks[kMaxRanks];
};

class Control {
 public:
  using Kind = ErrorKind;

  Control(ControlBlock* block, int rank, int size, double timeout);
  ~Control();

  // Publishes this rank and waits for all others; pids: of the ranks where known, so that one that dies before it comes is named.
  void attach(const std::string& version, const std::vector<int>& pids = {});
  bool watches() const { return watches_; }  // whether the kernel tells of peers' deaths; else their pids are asked for
  void begin(const Call& call);              // publishes the call; throws the job's error if there is one
  void say(std::shared_ptr<const Label> label) { label_ = std::move(label); }  // whose call the next one is
  // Of the call begun last and of all before it: ranks whose calls differed where nothing moved are told at the next that moves something.
  uint64_t key() const { return key_; }
  void note(std::shared_ptr<const Label> label);  // a call that moves nothing
  // Waits until word >= target (wrapping). `peer` (global rank) is who must advance it.
  void wait(Word& word, uint32_t target, int peer);
  void sleep_until(double time);
  void check();                                                 // throws the job's error
  void look();                                                  // the same, after a look at the peers' pids
  void share(char* bytes, size_t count);                        // rank 0's bytes (at most 128) to all, once a job
  int behind() const;                                           // the rank that has made the fewest calls, or has left
  void fail(Kind kind, int rank, const std::string& message);   // sets the job's error unless one is set
  [[noreturn]] void mismatch(const std::vector<int>& members);  // judges who differs, tells all ranks, throws
  // An allocation failed here, in a call or before the next.
  void refuse(const std::string& message);
  // Where depth sums run on a thread: their control block, which recovers with this one, and around each sum the epoch it belongs to.
  void pair_with(Control* background) { background_ = background; }
  void enter(uint32_t epoch);
  void leave();
  uint32_t epoch() const { return epoch_.load(); }
  void end() { inside_ = false; }  // of the call begun last
  bool inside() const { return inside_; }
  void hear();                            // throws the job's error or refusal, whichever call it belongs to
  std::function<void()> given_up, reset;  // a refusal was heard in a call; this rank's counters in shared memory begin anew
  void inject(std::vector<Fault> faults) { faults_ = Faults(std::move(faults)); }
  std::function<void()> out_of_memory;  // what a fault of that kind does
  void close();                         // later waits for this rank raise PeerDied in the others
  void orphan() { orphaned_ = true; }   // this process was forked from the rank and is none itself
  bool orphaned() const { return orphaned_; }

  int rank() const { return rank_; }
  int size() const { return size_; }
  // Called between the slices of a long wait, to let Ctrl-C through; set by the binding.
  static std::function<void()> interrupt;

 private:
  void slow_wait(Word& word, uint32_t target, int peer);
  void poll_peers(int peer);
  void compare(int peer);  // a rank that refused this call, or a peer that calls it another name, will never post what is waited for
  int culprit(int peer) const;
  std::vector<CallLog> logs() const;  // once the ranks have come to this rank's call, or have had time to
  [[noreturn]] void raise();
  void raise_refusal(bool in_any_call);
  void recover();
  void meet(uint32_t number);
  void begin_anew(uint32_t sequence);
  uint32_t last_call() const;
  void watch(int rank, int pid);

  ControlBlock* block_;
  int rank_, size_;
  double timeout_;
  uint64_t key_ = 0, history_ = 0;
  std::vector<int> pidfds_, watched_;  // by rank: -1 none; the pids behind them
  bool watches_ = true;
  std::atomic<bool> closed_{false};
  bool orphaned_ = false;
  std::shared_ptr<const Label> label_;
  Faults faults_;
  bool inside_ = false, told_ = false, recovering_ = false;
  std::atomic<uint32_t> epoch_{0};
  Control* background_ = nullptr;
  // Of a background block: its thread is in a sum; the sums of this epoch are given up.
  std::mutex entry_;
  bool entered_ = false;
  std::atomic<bool> abandoned_{false};
  std::thread::id thread_;
};

// For the sources of Control.
constexpr double kVerdictPatience = 1.0;
void nap(double seconds);

}  // namespace gingham
