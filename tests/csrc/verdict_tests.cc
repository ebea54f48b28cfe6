// Verdicts on records alone: no segment, no processes.
#include "control/verdict.h"
#include "core_tests.h"

namespace gingham {
namespace {

std::vector<CallLog> logs_of(const std::vector<std::vector<Call>>& calls) {
  std::vector<CallLog> logs;
  for (const auto& made : calls) {
    CallLog log;
    log.rank = static_cast<int>(logs.size());
    for (const Call& call : made) log.calls[++log.sequence % kHistory] = call;
    logs.push_back(log);
  }
  return logs;
}

void the_smallest_group_is_odd() {
  const Call right = named("all_gather", 8), wrong = named("all_gather", 9);
  const Verdict v = disagreement(logs_of({{right}, {right}, {wrong}, {right}}), everyone(4), 1);
  EXPECT(v.rank == 2 && v.kind == ErrorKind::shape);
  EXPECT(has(v.message, "rank 2 got all_gather") && has(v.message, "ranks 0, 1, 3 expected"));
}

void of_equal_groups_both_are_got() {
  const Verdict v = disagreement(logs_of({{named("all_gather")}, {named("broadcast")}}), everyone(2), 1);
  EXPECT(v.rank == 1 && v.kind == ErrorKind::mesh && !has(v.message, "expected") && has(v.message, "rank 0 got all_gather"));
}

// Rank 1 skipped a call that moved nothing; the next, in which they meet, is the same on both.
void the_oldest_difference_counts() {
  const Call quiet = named("called"), other = named("dropout"), meets = named("all_gather");
  const Verdict v = disagreement(logs_of({{quiet, meets}, {other, meets}, {quiet, meets}}), everyone(3), 2);
  EXPECT(v.rank == 1 && has(v.message, "in call 1"));
}

// What is older than the history cannot be compared, and a rank that is behind is in no group.
void only_what_is_remembered_is_compared() {
  std::vector<Call> first(kHistory + 3, named("called")), second = first;
  second[0] = named("dropout");
  first.push_back(named("all_gather", 1)), second.push_back(named("all_gather", 2));
  const Verdict v = disagreement(logs_of({first, second, {named("called")}}), {0, 1}, kHistory + 4);
  EXPECT(v.rank == 1 && has(v.message, "K=2") && !has(v.message, "dropout"));
}

// Rank 2 has gone on so far that its log does not reach back to the call in which the others differ.
void a_rank_far_ahead_is_in_no_group() {
  std::vector<Call> ahead(kHistory, named("later"));
  const Verdict v = disagreement(logs_of({{named("all_gather", 1)}, {named("all_gather", 2)}, ahead}), {0, 1, 2}, 1);
  EXPECT(v.rank == 1 && has(v.message, "K=1") && has(v.message, "K=2") && !has(v.message, "later"));
}

void rows_differ_among_members_only() {
  const std::vector<CallLog> logs = logs_of({{named("all_gather", 1, 4)}, {named("all_gather", 1, 5)}, {named("all_gather", 1, 9)}});
  const Verdict v = disagreement(logs, {0, 1}, 1);
  EXPECT(v.rank == 1 && has(v.message, "local rows=5") && !has(v.message, "rank 2"));
}

// Of a program that other ranks make: its second member is the job's rank 5.
void ranks_are_named_as_the_job_counts_them() {
  std::vector<CallLog> logs = logs_of({{named("all_gather", 1)}, {named("all_gather", 2)}, {named("all_gather", 1)}});
  for (int i = 0; i < 3; i++) logs[static_cast<size_t>(i)].rank = 4 + i;
  const Verdict v = disagreement(logs, everyone(3), 1);
  EXPECT(v.rank == 5 && has(v.message, "rank 5 got") && has(v.message, "ranks 4, 6 expected"));
}

void the_culprit_ends_the_chain() {
  EXPECT(culprit_of({{1, true}, {2, true}, {-1, true}}, 1) == 2);   // 0 waits for 1, which waits for 2, which waits for nobody
  EXPECT(culprit_of({{1, true}, {2, false}, {-1, true}}, 1) == 1);  // 1 shows no sign of life
  EXPECT(culprit_of({{1, true}, {0, true}}, 1) == 1);               // a circle: the peer that is waited for
}

}  // namespace

std::vector<Test> verdict_tests() {
  return {{"the smallest group is odd", the_smallest_group_is_odd},
          {"of equal groups both are got", of_equal_groups_both_are_got},
          {"the oldest difference counts", the_oldest_difference_counts},
          {"only what is remembered is compared", only_what_is_remembered_is_compared},
          {"a rank far ahead is in no group", a_rank_far_ahead_is_in_no_group},
          {"rows differ among members only", rows_differ_among_members_only},
          {"ranks are named as the job counts them", ranks_are_named_as_the_job_counts_them},
          {"the culprit ends the chain", the_culprit_ends_the_chain}};
}

}  // namespace gingham
