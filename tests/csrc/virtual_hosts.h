// Several hosts in one process, so that the sanitizers see all that passes between them: each host has its own segment, its ranks are
// threads, and an engine of this process joins the hosts.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core_tests.h"
#include "transport/engine.h"

namespace gingham {

using Layout = std::vector<std::vector<int>>;  // the ranks of each host

// One, and the ways in which the tests deal its ranks out.
constexpr int kRanks = 4;
inline const Layout kOne{{0, 1, 2, 3}};
inline const std::vector<Layout> kLayouts{{{0, 1}, {2, 3}}, {{0, 1, 2}, {3}}, {{0, 2}, {1, 3}}, {{0}, {1}, {2}, {3}}};
std::string name_of(const Layout& hosts);

// What joins the ranks' engines. Two are at hand: one that carries messages between queues on threads of its own, which delays some and ends
// them out of order, and HandedEngine with a server for all ranks.
enum class Via { queues, handed };

class Network {
 public:
  virtual ~Network() = default;
  virtual std::shared_ptr<Engine> engine(int rank) = 0;
  virtual void lose(int rank) = 0;  // the others' connections to it break, as when its process dies
};

std::unique_ptr<Network> queue_network(int size);
std::unique_ptr<Network> handed_network(int size);

// How a rank ended: "" and no text where it returned.
struct Ending {
  std::string kind, text;  // of the error: its class' name, and what it says
  int rank = -1;           // that it names, where it is a PeerError
  Row row;
};

// Thrown by a rank's body, its process dies: nobody is told but by their connections.
struct Dies {};

std::vector<Ending> run_on_hosts(const Layout& hosts, Via via, const RankBody& body, double timeout = 20);
// The same where no rank may fail.
std::vector<Row> rows_on_hosts(const Layout& hosts, Via via, const RankBody& body);

}  // namespace gingham
