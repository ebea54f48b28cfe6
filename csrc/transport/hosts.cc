#include "transport/hosts.h"

#include <string.h>

#include <type_traits>

#include "base/check.h"

namespace gingham {

static_assert(std::is_trivially_copyable_v<Told>);

Hosts::Hosts(int rank, std::vector<int> host_of, std::vector<std::string> names, std::shared_ptr<Engine> engine, Calls calls)
    : rank_(rank), host_of_(std::move(host_of)), names_(std::move(names)), engine_(std::move(engine)), calls_(std::move(calls)) {}

Verdict Hosts::publish(const Verdict& mine) {
  try {
    return calls_.publish(mine);
  } catch (const std::exception&) {  // the store is gone: this host's own error is all that is known
    return mine;
  }
}

std::optional<Verdict> Hosts::failure() {
  for (int r = 0; r < static_cast<int>(host_of_.size()); r++) {
    if (here(r)) continue;
    const std::string why = engine_->failure(r);
    if (!why.empty()) return Verdict{ErrorKind::died, r, concat("rank ", r, " on ", host(r), " died, or cannot be reached: ", why)};
  }
  return std::nullopt;
}

std::vector<Told> Hosts::ask(uint64_t program) {
  std::vector<Told> found;
  try {
    for (const std::string& answer : calls_.ask(program)) {
      if (answer.size() % sizeof(Told) != 0) continue;
      const size_t before = found.size();
      found.resize(before + answer.size() / sizeof(Told));
      memcpy(static_cast<void*>(found.data() + before), answer.data(), answer.size());
    }
  } catch (const std::exception&) {
    // nobody answers: what this host knows must do
  }
  return found;
}

std::string Hosts::words(const std::vector<Told>& told) {
  return std::string(reinterpret_cast<const char*>(told.data()), told.size() * sizeof(Told));
}

}  // namespace gingham
