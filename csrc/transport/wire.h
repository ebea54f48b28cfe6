// An axis some of whose ranks are on other hosts. To each of these a call sends a header first, with its key, rows and shape and the whole
// record of the call, so that a difference names both sides; nobody sends a byte before all headers agree. Messages travel on the engine;
// between ranks of one host they go through shared memory as on any axis (shm), and its board stands for them here too.
//   tag of the engine: program (16 bits) | axis (6) | lane, or the header's number (4)
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "transport/hosts.h"
#include "transport/shm.h"

namespace gingham {

class Wire : public Axis, public Board, public Ring {
 public:
  // members: the program's ranks in axis order; local: the same axis of those on this host, in that order (null: this rank is alone here).
  Wire(Program& program, Hosts& hosts, int index, std::vector<int> members, std::unique_ptr<Shm> local);
  ~Wire() override;

  Board& board() override { return *this; }
  Ring& ring() override { return *this; }
  Window* window() override { return nullptr; }
  bool holds(const void* data) const override { return !local_ || local_->holds(data); }
  int host(int peer) const override { return hosts_.number(peers_[static_cast<size_t>(peer)].rank); }

  void post(std::span<const Matrix> panels, int64_t rows, bool uneven, const Shape& shape) override;
  int64_t rows(int peer) override;
  Shape shape(int peer) override;
  void finish() override;
  void retire() override;

  void send(int peer, const void* data, size_t bytes, int lane) override;
  void expect(int peer, void* data, size_t bytes, int lane) override;
  bool ready(int peer, int lane) override;
  void recv(int peer, void* data, size_t bytes, int lane) override;
  void drain(int peer, int lane, uint32_t left) override;

 private:
  struct Header {
    uint64_t key;
    int64_t rows;
    int32_t uneven;
    Shape shape;
    Call call;
  };
  // One operation of the engine.
  struct Move {
    Engine::Ticket ticket = 0;
    bool open = false;
    size_t bytes = 0;
  };
  struct Peer {
    bool here = false;
    int local = -1;  // its place on `local_`
    int rank = -1;   // as the job counts
    bool checked = false;
    Header header;
    Move sent, coming;  // headers
    std::deque<Move> sends[kLanes], receives[kLanes];
  };
  struct Arrival;
  Peer& at(int peer) { return peers_[static_cast<size_t>(peer)]; }
  uint32_t tag(int lane) const { return tag_ | static_cast<uint32_t>(lane); }
  Move begin_send(Peer& peer, int lane, const void* data, size_t bytes);
  Move begin_recv(Peer& peer, int lane, void* data, size_t bytes);
  void await(int peer, Move& move);
  bool ended(Move& move);
  const Header& header_of(int peer);
  template <class F>
  void for_each_move(F&& visit);

  Program& program_;
  Hosts& hosts_;
  Engine& engine_;
  std::vector<int> members_;
  std::unique_ptr<Shm> local_;
  uint32_t tag_;
  std::vector<Peer> peers_;
  Header mine_;
};

}  // namespace gingham
