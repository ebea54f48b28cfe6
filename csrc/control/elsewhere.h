// Ranks of the job on other hosts, as the control of one host sees them: what it must tell them, and ask.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "control/verdict.h"

namespace gingham {

// A rank's threads that wait: the one that makes the calls, and the one that sums over depth beside it. A rank's sums wait for others' sums.
constexpr int kThreads = 2;

// What a rank's host says of it: whom it waits for, and its last calls of one program.
struct Told {
  int rank = -1;
  Waiting waits[kThreads];
  CallLog log;
};

class Elsewhere {
 public:
  virtual ~Elsewhere() = default;
  // Tells all hosts of an error of the job; of several the first one counts, which is returned.
  virtual Verdict publish(const Verdict& mine) = 0;
  // A rank that cannot be reached any more.
  virtual std::optional<Verdict> failure() = 0;
  // Of the ranks on other hosts, those that answer in time; program: whose calls.
  virtual std::vector<Told> ask(uint64_t program) = 0;
  // The first member's bytes to all members of a program, on every host.
  virtual std::string share(uint64_t program, bool first, const std::string& bytes) = 0;
  virtual bool left(int rank) = 0;  // it has ended the job in order
};

}  // namespace gingham
