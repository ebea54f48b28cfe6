// The job's control block in shared memory: who is alive, in which call, and the first error. Every wait of the library goes through
// Control::wait, which watches its word and the error word, polls the peers' pidfds (a killed peer is named within one slice of 50 ms)
// and names the culprit of a stall by following who waits for whom. The first error wins, so that a cascade does not hide its cause.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/dtype.h"
#include "base/wait.h"

namespace gingham {

constexpr int kMaxRanks = 64;
constexpr size_t kLabel = 200;
constexpr uint32_t kHistory = 8;  // calls of each rank that are remembered

// What a layer or function says of itself, made once: its kind, number and all options on which the ranks must agree.
struct Label {
  explicit Label(std::string words);
  std::string text;
  uint64_t hash;
};

// A step's flags: bits 0 to 7 its source, 8 to 31 the slices, and from 32 on what it computes.
constexpr uint64_t kStep = uint64_t{1} << 63;
enum StepBit { kInputGradient, kWeightGradient, kDepthSum, kBiasGradient, kEpilogue = 12, kBias };
constexpr int kMapBits = 8;  // maps of a step that have bits of their own

// What a rank says of the call it is in; all fields but `rows` must be equal on all ranks of the job.
struct Call {
  char name[32] = {};
  int32_t dtype = 0;
  int32_t grid[3] = {1, 1, 1};
  int64_t k = 0, n = 0;
  uint64_t flags = 0;       // of a step see the bits below; else the axis' number
  int64_t rows = -1;    // local rows; equal only among ranks that share them
  int32_t invalid = 0;  // this rank refused its own arguments: `note` says why
  char note[240] = {};

  void set_name(const std::string& text);
  uint64_t options = 0;     // hash of the label
  char label[kLabel] = {};  // the layer or function whose call this is, with its options

  uint64_t key() const;      // hash of all on which the ranks of the call's axis must agree
  uint64_t history() const;  // of what all ranks of the job must agree on: without the sizes of a collective, which may be uneven
  std::string text() const;
};

struct RankRecord {
  std::atomic<int32_t> pid{0};
  std::atomic<int32_t> closed{0};
  std::atomic<int32_t> waiting_on{-1};
  std::atomic<double> heartbeat{0};
  Word sequence;
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
  RankRecord ranks[kMaxRanks];
};

class Control {
 public:
  enum class Kind : int32_t { died, stalled, shape, mesh };

  Control(ControlBlock* block, int rank, int size, double timeout);
  ~Control();

  void attach(const std::string& version);  // publishes this rank and waits for all others
  void begin(const Call& call);             // publishes the call; throws the job's error if there is one
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
  void close();                                                 // later waits for this rank raise PeerDied in the others
  void orphan() { orphaned_ = true; }                           // this process was forked from the rank and is none itself
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
  void judge(const std::vector<int>& members, Kind* kind, int* odd, std::string* message);
  [[noreturn]] void raise();

  ControlBlock* block_;
  int rank_, size_;
  double timeout_;
  uint64_t key_ = 0, history_ = 0;
  std::vector<int> pidfds_;
  std::atomic<bool> closed_{false};
  bool orphaned_ = false;
  std::shared_ptr<const Label> label_;
};

}  // namespace gingham
