// The job's control block in shared memory: who is alive, who waits for whom, and the first error. The first error wins, so that a cascade
// does not hide its cause, and ends the job for all its programs. What ranks that make the same calls share is a program's (program.h).
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/heap.h"
#include "base/wait.h"
#include "control/elsewhere.h"
#include "control/fault.h"
#include "control/verdict.h"

namespace gingham {

constexpr int kMaxRanks = 1024, kMaxHostRanks = 64, kMaxPrograms = 256;  // ranks of a job, and of it on one host

struct RankRecord {
  std::atomic<int32_t> pid{0};
  std::atomic<int32_t> closed{0};
  struct {
    std::atomic<int32_t> on{-1};
    std::atomic<double> heartbeat{0};
  } waits[kThreads];
};

// Where a program's shared memory lies; written by the first of its ranks.
struct ProgramEntry {
  Word state;  // 0 free, 1 being written, 2 readable
  std::atomic<uint64_t> id{0}, offset{0};
};

struct ControlBlock {
  char version[32];
  uint64_t nonce;  // of this job's memory alone: a path that leads to it on one host may lead to another file on the next
  int32_t size;
  Word attached;
  Word error;  // 0 none, 1 being written, 2 readable
  int32_t error_kind, error_rank;
  char message[3072];
  ProgramEntry programs[kMaxPrograms];
  RankRecord ranks[kMaxRanks];
};

// What is waited for, where it is no word of shared memory.
class Condition {
 public:
  virtual ~Condition() = default;
  virtual bool met() = 0;
  virtual void sleep(int milliseconds) = 0;  // until it may be met, or the time is over
};

// Who waits, seen by a wait: looked at again and again while it lasts.
class Waiter {
 public:
  virtual ~Waiter() = default;
  virtual void check() = 0;  // throws what ends the wait
  // Throws where the peer makes another call, or has left, and will never do what has been waited for so many seconds.
  virtual void compare(double /*waited*/, bool /*left*/) {}
  virtual bool left() const { return false; }  // the peer has left those that make the same calls
  virtual std::string doing() const = 0;       // in words, for the message of a stall
  virtual double timeout() const = 0;          // seconds
  virtual int thread() const { return 0; }
};

class Control {
 public:
  using Kind = ErrorKind;

  // locals: the ranks on this host, which share the block.
  Control(ControlBlock* block, int rank, int size, std::vector<int> locals, double timeout);
  ~Control();

  // Publishes this rank and waits for all others; pids: of the ranks where known, so that one that dies before it comes is named.
  void attach(const std::string& version, const std::vector<int>& pids = {});
  bool watches() const { return watches_; }  // whether the kernel tells of peers' deaths; else their pids are asked for
  // Waits until word >= target (wrapping). `peer`: the rank who must advance it. Every wait of the library ends here: a killed
  // peer is named within one slice of 50 ms, the culprit of a stall by following who waits for whom.
  void wait(Word& word, uint32_t target, int peer, Waiter& waiter);
  void wait(Condition& condition, int peer, Waiter& waiter);
  void sleep_until(double time, Waiter& waiter);
  void check();                                                // throws the job's error
  void look(int peer = -1);                                    // the same, after a look at the peers' pids
  void fail(Kind kind, int rank, const std::string& message);  // sets the job's error unless one is set
  // The same for an error that takes time to word: verdict() is asked only by the rank that comes first.
  void fail(const std::function<Verdict()>& verdict);
  void hear(const Verdict& verdict);  // of another host's error, which all know
  [[noreturn]] void raise();
  bool failed() const { return block_->error.load() != 0; }
  // Called when a wait ends in an error, or this rank tells of one, before anything is thrown: the call is left as it stands, and peers and
  // messages on their way may still read and write what belongs to it.
  std::function<void()> broken_off;
  // From here on the job has ranks on other hosts too.
  void span(Elsewhere* elsewhere) { elsewhere_ = elsewhere; }
  Elsewhere* elsewhere() const { return elsewhere_; }
  bool here(int rank) const { return here_[static_cast<size_t>(rank)]; }
  const std::vector<int>& locals() const { return locals_; }
  std::vector<Waiting> waits(int rank) const;  // of a rank of this host, by thread
  ProgramEntry* program(uint64_t id);          // readable, or null
  ProgramEntry* make_entry(uint64_t id, uint64_t offset);
  // Of programs whose memory this rank made: it is freed by a sweep, once all `members` have left.
  void keep_until_left(ProgramEntry* entry, const Word* left, uint32_t members, void* memory) { ended_.push_back({entry, left, members, memory}); }
  void sweep(Heap& heap);
  void inject(std::vector<Fault> faults) { faults_ = Faults(std::move(faults)); }
  bool strikes(const char* call) { return !faults_.none() && faults_.at(rank_, call); }  // whether the call's next allocation shall fail
  void close();                                                                          // later waits for this rank raise PeerDied in the others
  void orphan() { orphaned_ = true; }                                                    // this process was forked from the rank and is none itself
  bool orphaned() const { return orphaned_; }
  // It has ended the job in order: what it did before can be seen.
  bool left(int rank) const { return here(rank) ? block_->ranks[rank].closed.load() != 0 : elsewhere_ && elsewhere_->left(rank); }
  [[noreturn]] void raise_left(int rank);  // while it is waited for

  int rank() const { return rank_; }
  int size() const { return size_; }
  double timeout() const { return timeout_; }
  // Called between the slices of a long wait, to let Ctrl-C through; set by the binding.
  static std::function<void()> interrupt;

 private:
  void slow_wait(Condition& condition, int peer, Waiter& waiter);
  void wait_in_slices(Condition& condition, int peer, Waiter& waiter);
  void set(const Verdict& verdict);
  int culprit(int peer, int thread) const;
  void watch(int rank, int pid);

  ControlBlock* block_;
  int rank_, size_;
  std::vector<int> locals_;
  std::vector<bool> here_;
  double timeout_;
  Elsewhere* elsewhere_ = nullptr;
  std::vector<int> pidfds_, watched_;  // by rank: -1 none; the pids behind them
  bool watches_ = true, orphaned_ = false;
  Faults faults_;
  struct Ended {
    ProgramEntry* entry;
    const Word* left;
    uint32_t members;
    void* memory;
  };
  std::vector<Ended> ended_;
};

// For the sources of this room.
constexpr double kVerdictPatience = 1.0, kFarPatience = 5.0;  // until another rank has worded an error, alone or for all hosts
void nap(double seconds);

}  // namespace gingham
