#include "control/fault.h"

#include <signal.h>
#include <unistd.h>

#include "base/check.h"

namespace gingham {
namespace {

bool names(const std::string& op, const std::string& name) {
  const size_t dot = name.find('.');
  return op == "*" || op == name || (dot != std::string::npos && (op == name.substr(0, dot) || op == name.substr(dot + 1)));
}

}  // namespace

bool Faults::at(int rank, const std::string& name) {
  bool fails = false;
  for (Fault& fault : faults_) {
    if (!names(fault.op, name) || ++fault.seen != fault.call) continue;
    switch (fault.kind) {
      case Fault::Kind::kill:
        ::kill(getpid(), SIGKILL);
        break;
      case Fault::Kind::stop:
        ::kill(getpid(), SIGSTOP);
        break;
      case Fault::Kind::exit:
        _exit(1);
      case Fault::Kind::oom:
        fails = true;
        break;
      case Fault::Kind::raise:
        throw Error(concat("rank ", rank, ": the error that GINGHAM_FAULT asks for, in call ", fault.call, " of ", name));
    }
  }
  return fails;
}

Fault::Kind fault_kind(const std::string& word) {
  if (word == "kill") return Fault::Kind::kill;
  if (word == "stop") return Fault::Kind::stop;
  if (word == "raise") return Fault::Kind::raise;
  if (word == "exit") return Fault::Kind::exit;
  CHECK(MeshError, word == "oom", "kind=", word, ", expected kill, stop, raise, exit or oom");
  return Fault::Kind::oom;
}

}  // namespace gingham
