// A program: ranks of the job that make the same calls in the same order, such as those of a mesh, or of the sums over depth beside one. It
// has its own numbering (rank 0 is its first member), sequence of calls, keys and judging; errors name ranks as the job does.
//   [ block | records of the members | room for the axes ]   in the heap of the first member, of each host for those on it
// An error ends the job. A refusal (an allocation that failed on one rank) ends the call: all ranks of the program raise in it, and before
// its next call each waits for all others, after which counters and keys begin anew on all (recovery.cc).
#pragma once
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/heap.h"
#include "control/control.h"

namespace gingham {

struct ProgramRecord {
  int32_t rank;  // as the job counts
  Word joined;
  Word sequence;
  Word met;  // of the barriers of a recovery
  std::atomic<int32_t> closed{0};
  KeptCall calls[kHistory];
};

struct ProgramBlock {
  int32_t size;
  Word left;
  Word refused;  // in epoch e: 3e none, 3e + 1 being written, 3e + 2 readable
  int32_t refused_rank;
  uint32_t refused_at;  // the call that was given up
  char refusal[768];
  Word shared;
  char notice[128];  // what the first member told all (share)
};

// The records behind a program's block; and what this host's ranks in it say of themselves, for others.
ProgramRecord* records_of(ProgramBlock* block);
std::vector<Told> told_of(const Control& control, ProgramBlock* block);

class Program {
 public:
  using Kind = ErrorKind;

  // Collective over the members (ranks of the job). id: theirs alone among all programs of the job; lines: of each axis, how many ranks its
  // lines have; room: bytes for these axes; timeout: seconds after which a member that is waited for is PeerStalled.
  Program(Control& control, Segment& segment, Heap& heap, uint64_t id, std::vector<int> members, std::vector<int> lines, size_t room, double timeout);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void begin(const Call& call);                                                // publishes the call; throws the job's error if there is one
  void say(std::shared_ptr<const Label> label) { label_ = std::move(label); }  // whose call the next one is
  // Of the call begun last and of all before it: ranks whose calls differed where nothing moved are told at the next that moves something.
  uint64_t key() const { return key_; }
  const Call& call() const { return mine_; }
  void note(std::shared_ptr<const Label> label);  // a call that moves nothing
  // As Control::wait; peer: a member's number; doing: in words, null: the call begun last.
  void wait(Word& word, uint32_t target, int peer, const char* doing = nullptr);
  void sleep_until(double time);
  void check();                           // throws the job's error, and a refusal of the call begun last
  void share(char* bytes, size_t count);  // the first member's bytes (at most 128) to all, once
  bool awaited() const;                   // whether a member on this host has begun more calls than this rank
  int behind() const;                     // the rank that has made the fewest calls, or has left; as the job counts
  void fail(Kind kind, int rank, const std::string& message) { control_.fail(kind, rank, message); }  // rank: as the job counts
  [[noreturn]] void mismatch(const std::vector<int>& members);                                        // judges who differs, tells all ranks, throws
  // An allocation failed here, in a call or before the next.
  void refuse(const std::string& message);
  // Where sums run on a thread: their program, which recovers with this one, and around each sum the epoch it belongs to.
  void pair_with(std::shared_ptr<Program> background);
  bool beside() const { return beside_; }  // whether it is a background program
  Program* main() const { return main_; }  // and the one it is paired with, while that lives
  void enter(uint32_t epoch);
  void leave();
  uint32_t epoch() const { return epoch_.load(); }
  void end() { inside_ = false; }  // of the call begun last
  bool inside() const { return inside_; }
  void hear();                            // throws the job's error or refusal, whichever call it belongs to
  std::function<void()> given_up, reset;  // a refusal was heard in a call; this rank's counters in shared memory begin anew
  std::function<void()> fail_allocation;  // what a fault of that kind does
  void close();                           // later waits of the members for this rank raise PeerDied

  int rank() const { return rank_; }  // among the members
  int size() const { return static_cast<int>(members_.size()); }
  bool here(int rank) const { return control_.here(member(rank)); }  // whether a member is on this host
  int locals() const { return static_cast<int>(locals_); }           // how many are
  bool spans() const { return spans_; }                              // whether some are on others
  uint64_t id() const { return id_; }
  void wait(Condition& condition, int peer);
  int member(int rank) const { return members_[static_cast<size_t>(rank)]; }  // as the job counts
  double timeout() const { return timeout_; }
  const std::vector<int>& lines() const { return lines_; }
  char* room() const { return room_; }
  Control& control() { return control_; }
  // Kept as long as the program is: what its axes share on a device.
  std::shared_ptr<void> attachment;

 private:
  struct Mine;
  ProgramRecord& record(int rank) const { return records_[rank]; }
  void join(uint64_t id, size_t bytes);
  void compare(int peer, double waited,
               bool left);       // a rank that refused this call, or a peer that calls it another name, will never post what is waited for
  int place_of(int rank) const;  // of a rank as the job counts, among the members; size(): it is none
  std::vector<CallLog> logs();   // once the ranks have come to this rank's call, or have had time to
  void raise_refusal(bool in_any_call);
  void recover();
  void meet(uint32_t number);
  void begin_anew(uint32_t sequence);
  uint32_t last_call() const;

  Control& control_;
  Segment& segment_;
  Heap& heap_;
  std::vector<int> members_, lines_;
  uint64_t id_;
  double timeout_;
  int rank_ = -1, first_ = 0;  // the first member on this host
  size_t locals_ = 0;
  bool spans_ = false;
  double asked_ = 0;
  ProgramEntry* entry_ = nullptr;
  ProgramBlock* block_ = nullptr;
  ProgramRecord* records_ = nullptr;
  char* room_ = nullptr;
  uint64_t key_ = 0, history_ = 0;
  Call mine_;  // the call begun last
  std::atomic<bool> closed_{false};
  std::shared_ptr<const Label> label_;
  bool inside_ = false, told_ = false, recovering_ = false;
  std::atomic<uint32_t> epoch_{0};
  std::shared_ptr<Program> background_;
  Program* main_ = nullptr;
  bool beside_ = false;
  // Of a background program: its thread is in a sum; the sums of this epoch are given up.
  std::mutex entry_lock_;
  bool entered_ = false;
  std::atomic<bool> abandoned_{false};
  std::thread::id thread_;
};

}  // namespace gingham
