// Ranks whose calls differ: when a rank looks, and what it gathers for the verdict.
#include <algorithm>
#include <iterator>

#include "transport/control.h"

namespace gingham {
namespace {

constexpr double kJudgePatience = 0.3;

}  // namespace

void Control::compare(int peer) {
  const RankRecord& mine = block_->ranks[rank_];
  const uint32_t sequence = mine.sequence.load();
  for (int r = 0; r < size_ && sequence > 0; r++) {
    if (!reached(block_->ranks[r].sequence.load(), sequence)) continue;
    const Call& theirs = block_->ranks[r].calls[sequence % kHistory];
    if (theirs.invalid || (r == peer && theirs.key() != mine.calls[sequence % kHistory].key())) mismatch({rank_, r});
  }
}

std::vector<CallLog> Control::logs() const {
  const uint32_t sequence = block_->ranks[rank_].sequence.load();
  const double start = now();
  std::vector<CallLog> found(static_cast<size_t>(size_));
  for (int r = 0; r < size_; r++) {
    const RankRecord& record = block_->ranks[r];
    while (!reached(record.sequence.load(), sequence) && now() - start < kJudgePatience) nap(0.0005);
  }
  for (int r = 0; r < size_; r++) {
    CallLog& log = found[static_cast<size_t>(r)];
    log.sequence = block_->ranks[r].sequence.load();
    std::copy(std::begin(block_->ranks[r].calls), std::end(block_->ranks[r].calls), std::begin(log.calls));
  }
  return found;
}

void Control::mismatch(const std::vector<int>& members) {
  uint32_t none = 0;
  if (block_->error.value.compare_exchange_strong(none, 1)) {
    const Verdict verdict = disagreement(logs(), members, block_->ranks[rank_].sequence.load());
    block_->error_kind = static_cast<int32_t>(verdict.kind);
    block_->error_rank = verdict.rank;
    copy_text(block_->message, sizeof(block_->message), verdict.message);
    block_->error.store(2);
  }
  raise();
}

}  // namespace gingham
