// What moves bytes between ranks of different hosts: messages to a peer, matched in order for each (peer, tag).
//   Ticket ticket = engine.post_recv(3, 7, data, bytes);
//   for (uint64_t seen = engine.changes(); !engine.done(ticket); seen = engine.changes()) engine.rest(0.05, seen);
// Ranks are the job's. Every call may come from any thread of the rank. Leaves: UcxEngine, and HandedEngine for torch's Gloo.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace gingham {

struct EnginePeer {
  int rank = -1;
  std::string address;  // what the peer's engine.address() gave
};

class Engine {
 public:
  using Ticket = uint64_t;
  static constexpr uint32_t kTags = uint32_t{1} << 31;  // tags are smaller

  virtual ~Engine() = default;
  virtual const char* name() const = 0;
  virtual std::string address() const = 0;  // bytes that a peer needs to connect; may be empty

  // Once, on all ranks: returns when every peer has answered. In one call for all peers, since two ranks that connected one peer after the
  // other in different orders would wait for each other. Throws MeshError naming the peers that did not answer, and what was tried.
  virtual void connect(const std::vector<EnginePeer>& peers, double seconds) = 0;

  // Return at once; the memory must stay, and what is sent be left as it is, until done() or withdraw(). Any size, 0 bytes too.
  virtual Ticket post_send(int peer, uint32_t tag, const void* data, size_t bytes) = 0;
  virtual Ticket post_recv(int peer, uint32_t tag, void* data, size_t bytes) = 0;

  // Progresses a little; true once the operation has ended, which ends its ticket too. Throws where it failed: ShapeError for a message of
  // another size (both are named), PeerDied where the peer is gone. A send has ended when its memory may be used again.
  virtual bool done(Ticket ticket) = 0;
  // Gives an operation up; when it returns, the engine does not touch the memory any more, and the ticket has ended. A message that was
  // to be received may then meet the next receive of its (peer, tag), and one that was to be sent arrives or not, as do those before it that
  // the peer has not begun to receive: a call that is broken off goes on under other tags.
  virtual void withdraw(Ticket ticket) = 0;

  // How many operations have ended and peers have failed or left; rest() progresses and sleeps until that differs from `since` or the
  // time is over. The count is read before done() is asked, so that what another thread completes in between is not slept through.
  virtual uint64_t changes() const = 0;
  virtual void rest(double seconds, uint64_t since) = 0;

  // "", or why the peer cannot be reached any more: found while this rank only receives, or computes. "" also for a peer that left in order.
  virtual std::string failure(int peer) = 0;
  virtual bool left(int peer) = 0;  // it has closed its engine in order

  // Leaves in order: tells every peer, waits `seconds` for them to have read it, and frees everything. All tickets must have ended.
  virtual void close(double seconds) = 0;

  std::function<void()> interrupt;  // asked several times a second while connect() waits; may throw
};

}  // namespace gingham
