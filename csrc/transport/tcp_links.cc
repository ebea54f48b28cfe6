#include "transport/tcp_links.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace gingham {
namespace {

constexpr int kUnanswered = 4;       // times in a row that the same data were sent again
constexpr unsigned kSilence = 2500;  // milliseconds without any acknowledgement

// The kernel's tcp_info as far as it is used: it only ever grows, and headers older than Linux 5.4 end before the peer's window.
struct TcpInfo {
  uint8_t state, ca_state, retransmits, probes, backoff, others[3];
  uint32_t rto, ato, snd_mss, rcv_mss, unacked, between[7];
  uint32_t last_ack_recv, more[11];
  uint64_t paced[2], bytes[2];
  uint32_t segments[2], notsent_bytes, min_rtt, data_segments[2];
  uint64_t delivery_rate, busy_time, limited[2];
  uint32_t delivered[2];
  uint64_t resent[2];
  uint32_t dsack, reordered, out_of_order, snd_wnd;
};
static_assert(offsetof(TcpInfo, unacked) == offsetof(tcp_info, tcpi_unacked) &&
              offsetof(TcpInfo, last_ack_recv) == offsetof(tcp_info, tcpi_last_ack_recv) && offsetof(TcpInfo, notsent_bytes) == 144 &&
              offsetof(TcpInfo, snd_wnd) == 228);

// What an epoll descriptor watches; nothing where the descriptor is none.
std::vector<int> watched(int epoll) {
  std::vector<int> out;
  const std::string path = "/proc/self/fdinfo/" + std::to_string(epoll);
  const std::unique_ptr<FILE, int (*)(FILE*)> file(fopen(path.c_str(), "re"), fclose);
  char line[256];
  while (file && fgets(line, sizeof line, file.get())) {
    int descriptor = -1;
    if (sscanf(line, "tfd: %d", &descriptor) == 1) out.push_back(descriptor);
  }
  return out;
}

// Sent again and again without an answer; or, where this host has no route any more, not even sent, although the peer's window is open.
bool silent(int descriptor) {
  constexpr int kEstablished = 1;
  TcpInfo info{};
  socklen_t bytes = sizeof info;
  if (getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) return false;
  const bool unanswered = info.unacked > 0 && info.retransmits >= kUnanswered;
  const bool unsent = info.unacked == 0 && info.notsent_bytes > 0 && info.backoff >= kUnanswered && info.snd_wnd >= info.snd_mss;
  return info.state == kEstablished && (unanswered || unsent) && info.last_ack_recv > kSilence;
}

// Calls body for what the descriptor watches, and what these watch.
template <class Body>
void each_below(int epoll, const Body& body, int depth = 0) {
  constexpr int kDeepest = 3;
  for (const int descriptor : watched(epoll)) {
    body(descriptor);
    if (depth < kDeepest) each_below(descriptor, body, depth + 1);
  }
}

}  // namespace

int shut_silent_links(int epoll) {
  int count = 0;
  each_below(epoll, [&](int descriptor) { count += silent(descriptor) && shutdown(descriptor, SHUT_RDWR) == 0; });
  return count;
}

void shut_links(int epoll) {
  each_below(epoll, [](int descriptor) {
    constexpr int kListens = 10;  // whoever accepts on it would be told of an error that it does not expect
    TcpInfo info{};
    socklen_t bytes = sizeof info;
    if (getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, &info, &bytes) == 0 && info.state != kListens) shutdown(descriptor, SHUT_RDWR);
  });
}

void keep_links_alive(int epoll) {
  each_below(epoll, [](int descriptor) {
    constexpr int kOn = 1, kSeconds = 1, kTimes = 3;
    if (setsockopt(descriptor, IPPROTO_TCP, TCP_KEEPIDLE, &kSeconds, sizeof kSeconds) != 0) return;
    setsockopt(descriptor, IPPROTO_TCP, TCP_KEEPINTVL, &kSeconds, sizeof kSeconds);
    setsockopt(descriptor, IPPROTO_TCP, TCP_KEEPCNT, &kTimes, sizeof kTimes);
    setsockopt(descriptor, SOL_SOCKET, SO_KEEPALIVE, &kOn, sizeof kOn);
  });
}

}  // namespace gingham
