#include "transport/ucx.h"

#include <cstdlib>
#include <utility>

#include "base/check.h"
#include "base/wait.h"

namespace gingham {
namespace {

constexpr int kTurns = 64;  // calls of ucp_worker_progress in a row
constexpr int kRankShift = 32;

uint64_t wire_tag(int rank, uint32_t tag) { return static_cast<uint64_t>(static_cast<uint32_t>(rank)) << kRankShift | tag; }

}  // namespace

UcxEngine::Remote& UcxEngine::remote(int peer) {
  CHECK(MeshError, !closed_, "rank ", rank_, ": the engine is closed");
  const auto found = remotes_.find(peer);
  CHECK(MeshError, found != remotes_.end(), "rank ", rank_, ": rank ", peer, " is no peer of this engine; connect() names them");
  return *found->second;
}

void UcxEngine::end(Operation& operation, ucs_status_t status) {
  operation.ended = true;
  operation.status = status;
  operation.request = nullptr;
  change();
}

void UcxEngine::on_sent(void* request, ucs_status_t status, void* operation) {
  auto& o = *static_cast<Operation*>(operation);
  o.engine->end(o, status);
  o.engine->api_.request_free(request);
}

void UcxEngine::on_received(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info, void* operation) {
  auto& o = *static_cast<Operation*>(operation);
  o.info = *info;
  o.engine->end(o, status);
  o.engine->api_.request_free(request);
}

Engine::Ticket UcxEngine::post(Operation operation, const void* data) {
  static char nothing;
  if (operation.bytes == 0) data = &nothing;
  const Ticket ticket = next_++;
  Operation& o = operations_.emplace(ticket, operation).first->second;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.user_data = &o;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  ucs_status_ptr_t given = nullptr;
  if (o.receives) {
    param.op_attr_mask |= UCP_OP_ATTR_FLAG_NO_IMM_CMPL;  // UCX tells a size that is wrong to callbacks only
    param.cb.recv = on_received;
    given = api_.tag_recv_nbx(worker_, const_cast<void*>(data), o.bytes, wire_tag(o.peer->rank, o.tag), ~ucp_tag_t{0}, &param);
  } else if (o.peer->endpoint && !o.peer->broken) {
    param.cb.send = on_sent;
    given = api_.tag_send_nbx(o.peer->endpoint, data, o.bytes, wire_tag(rank_, o.tag), &param);
  } else {
    end(o, o.peer->broken ? o.peer->status : UCS_ERR_CONNECTION_RESET);
    return ticket;
  }
  if (!given || ucx_is_error(given)) {
    end(o, ucx_status(given));
  } else if (!o.ended) {
    o.request = given;
  }
  return ticket;
}

Engine::Ticket UcxEngine::post_send(int peer, uint32_t tag, const void* data, size_t bytes) {
  CHECK(MeshError, tag < kTags, "rank ", rank_, ": tag ", tag, " of a message, expected below 2^31");
  const Lock lock(mutex_);
  const uint64_t before = changes();
  Operation operation;
  operation = {this, &remote(peer), false, false, tag, bytes, nullptr, UCS_OK, {}};
  const Ticket ticket = post(operation, data);
  if (sleepers_ > 0) progress();  // a sleeper was told to wake by what UCX had to do before this message
  wake(before);
  return ticket;
}

Engine::Ticket UcxEngine::post_recv(int peer, uint32_t tag, void* data, size_t bytes) {
  CHECK(MeshError, tag < kTags, "rank ", rank_, ": tag ", tag, " of a message, expected below 2^31");
  const Lock lock(mutex_);
  const uint64_t before = changes();
  Operation operation;
  operation = {this, &remote(peer), true, false, tag, bytes, nullptr, UCS_OK, {}};
  const Ticket ticket = post(operation, data);
  if (sleepers_ > 0) progress();
  wake(before);
  return ticket;
}

bool UcxEngine::done(Ticket ticket) {
  const Lock lock(mutex_);
  turns_++;
  const auto found = operations_.find(ticket);
  CHECK(MeshError, found != operations_.end(), "rank ", rank_, ": ticket ", ticket, " has ended already, or was never given");
  Operation& o = found->second;
  const uint64_t before = changes();
  if (!o.ended) progress();
  const Remote& peer = *o.peer;
  if (!o.ended && (peer.broken || peer.left)) cancel(o);
  wake(before);
  if (!o.ended) return false;
  const Operation ended = o;
  operations_.erase(found);
  judge(ended);
  return true;
}

// Ends what can be ended. A receive that was matched goes on until its message is here, or its endpoint is closed.
void UcxEngine::cancel(Operation& operation) {
  if (operation.ended) return;
  api_.request_cancel(worker_, operation.request);
  for (int turn = 0; turn < kTurns && !operation.ended; turn++) progress();
}

void UcxEngine::judge(const Operation& o) const {
  const Remote& peer = *o.peer;
  if (o.receives && (o.status == UCS_ERR_MESSAGE_TRUNCATED || (o.status == UCS_OK && o.info.length != o.bytes))) {
    throw ShapeError(concat("rank ", rank_, " expected ", o.bytes, " bytes from rank ", peer.rank, " under tag ", o.tag, ", got a message of ",
                            o.info.length, " bytes: the two ranks do not run the same call"));
  }
  if (o.status == UCS_OK) return;
  const char* what = o.receives ? " waited for " : " was sending ";
  const std::string reason = peer.left ? "which has closed its engine in order" : peer.broken ? why(peer) : std::string(api_.status_string(o.status));
  throw PeerDied(peer.rank, concat("rank ", rank_, what, o.bytes, o.receives ? " bytes from rank " : " bytes to rank ", peer.rank, " under tag ",
                                   o.tag, ", ", reason));
}

std::string UcxEngine::why(const Remote& peer) const {
  const char* hint = peer.silent || peer.status == UCS_ERR_ENDPOINT_TIMEOUT ? "; the link, or the host behind it, did not answer for 3 s" : "";
  return concat("whose connection to ", peer.where, " broke: UCX says '", api_.status_string(peer.status), "'", hint);
}

void UcxEngine::withdraw(Ticket ticket) {
  Lock lock(mutex_);
  turns_++;
  const auto found = operations_.find(ticket);
  if (found == operations_.end()) return;
  Operation& o = found->second;
  const uint64_t before = changes();
  if (!o.ended) o.receives ? cancel(o) : say(*o.peer, kDrop, o.tag);
  wake(before);
  constexpr double kPatience = 5;
  if (!o.ended && !wait_until(lock, kPatience, [&] { return o.ended; })) {
    // the peer neither takes nor sends the rest: only without its endpoint is the memory free
    o.peer->broken = unsettled_ = true;
    o.peer->status = UCS_ERR_CANCELED;
    wait_until(lock, kPatience, [&] { return o.ended; });
    CHECK(MeshError, o.ended, "rank ", rank_, ": UCX does not give back a message of ", o.bytes, " bytes of rank ", o.peer->rank);
  }
  operations_.erase(ticket);
}

std::string UcxEngine::failure(int peer) {
  const Lock lock(mutex_);
  const Remote& r = remote(peer);
  return r.broken && !r.left ? concat("rank ", r.rank, ", ", why(r)) : std::string();
}

bool UcxEngine::left(int peer) {
  const Lock lock(mutex_);
  return remote(peer).left;
}

// The peer's words: an operation of the engine's own, posted again after each.
void UcxEngine::listen(Remote& peer) {
  while (!peer.listens && !peer.left) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
    param.user_data = &peer;
    param.cb.recv = on_word;
    param.memory_type = UCS_MEMORY_TYPE_HOST;
    constexpr ucp_tag_t kAnyWord = ~ucp_tag_t{0} << 31;
    peer.listens = true;
    const ucs_status_ptr_t given = api_.tag_recv_nbx(worker_, &peer.heard, sizeof peer.heard, wire_tag(peer.rank, kTags), kAnyWord, &param);
    if (!peer.listens) continue;  // it was here already
    peer.listens = !ucx_is_error(given);
    peer.listening = peer.listens ? given : nullptr;
    return;
  }
}

