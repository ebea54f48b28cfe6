// Which rank is the odd one, and the words in which all ranks are told: pure functions over records, whoever gathered them.
#pragma once
#include <string>
#include <vector>

#include "base/wait.h"
#include "control/call.h"

namespace gingham {

// Calls of each rank that are kept; the newest kHistory - 1 are remembered, since the next may be on its way into the place of the oldest.
constexpr uint32_t kHistory = 8;

enum class ErrorKind : int32_t { died, stalled, shape, mesh, memory };
const char* name_of(ErrorKind kind);
ErrorKind error_kind(const std::string& name);

// The last calls of one rank, by number modulo kHistory.
struct CallLog {
  int rank = 0;           // as errors name it
  uint32_t sequence = 0;  // the newest
  Call calls[kHistory];
  bool remembers(uint32_t number) const { return reached(sequence, number) && sequence - number < kHistory - 1; }
  const Call& at(uint32_t number) const { return calls[number % kHistory]; }
};

struct Verdict {
  ErrorKind kind = ErrorKind::mesh;
  int rank = 0;  // the odd one
  std::string message;
};

// Ranks whose calls differ. The oldest call on which any two of a program differ counts, since it may have moved nothing; else the call number
// `sequence`, in which `members` differ. The smallest group is the odd one, of equal groups the one with the larger first rank.
//   rank 0 Linear(8, 8)   rank 1 Linear(8, 8)   rank 2 Linear(8, 4): rank 2, a ShapeError: same operation, other sizes
//   rank 0 Linear(8, 8)   rank 1 Linear(8, 8)   rank 2 gather:       rank 2, a MeshError: another call
// members: places among `ranks`; the verdict names ranks as their logs do.
Verdict disagreement(const std::vector<CallLog>& ranks, const std::vector<int>& members, uint32_t sequence);

// What a rank waits for: a peer or -1, and whether it has shown a sign of life of late.
struct Waiting {
  int on = -1;
  bool fresh = false;
};

// Who holds up a wait for `peer`: the end of the chain of who waits for whom, or the first on it that shows no sign of life.
int culprit_of(const std::vector<Waiting>& ranks, int peer);

std::string list_of(const std::vector<int>& ranks);  // "rank 3", "ranks 0, 1"

}  // namespace gingham
