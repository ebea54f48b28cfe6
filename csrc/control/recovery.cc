// After an allocation failed on one rank. The refusal names the call N that was given up. Ranks before N go on: nothing up to N - 1 needs
// what the refusing rank has not done. At N, or the first call after it in which a rank looks, each raises. Then every rank's next call
// begins with two barriers: at the first nobody is in a call any more, between them each resets the counters that it writes, and after the
// second all count from the same call on.
//   rank 0   .. N-1  N raises          | N+1: barrier, reset, barrier | call
//   rank 2   .. N-1  N has no memory   | barrier, reset, barrier | call
#include <algorithm>

#include "control/program.h"

namespace gingham {

void Program::refuse(const std::string& message) {
  if (spans_)
    return fail(Kind::memory, control_.rank(), message + "; over several hosts the mesh must be made anew: gingham.destroy() and gingham.init()");
  // Depth sums' memory: asked for by the main thread for them, or by their thread, which leaves it to the main thread to raise.
  bool own = true;
  if (background_) {
    const std::lock_guard lock(background_->entry_lock_);
    own = !background_->entered_ || std::this_thread::get_id() != background_->thread_;
  }
  uint32_t none = 3 * epoch();
  if (!control_.orphaned() && size() > 1 && block_->refused.value.compare_exchange_strong(none, none + 1)) {
    block_->refused_rank = member(rank_);
    block_->refused_at = record(rank_).sequence.load() + (own && inside_ ? 0 : 1);
    copy_text(block_->refusal, sizeof(block_->refusal), message);
    block_->refused.store(3 * epoch() + 2);
  }
  if (own && size() > 1) told_ = true;
  if (own && inside_ && given_up) given_up();
}

void Program::raise_refusal(bool in_any_call) {
  if (told_ || recovering_) return;
  const double start = now();
  while (block_->refused.load() == 3 * epoch() + 1 && now() - start < kVerdictPatience) nap(0.0005);
  if (block_->refused.load() != 3 * epoch() + 2) return;
  if (!in_any_call && !reached(record(rank_).sequence.load(), block_->refused_at)) return;
  told_ = true;
  if (inside_ && given_up) given_up();
  throw PeerOutOfMemory(block_->refused_rank, concat(block_->refusal, " (told to rank ", control_.rank(),
                                                     "; every rank gave up this call, and the mesh can be used again)"));
}

void Program::hear() {
  check();
  if (block_->refused.load() != 3 * epoch()) raise_refusal(true);
}

void Program::meet(uint32_t number) {
  record(rank_).met.store(number);
  for (int r = 0; r < size(); r++)
    if (r != rank_) wait(record(r).met, number, r);
}

uint32_t Program::last_call() const {
  uint32_t last = record(rank_).sequence.load();
  for (int r = 0; r < size(); r++)
    if (const uint32_t theirs = record(r).sequence.load(); reached(theirs, last)) last = theirs;
  return last;
}

void Program::begin_anew(uint32_t sequence) {
  record(rank_).sequence.store(sequence);
  key_ = history_ = mixed(kSeed, ++epoch_);
  label_.reset();
  told_ = false;
}

void Program::recover() {
  recovering_ = true;
  struct Done {
    bool& flag;
    ~Done() { flag = false; }
  } done{recovering_};
  auto lock = background_ ? std::unique_lock(background_->entry_lock_) : std::unique_lock<std::mutex>();
  if (background_) {
    background_->abandoned_ = true;
    while (background_->entered_) {
      lock.unlock();
      nap(0.001);
      check();
      lock.lock();
    }
  }
  meet(2 * epoch() + 1);
  const uint32_t last = last_call(), sums = background_ ? background_->last_call() : 0;
  for (Program* each : {this, background_.get()}) {
    if (!each) continue;
    for (KeptCall& call : each->record(each->rank_).calls) call.store(Call{});
    if (each->reset) each->reset();
  }
  if (rank_ == 0) block_->refused.store(3 * (epoch() + 1));
  meet(2 * epoch() + 2);
  begin_anew(last);
  if (!background_) return;
  background_->begin_anew(sums);
  background_->abandoned_ = false;
}

void Program::enter(uint32_t epoch) {
  const std::lock_guard lock(entry_lock_);
  CHECK(MeshError, epoch == this->epoch() && !abandoned_, "rank ", control_.rank(), ": this sum over depth was given up: memory ran out on a rank");
  entered_ = true;
  thread_ = std::this_thread::get_id();
}

void Program::leave() {
  const std::lock_guard lock(entry_lock_);
  entered_ = false;
}

}  // namespace gingham
