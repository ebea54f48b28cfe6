// Ranks whose calls differ: when a rank looks, and what it gathers for the verdict.
#include <algorithm>
#include <iterator>

#include "control/program.h"

namespace gingham {
namespace {

constexpr double kJudgePatience = 0.3, kAskAfter = 0.4;

// The rank may make its next calls meanwhile: then all is read again, so that every call that the log remembers is whole.
CallLog log_of(const ProgramRecord& record) {
  CallLog log;
  log.rank = record.rank;
  do {
    log.sequence = record.sequence.load();
    std::transform(std::begin(record.calls), std::end(record.calls), std::begin(log.calls), [](const KeptCall& call) { return call.load(); });
  } while (record.sequence.load() != log.sequence);
  return log;
}

}  // namespace

int Program::place_of(int rank) const { return static_cast<int>(std::find(members_.begin(), members_.end(), rank) - members_.begin()); }

void Program::compare(int peer, double waited, bool left) {
  const uint32_t sequence = record(rank_).sequence.load();
  // A rank that is so far ahead that its log does not reach back to this call has made it, and was not told of a difference.
  const auto differs = [&](int r, const CallLog& log) {
    if (sequence == 0 || !log.remembers(sequence)) return false;
    const Call& call = log.at(sequence);
    return call.invalid || (r == peer && call.key() != mine_.key());
  };
  for (int r = 0; r < size(); r++)
    if (here(r) && reached(record(r).sequence.load(), sequence) && differs(r, log_of(record(r)))) mismatch({rank_, r});
  if (left) control_.raise_left(member(peer));
  if (!spans_ || waited < std::max(kAskAfter, 2 * asked_)) return;
  asked_ = waited;  // ever more seldom
  for (const Told& told : control_.elsewhere()->ask(id_)) {
    const int r = place_of(told.rank);
    if (r < size() && differs(r, told.log)) mismatch({rank_, r});
  }
}

std::vector<Told> told_of(const Control& control, ProgramBlock* block) {
  std::vector<Told> found;
  const auto tell = [&](int rank) -> Told& {
    Told& told = found.emplace_back();
    told.rank = told.log.rank = rank;
    const std::vector<Waiting> waits = control.waits(rank);
    std::copy(waits.begin(), waits.end(), told.waits);
    return told;
  };
  if (!block)
    for (int rank : control.locals()) tell(rank);
  for (int r = 0; block && r < block->size; r++) {
    const ProgramRecord& record = records_of(block)[r];
    if (!control.here(record.rank)) continue;
    tell(record.rank).log = log_of(record);
  }
  return found;
}

std::vector<CallLog> Program::logs() {
  const uint32_t sequence = record(rank_).sequence.load();
  const double start = now();
  std::vector<CallLog> found(members_.size());
  for (int r = 0; r < size(); r++)
    while (here(r) && !reached(record(r).sequence.load(), sequence) && now() - start < kJudgePatience) nap(0.0005);
  for (int r = 0; r < size(); r++) {
    CallLog& log = found[static_cast<size_t>(r)];
    log.rank = member(r);
    if (here(r)) log = log_of(record(r));
  }
  while (spans_) {  // ranks elsewhere may still be on their way to this call
    bool all = true;
    for (const Told& told : control_.elsewhere()->ask(id_)) {
      const auto r = static_cast<size_t>(place_of(told.rank));
      if (r < found.size()) found[r] = told.log;
      all = all && (r >= found.size() || reached(told.log.sequence, sequence));
    }
    if (all || now() - start > kJudgePatience) break;
    nap(0.05);
  }
  return found;
}

void Program::mismatch(const std::vector<int>& members) {
  control_.fail([&] { return disagreement(logs(), members, record(rank_).sequence.load()); });
  control_.raise();
}

}  // namespace gingham
