// Ranks whose calls differ: who is told so, and how it is decided which of them is the odd one.
#include <string.h>

#include <algorithm>
#include <map>

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

void Control::judge(const std::vector<int>& members, Kind* kind, int* odd, std::string* message) {
  uint32_t sequence = block_->ranks[rank_].sequence.load(), newest = sequence;
  const double start = now();
  auto arrived = [&](int r, uint32_t at) { return reached(block_->ranks[r].sequence.load(), at); };
  std::vector<int> all;
  for (int r = 0; r < size_; r++) {
    while (!arrived(r, sequence) && now() - start < kJudgePatience) nap(0.0005);
    if (arrived(r, newest)) newest = block_->ranks[r].sequence.load();
    all.push_back(r);
  }
  std::map<uint64_t, std::vector<int>> groups;
  auto group = [&](const std::vector<int>& ranks, uint32_t at, auto&& value_of) {
    groups.clear();
    for (int r : ranks)
      if (arrived(r, at)) groups[value_of(block_->ranks[r].calls[at % kHistory])].push_back(r);
  };
  // The oldest call on which the ranks differ: it may have moved nothing.
  for (uint32_t at = newest < kHistory ? 1 : newest - kHistory + 2; reached(sequence, at); at++) {
    group(all, at, [](const Call& call) { return call.history(); });
    if (groups.size() < 2) continue;
    sequence = at;
    break;
  }
  if (groups.size() < 2) group(members, sequence, [](const Call& call) { return call.key(); });
  if (groups.size() < 2) group(members, sequence, [](const Call& call) { return static_cast<uint64_t>(call.rows); });
  std::vector<std::vector<int>> sides;
  for (auto& [key, ranks] : groups) sides.push_back(ranks);
  std::sort(sides.begin(), sides.end(), [](const auto& a, const auto& b) { return a.size() != b.size() ? a.size() > b.size() : a[0] < b[0]; });
  auto call_of = [&](int r) -> const Call& { return block_->ranks[r].calls[sequence % kHistory]; };
  const Call& expected = call_of(sides[0][0]);
  const bool tie = sides.size() > 1 && sides[0].size() == sides[1].size();
  *odd = sides.back()[0];
  const Call& got = call_of(*odd);
  const bool same_op = strcmp(expected.name, got.name) == 0 && std::equal(expected.grid, expected.grid + 3, got.grid);
  const bool same_label = expected.options == got.options;
  *kind = same_op && same_label ? Kind::shape : Kind::mesh;
  std::string text = concat("the ranks disagree in call ", sequence, ": ");
  for (size_t i = sides.size(); i-- > 1;) text += concat(list_of(sides[i]), " got ", call_of(sides[i][0]).text(), "; ");
  text += concat(list_of(sides[0]), tie ? " got " : " expected ", expected.text());
  if (same_op && !same_label)
    text += "; every rank must make the same calls in the same order, of layers made after the same torch.manual_seed with the same options";
  else
    text += same_op ? "; pass the same global shapes, dtype and options on every rank" : "; every rank must make the same calls in the same order";
  *message = text;
}

void Control::mismatch(const std::vector<int>& members) {
  uint32_t none = 0;
  if (block_->error.value.compare_exchange_strong(none, 1)) {
    Kind kind = Kind::mesh;
    int odd = rank_;
    std::string message;
    judge(members, &kind, &odd, &message);
    block_->error_kind = static_cast<int32_t>(kind);
    block_->error_rank = odd;
    copy_text(block_->message, sizeof(block_->message), message);
    block_->error.store(2);
  }
  raise();
}

}  // namespace gingham
