// UcxEngine: how it opens, meets its peers and leaves.
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/check.h"
#include "base/wait.h"
#include "transport/ucx.h"

namespace gingham {
namespace {

// For UCX the ranks of a host are ours; a link that is cut must be noticed while this side only receives, and while nothing is under way; and
// the default 8 KB of a TCP segment cost a third of the speed.
const std::map<std::string, std::string> kSettings = {
    {"TLS", "^shm,cuda,rocm,ze"}, {"TCP_TX_SEG_SIZE", "256k"}, {"TCP_RX_SEG_SIZE", "256k"},  {"TCP_KEEPIDLE", "1s"},
    {"TCP_KEEPINTVL", "1s"},      {"TCP_KEEPCNT", "3"},        {"KEEPALIVE_INTERVAL", "1s"},
};

#define UCX_CHECK(call)                                                                                                   \
  do {                                                                                                                    \
    const ucs_status_t ucx_check_status = (call);                                                                         \
    CHECK(MeshError, ucx_check_status == UCS_OK, "rank ", rank_, ": ", #call, " of UCX (", ucx_found().from, "): '",      \
          api_.status_string(ucx_check_status), "'; UCX_LOG_LEVEL=warn says more, GINGHAM_ENGINE=gloo goes without UCX"); \
  } while (0)

// This host as people know it: its name, and the IPv4 addresses of interfaces that are up.
std::string this_host() {
  char name[256] = "?";
  gethostname(name, sizeof name - 1);
  std::string out = name, addresses;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return out;
  for (const ifaddrs* each = all; each; each = each->ifa_next) {
    if (!each->ifa_addr || each->ifa_addr->sa_family != AF_INET || !(each->ifa_flags & IFF_UP)) continue;
    char text[INET_ADDRSTRLEN] = "";
    sockaddr_in address{};
    std::memcpy(&address, each->ifa_addr, sizeof address);
    inet_ntop(AF_INET, &address.sin_addr, text, sizeof text);
    addresses += concat(addresses.empty() ? "" : ", ", text, " ", each->ifa_name);
  }
  freeifaddrs(all);
  return concat(out, " (", addresses, ")");
}

}  // namespace

UcxEngine::UcxEngine(int rank, const std::map<std::string, std::string>& settings) : rank_(rank), pid_(getpid()), api_(ucx()) {
  try {
    open(settings);
    describe();
  } catch (...) {
    release();
    throw;
  }
  // signals are for the program's threads
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  thread_ = std::thread([this] { help(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), "gingham-ucx");
}

void UcxEngine::open(const std::map<std::string, std::string>& settings) {
  ucp_config_t* config = nullptr;
  UCX_CHECK(api_.config_read(nullptr, nullptr, &config));
  const std::unique_ptr<ucp_config_t, void (*)(ucp_config_t*)> owner(config, api_.config_release);
  std::map<std::string, std::string> wanted = settings;
  wanted.insert(kSettings.begin(), kSettings.end());
  for (const auto& [name, value] : wanted) {
    if (getenv(("UCX_" + name).c_str())) continue;
    const ucs_status_t status = api_.config_modify(config, name.c_str(), value.c_str());
    CHECK(MeshError, status == UCS_OK, "rank ", rank_, ": UCX (", ucx_found().from, ") refuses ", name, "=", value, ": '", api_.status_string(status),
          "'");
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_TAG_SENDER_MASK;
  params.features = UCP_FEATURE_TAG | UCP_FEATURE_WAKEUP;
  params.tag_sender_mask = ~uint64_t{0} << 32;
  UCX_CHECK(api_.init_version(1, 10, &params, config, &context_));
  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  UCX_CHECK(api_.worker_create(context_, &worker, &worker_));
  UCX_CHECK(api_.worker_get_efd(worker_, &descriptor_));
}

// The address: a line for people, then UCX's.
void UcxEngine::describe() {
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  UCX_CHECK(api_.worker_get_address(worker_, &address, &bytes));
  address_ = this_host() + "\n" + std::string(reinterpret_cast<const char*>(address), bytes);
  api_.worker_release_address(worker_, address);
}

void UcxEngine::begin(const EnginePeer& given) {
  const size_t line = given.address.find('\n');
  CHECK(MeshError, line != std::string::npos && line + 1 < given.address.size(), "rank ", rank_, ": the address of rank ", given.rank, " has ",
        given.address.size(), " bytes and is none of a UCX engine; all ranks must choose the same engine");
  CHECK(MeshError, given.rank != rank_ && !remotes_.contains(given.rank), "rank ", rank_, " connects to rank ", given.rank,
        given.rank == rank_ ? ", itself" : " twice");
  auto peer = std::make_unique<Remote>();
  peer->engine = this;
  peer->rank = given.rank;
  peer->where = given.address.substr(0, line);
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(given.address.data() + line + 1);
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = {on_error, peer.get()};
  const ucs_status_t status = api_.ep_create(worker_, &params, &peer->endpoint);
  CHECK(MeshError, status == UCS_OK, "rank ", rank_, " on ", address_.substr(0, address_.find('\n')), " cannot reach rank ", given.rank, " on ",
        peer->where, " over UCX: '", api_.status_string(status), "'; UCX_NET_DEVICES and UCX_TLS choose among the networks");
  Remote& kept = *remotes_.emplace(given.rank, std::move(peer)).first->second;
  listen(kept);
  say(kept, kHello);
}

void UcxEngine::connect(const std::vector<EnginePeer>& peers, double seconds) {
  Lock lock(mutex_);
  CHECK(MeshError, !closed_, "rank ", rank_, ": the engine is closed");
  for (const EnginePeer& peer : peers) begin(peer);
  const auto all_met = [&] {
    return std::all_of(remotes_.begin(), remotes_.end(), [](const auto& each) { return each.second->met || each.second->broken; });
  };
  constexpr double kSlice = 0.1;
  for (const double end = now() + seconds; !wait_until(lock, std::min(kSlice, end - now()), all_met) && now() < end;) {
    if (!interrupt) continue;
    lock.unlock();
    interrupt();
    lock.lock();
  }
  std::string missing;
  for (const auto& [rank, peer] : remotes_)
    if (!peer->met)
      missing += concat("\n  rank ", rank, " on ", peer->where, ": ",
                        peer->broken ? api_.status_string(peer->status) : concat("no answer within ", seconds, " s").c_str());
  CHECK(MeshError, missing.empty(), "rank ", rank_, " on ", address_.substr(0, address_.find('\n')), " cannot reach these over UCX:", missing,
        "\nDo these ranks run, and does a firewall stop TCP between the hosts? UCX_NET_DEVICES names the interface to use where a host has "
        "several; GINGHAM_ENGINE=gloo tries torch's Gloo.");
}

// Until all that was sent has left this process, or `end`.
void UcxEngine::flush_endpoints(Lock& lock, double end) {
  std::vector<void*> requests;
  ucp_request_param_t param{};
  for (const auto& [rank, peer] : remotes_) {
    if (!peer->endpoint || peer->broken) continue;
    const ucs_status_ptr_t given = api_.ep_flush_nbx(peer->endpoint, &param);
    if (given && !ucx_is_error(given)) requests.push_back(given);
  }
  const auto flushed = [&] {
    return std::all_of(requests.begin(), requests.end(), [&](void* each) { return api_.request_check_status(each) != UCS_INPROGRESS; });
  };
  constexpr double kSlice = 0.01;  // a flush ends without an event of ours
  while (!wait_until(lock, std::min(kSlice, end - now()), flushed) && now() < end) continue;
  for (void* each : requests) api_.request_free(each);
}

void UcxEngine::close(double seconds) {
  if (getpid() != pid_) return;  // a forked child has the parent's sockets: closing is the parent's
  Lock lock(mutex_);
  if (closed_) return;
  const double end = now() + seconds;
  for (const auto& [rank, peer] : remotes_)
    if (peer->met && !peer->left) say(*peer, kBye);
  wait_until(lock, seconds, [&] {
    return std::all_of(remotes_.begin(), remotes_.end(), [](const auto& each) {
      const Remote& peer = *each.second;
      return !peer.met || peer.left || peer.read_bye || peer.broken;
    });
  });
  flush_endpoints(lock, std::max(end, now() + 0.1));
  closed_ = stopping_ = true;
  api_.worker_signal(worker_);
  helper_.notify_all();
  others_.notify_all();
  lock.unlock();
  thread_.join();
  lock.lock();
  release();
}

void UcxEngine::release() {
  for (const auto& [rank, peer] : remotes_) peer->broken = peer->left = true;
  if (worker_) {
    for (const auto& [rank, peer] : remotes_)
      if (peer->listening) api_.request_cancel(worker_, peer->listening);
    for (auto& [ticket, operation] : operations_)
      if (!operation.ended) api_.request_cancel(worker_, operation.request);
    settle();
    constexpr int kPatience = 1000;
    for (int turn = 0; turn < kPatience && (!closing_.empty() || progress()); turn++) {
      progress();
      settle();
    }
    api_.worker_destroy(worker_);
  }
  if (context_) api_.cleanup(context_);
  worker_ = nullptr;
  context_ = nullptr;
  operations_.clear();
  remotes_.clear();
}

UcxEngine::~UcxEngine() {
  if (getpid() != pid_) {
    // a forked child: neither the helper thread nor the peers are its own
    thread_.detach();
    return;
  }
  try {
    close(0);
  } catch (...) {  // nobody is left to be told
  }
}

}  // namespace gingham
