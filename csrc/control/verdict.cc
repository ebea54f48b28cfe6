#include "control/verdict.h"

#include <string.h>

#include <algorithm>
#include <iterator>
#include <map>

#include "base/check.h"

namespace gingham {
namespace {

size_t idx(int rank) { return static_cast<size_t>(rank); }

constexpr const char* kKinds[] = {"died", "stalled", "shape", "mesh", "memory"};

}  // namespace

const char* name_of(ErrorKind kind) { return kKinds[static_cast<size_t>(kind)]; }

ErrorKind error_kind(const std::string& name) {
  const auto found = std::find(std::begin(kKinds), std::end(kKinds), name);
  CHECK(MeshError, found != std::end(kKinds), "an error of kind ", name);
  return static_cast<ErrorKind>(found - std::begin(kKinds));
}

std::string list_of(const std::vector<int>& ranks) {
  std::string out = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); i++) out += (i ? ", " : "") + std::to_string(ranks[i]);
  return out;
}

Verdict disagreement(const std::vector<CallLog>& ranks, const std::vector<int>& members, uint32_t sequence) {
  uint32_t newest = sequence;
  std::vector<int> all;
  for (int r = 0; r < static_cast<int>(ranks.size()); r++) {
    if (reached(ranks[idx(r)].sequence, newest)) newest = ranks[idx(r)].sequence;
    all.push_back(r);
  }
  std::map<uint64_t, std::vector<int>> groups;
  auto group = [&](const std::vector<int>& among, uint32_t at, auto&& value_of) {
    groups.clear();
    for (int r : among)
      if (ranks[idx(r)].remembers(at)) groups[value_of(ranks[idx(r)].at(at))].push_back(r);
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
  for (auto& [key, side] : groups) sides.push_back(side);
  std::sort(sides.begin(), sides.end(), [](const auto& a, const auto& b) { return a.size() != b.size() ? a.size() > b.size() : a[0] < b[0]; });
  auto call_of = [&](int r) -> const Call& { return ranks[idx(r)].at(sequence); };
  const Call& expected = call_of(sides[0][0]);
  const bool tie = sides.size() > 1 && sides[0].size() == sides[1].size();
  auto named = [&ranks](std::vector<int> side) {
    for (int& r : side) r = ranks[idx(r)].rank;
    return list_of(side);
  };
  Verdict verdict;
  verdict.rank = ranks[idx(sides.back()[0])].rank;
  const Call& got = call_of(sides.back()[0]);
  const bool same_op = strcmp(expected.name, got.name) == 0 && std::equal(expected.grid, expected.grid + 3, got.grid);
  const bool same_label = expected.options == got.options;
  verdict.kind = same_op && same_label ? ErrorKind::shape : ErrorKind::mesh;
  std::string text = concat("the ranks disagree in call ", sequence, ": ");
  for (size_t i = sides.size(); i-- > 1;) text += concat(named(sides[i]), " got ", call_of(sides[i][0]).text(), "; ");
  text += concat(named(sides[0]), tie ? " got " : " expected ", expected.text());
  if (same_op && !same_label)
    text += "; every rank must make the same calls in the same order, of layers made after the same torch.manual_seed with the same options";
  else
    text += same_op ? "; pass the same global shapes, dtype and options on every rank" : "; every rank must make the same calls in the same order";
  verdict.message = text;
  return verdict;
}

int culprit_of(const std::vector<Waiting>& ranks, int peer) {
  int odd = peer;
  for (size_t hop = 0; hop < ranks.size(); hop++) {
    const Waiting& each = ranks[idx(odd)];
    if (each.on < 0 || !each.fresh) return odd;
    odd = each.on;
  }
  return peer;
}

}  // namespace gingham
