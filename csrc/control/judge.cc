// Ranks whose calls differ: when a rank looks, and what it gathers for the verdict.
#include <algorithm>
#include <iterator>

#include "control/program.h"

namespace gingham {
namespace {

constexpr double kJudgePatience = 0.3;

}  // namespace

void Program::compare(int peer) {
  const ProgramRecord& mine = record(rank_);
  const uint32_t sequence = mine.sequence.load();
  for (int r = 0; r < size() && sequence > 0; r++) {
    if (!reached(record(r).sequence.load(), sequence)) continue;
    const Call& theirs = record(r).calls[sequence % kHistory];
    if (theirs.invalid || (r == peer && theirs.key() != mine.calls[sequence % kHistory].key())) mismatch({rank_, r});
  }
  if (peer >= 0 && record(peer).closed.load()) {
    fail(Kind::died, member(peer), concat("rank ", member(peer), " left the job (destroy or exit) while others wait for it"));
    control_.raise();
  }
}

std::vector<CallLog> Program::logs() const {
  const uint32_t sequence = record(rank_).sequence.load();
  const double start = now();
  std::vector<CallLog> found(members_.size());
  for (int r = 0; r < size(); r++)
    while (!reached(record(r).sequence.load(), sequence) && now() - start < kJudgePatience) nap(0.0005);
  for (int r = 0; r < size(); r++) {
    CallLog& log = found[static_cast<size_t>(r)];
    log.rank = member(r);
    log.sequence = record(r).sequence.load();
    std::copy(std::begin(record(r).calls), std::end(record(r).calls), std::begin(log.calls));
  }
  return found;
}

void Program::mismatch(const std::vector<int>& members) {
  control_.fail([&] { return disagreement(logs(), members, record(rank_).sequence.load()); });
  control_.raise();
}

}  // namespace gingham
