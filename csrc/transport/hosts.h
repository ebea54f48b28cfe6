// The other hosts of a job: the engine that moves bytes to their ranks, and what control tells and asks them. Texts and questions travel
// by a store that all hosts reach, which the launcher (Python) keeps: `publish` and `ask` are its calls. The ranks of one host are told what
// others publish through their control block.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "control/elsewhere.h"
#include "transport/engine.h"

namespace gingham {

class Hosts : public Elsewhere {
 public:
  struct Calls {
    std::function<Verdict(const Verdict&)> publish;
    std::function<std::vector<std::string>(uint64_t program)> ask;  // told() of each host that answers in time
    std::function<std::string(uint64_t program, bool first, const std::string& bytes)> share;
  };
  // host_of: the number of each rank's host; names: of the hosts.
  Hosts(int rank, std::vector<int> host_of, std::vector<std::string> names, std::shared_ptr<Engine> engine, Calls calls);

  Engine& engine() { return *engine_; }
  int number(int rank) const { return host_of_[static_cast<size_t>(rank)]; }  // of a rank's host
  bool here(int rank) const { return number(rank) == number(rank_); }
  Verdict publish(const Verdict& mine) override;
  std::optional<Verdict> failure() override;
  std::vector<Told> ask(uint64_t program) override;
  std::string share(uint64_t program, bool first, const std::string& bytes) override { return calls_.share(program, first, bytes); }
  bool left(int rank) override { return engine_->left(rank); }
  // The name of a rank's host, for people.
  std::string host(int rank) const { return names_[static_cast<size_t>(host_of_[static_cast<size_t>(rank)])]; }
  static std::string words(const std::vector<Told>& told);  // as `ask` brings them

 private:
  const int rank_;
  const std::vector<int> host_of_;
  const std::vector<std::string> names_;
  std::shared_ptr<Engine> engine_;
  Calls calls_;
};

}  // namespace gingham
