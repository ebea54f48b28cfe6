// UcxEngine: who progresses the worker, and when it sleeps.
#include <poll.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "base/wait.h"
#include "transport/tcp_links.h"
#include "transport/ucx.h"

namespace gingham {
namespace {

constexpr int kTurns = 64;  // calls of ucp_worker_progress in a row

std::chrono::duration<double> of(double seconds) { return std::chrono::duration<double>(seconds); }

}  // namespace

bool UcxEngine::progress() {
  bool moved = false;
  if (!worker_) return moved;  // closed while this thread slept
  for (int turn = 0; turn < kTurns && api_.worker_progress(worker_); turn++) moved = true;
  while (unsettled_) settle();
  return moved;
}

void UcxEngine::settle() {
  unsettled_ = false;
  for (const auto& [rank, peer] : remotes_) {
    listen(*peer);
    if (peer->owes_read) say(*peer, kRead);
    peer->owes_read = false;
    for (const uint32_t tag : std::exchange(peer->drops, {})) drop(*peer, tag);
    if (!peer->broken || !peer->endpoint) continue;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t given = api_.ep_close_nbx(peer->endpoint, &param);
    peer->endpoint = nullptr;
    if (given && !ucx_is_error(given)) closing_.push_back(given);
  }
  std::erase_if(closing_, [this](void* request) {
    if (api_.request_check_status(request) == UCS_INPROGRESS) return false;
    api_.request_free(request);
    return true;
  });
}

// What this thread's progress ended may be what another sleeps for: the one in poll() is signalled, the rest are told.
void UcxEngine::wake(uint64_t before) {
  if (changes() == before) return;
  if (driven_ && worker_) api_.worker_signal(worker_);
  if (resting_ > 0) others_.notify_all();
}

// Sleeps on the worker's descriptor; false where there is something to progress first. The mutex is free meanwhile.
bool UcxEngine::armed_sleep(Lock& lock, double seconds) {
  if (!worker_ || api_.worker_arm(worker_) != UCS_OK) return false;
  sleepers_++;
  lock.unlock();
  pollfd slot{descriptor_, POLLIN, 0};
  const double limited = std::clamp(seconds, 0.0, 3600.0);
  const timespec limit{static_cast<time_t>(limited), static_cast<long>((limited - std::floor(limited)) * 1e9)};
  ppoll(&slot, 1, &limit, nullptr);
  lock.lock();
  sleepers_--;
  return true;
}

void UcxEngine::rest(double seconds, uint64_t since) {
  Lock lock(mutex_);
  if (closed_) return;
  rest_locked(lock, seconds, since);
}

void UcxEngine::rest_locked(Lock& lock, double seconds, uint64_t since) {
  const double start = now(), end = start + seconds;
  const uint64_t before = changes();
  turns_++;
  while (changes() == since && !stopping_) {
    const double left = end - now();
    if (left <= 0) break;
    if (driven_) {
      resting_++;
      others_.wait_for(lock, of(left));
      resting_--;
      continue;
    }
    if (progress()) continue;
    if (changes() != since) break;
    driven_ = true;
    armed_sleep(lock, left);
    driven_ = false;
    progress();
  }
  turns_++;
  wake(before);
  if (resting_ > 0 && !driven_) others_.notify_one();  // who takes the driver's place
  constexpr double kLong = 1e-3;
  if (helper_naps_ && now() - start > kLong) helper_.notify_one();
}

bool UcxEngine::wait_until(Lock& lock, double seconds, const std::function<bool()>& met) {
  const double end = now() + seconds;
  while (!met()) {
    const double left = end - now();
    if (left <= 0) return false;
    const uint64_t seen = changes();
    progress();
    if (met()) break;
    rest_locked(lock, std::min(left, 0.1), seen);
  }
  return true;
}

// Takes over when no caller has progressed for a millisecond: sooner, it would take each message's event from under a caller that waits
// again at once.
void UcxEngine::help() {
  constexpr double kNap = 1e-3, kLongest = 64e-3, kLook = 0.5;
  Lock lock(mutex_);
  double nap = kNap, looked = now();
  for (uint64_t seen = turns_ - 1; !stopping_;) {
    if (now() > looked + kLook) {
      looked = now();
      if (shut_silent_links(descriptor_) > 0) silenced_ = looked;
    }
    if (driven_ || turns_ != seen) {
      nap = turns_ == seen ? std::min(2 * nap, kLongest) : kNap;
      seen = turns_;
      helper_naps_ = true;
      helper_.wait_for(lock, of(nap));
      helper_naps_ = false;
      continue;
    }
    const uint64_t before = changes();
    const bool moved = progress();
    wake(before);
    if (!moved && !stopping_) armed_sleep(lock, kLook);
  }
}

}  // namespace gingham
