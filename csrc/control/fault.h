// Faults asked for (GINGHAM_FAULT): in the n-th call of a name on this rank something happens that would else be waited for in vain.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace gingham {

struct Fault {
  enum class Kind { kill, stop, raise, exit, oom };
  std::string op;  // the call's whole name, its part before or after the dot, or "*"
  int64_t call;    // counted from 1
  Kind kind;
  int64_t seen = 0;
};

class Faults {
 public:
  Faults() = default;
  explicit Faults(std::vector<Fault> faults) : faults_(std::move(faults)) {}
  // Counts a call. Strikes where it is its turn, or returns true where the call's next allocation is to fail.
  bool at(int rank, const std::string& name);
  bool none() const { return faults_.empty(); }

 private:
  std::vector<Fault> faults_;
};

Fault::Kind fault_kind(const std::string& word);

}  // namespace gingham