void UcxEngine::on_word(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info, void* remote) {
  auto& peer = *static_cast<Remote*>(remote);
  peer.listens = false;
  peer.listening = nullptr;
  if (status == UCS_OK) {
    peer.engine->hear(peer, static_cast<uint32_t>(info->sender_tag));
    peer.engine->unsettled_ = true;
  }
  peer.engine->api_.request_free(request);
}

void UcxEngine::hear(Remote& peer, uint32_t word) {
  word -= kTags;
  peer.met = peer.met || word == kHello;
  peer.left = peer.left || word == kBye;
  peer.owes_read = peer.owes_read || word == kBye;
  peer.read_bye = peer.read_bye || word == kRead;
  if (word == kDrop) peer.drops.push_back(peer.heard);
  unsettled_ = true;
  change();
}

// Frees the word that was sent, which UCX may read until now.
void UcxEngine::on_word_sent(void* request, ucs_status_t, void* sent) {
  const std::unique_ptr<SentWord> word(static_cast<SentWord*>(sent));
  word->engine->api_.request_free(request);
}

void UcxEngine::say(Remote& peer, Word word, uint32_t tag) {
  if (!peer.endpoint || peer.broken) return;
  auto sent = std::make_unique<SentWord>(SentWord{this, tag});
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.user_data = sent.get();
  param.cb.send = on_word_sent;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  const ucs_status_ptr_t given = api_.tag_send_nbx(peer.endpoint, &sent->tag, sizeof sent->tag, wire_tag(rank_, kTags + word), &param);
  if (given && !ucx_is_error(given)) static_cast<void>(sent.release());  // the callback's
}

// A peer has withdrawn what it was sending, and waits until that is received: into no memory, which UCX tells the sender as received.
void UcxEngine::drop(const Remote& peer, uint32_t tag) {
  static char nothing;
  ucp_tag_recv_info_t info{};
  while (const ucp_tag_message_h message = api_.tag_probe_nb(worker_, wire_tag(peer.rank, tag), ~ucp_tag_t{0}, 1, &info)) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    param.user_data = this;
    param.cb.recv = on_dropped;
    param.memory_type = UCS_MEMORY_TYPE_HOST;
    api_.tag_msg_recv_nbx(worker_, &nothing, 0, message, &param);
  }
}

void UcxEngine::on_dropped(void* request, ucs_status_t, const ucp_tag_recv_info_t*, void* engine) {
  static_cast<UcxEngine*>(engine)->api_.request_free(request);
}

void UcxEngine::on_error(void* remote, ucp_ep_h, ucs_status_t status) {
  auto& peer = *static_cast<Remote*>(remote);
  peer.broken = peer.engine->unsettled_ = true;
  peer.status = status;
  peer.silent = now() < peer.engine->silenced_ + 1;
  peer.engine->change();
}

}  // namespace gingham
