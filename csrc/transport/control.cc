#include "transport/control.h"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

namespace gingham {
namespace {

constexpr int kSpins = 200, kYields = 4, kSliceMs = 50;

}  // namespace

void nap(double seconds) {
  if (seconds <= 0) return;
  timespec t{static_cast<time_t>(seconds), static_cast<long>((seconds - static_cast<double>(static_cast<time_t>(seconds))) * 1e9)};
  clock_nanosleep(CLOCK_MONOTONIC, 0, &t, nullptr);
}

std::function<void()> Control::interrupt;

Control::Control(ControlBlock* block, int rank, int size, double timeout) : block_(block), rank_(rank), size_(size), timeout_(timeout) {}

Control::~Control() {
  for (int fd : pidfds_)
    if (fd >= 0) ::close(fd);
}

void Control::watch(int rank, int pid) {
  const size_t r = static_cast<size_t>(rank);
  if (pid <= 0 || pid == getpid() || watched_[r] == pid) return;
  watched_[r] = pid;
  pidfds_[r] = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (pidfds_[r] >= 0) return;
  if (errno == ESRCH)
    fail(Kind::died, rank, concat("rank ", rank, " (pid ", pid, ") died while the job started"));
  else
    watches_ = false;
}

void Control::attach(const std::string& version, const std::vector<int>& pids) {
  pidfds_.assign(static_cast<size_t>(size_), -1);
  watched_.assign(static_cast<size_t>(size_), -1);
  for (int r = 0; r < static_cast<int>(pids.size()); r++) watch(r, pids[static_cast<size_t>(r)]);
  RankRecord& me = block_->ranks[rank_];
  me.heartbeat = now();
  me.waiting_on.store(-1);
  if (rank_ == 0) {
    copy_text(block_->version, sizeof(block_->version), version);
    block_->size = size_;
  }
  me.pid.store(getpid());
  if (rank_ != 0) {
    wait(block_->attached, 1, -1);
    CHECK(MeshError, version == block_->version, "rank ", rank_, " runs gingham ", version, ", rank 0 runs ", block_->version,
          "; install one version everywhere");
    CHECK(MeshError, size_ == block_->size, "rank ", rank_, " was started for ", size_, " ranks, rank 0 for ", block_->size);
  }
  block_->attached.add(1);
  const double start = now();
  while (!reached(block_->attached.load(), static_cast<uint32_t>(size_))) {
    poll_peers(-1);
    nap(0.001);
    if (now() - start < timeout_) continue;
    std::vector<int> missing;
    for (int r = 0; r < size_; r++)
      if (block_->ranks[r].pid.load() == 0) missing.push_back(r);
    fail(Kind::stalled, missing.empty() ? 0 : missing[0], concat(list_of(missing), " did not join within ", timeout_, " s"));
    raise();
  }
  for (int r = 0; r < size_; r++) watch(r, block_->ranks[r].pid.load());
}

void Control::begin(const Call& call) {
  CHECK(MeshError, !orphaned_, "rank ", rank_, ": ", call.name, " in a process forked from this rank, such as a data loader's worker, which is",
        " no rank of the mesh: call layers, gather and other collectives in the rank itself; mesh.scatter works in both");
  CHECK(MeshError, !closed_.load(), "rank ", rank_, ": ", call.name, " on a mesh after destroy; call gingham.init again");
  if (told_) recover();
  RankRecord& me = block_->ranks[rank_];
  const uint32_t sequence = me.sequence.load() + 1;
  Call& mine = me.calls[sequence % kHistory];
  mine = call;
  if (label_) {
    mine.options = label_->hash;
    copy_text(mine.label, sizeof(mine.label), label_->text);
    label_.reset();
  }
  key_ = mixed(history_, mine.key());
  history_ = mixed(history_, mine.history());
  inside_ = true;
  me.sequence.store(sequence);
  check();
  if (!faults_.none() && faults_.at(rank_, call.name) && out_of_memory) out_of_memory();
}

void Control::note(std::shared_ptr<const Label> label) {
  say(std::move(label));
  Call call;
  call.set_name("called");
  begin(call);
}

void Control::check() {
  if (block_->error.load() != 0) raise();
  if (block_->refused.load() != 3 * epoch()) raise_refusal(false);
  CHECK(MeshError, !abandoned_.load(), "rank ", rank_, ": this sum over depth was given up: memory ran out on a rank");
}

void Control::look() { poll_peers(-1); }

void Control::share(char* bytes, size_t count) {
  CHECK(MeshError, count <= sizeof(block_->notice), "a notice of ", count, " bytes, expected at most ", sizeof(block_->notice));
  if (rank_ == 0) {
    memcpy(block_->notice, bytes, count);
    block_->shared.store(1);
  }
  wait(block_->shared, 1, 0);
  memcpy(bytes, block_->notice, count);
}

int Control::behind() const {
  int odd = rank_;
  for (int r = 0; r < size_; r++) {
    if (block_->ranks[r].closed.load()) return r;
    if (static_cast<int32_t>(block_->ranks[r].sequence.load() - block_->ranks[odd].sequence.load()) < 0) odd = r;
  }
  return odd;
}

void Control::raise() {
  const double start = now();
  while (block_->error.load() != 2 && now() - start < kVerdictPatience) nap(0.0005);
  const std::string message = block_->error.load() == 2 ? std::string(block_->message) : "a peer failed without leaving a message";
  const int odd = block_->error_rank;
  switch (static_cast<Kind>(block_->error_kind)) {
    case Kind::died:
      throw PeerDied(odd, concat(message, " (told to rank ", rank_, ")"));
    case Kind::stalled:
      throw PeerStalled(odd, concat(message, " (told to rank ", rank_, ")"));
    case Kind::memory:
      throw PeerOutOfMemory(odd, concat(message, " (told to rank ", rank_, ")"));
    case Kind::shape:
      throw ShapeError(concat("rank ", rank_, ": ", message));
    case Kind::mesh:
      break;
  }
  throw MeshError(concat("rank ", rank_, ": ", message));
}

void Control::fail(Kind kind, int rank, const std::string& message) {
  uint32_t none = 0;
  if (orphaned_ || !block_->error.value.compare_exchange_strong(none, 1)) return;
  block_->error_kind = static_cast<int32_t>(kind);
  block_->error_rank = rank;
  copy_text(block_->message, sizeof(block_->message), message);
  block_->error.store(2);
}

void Control::wait(Word& word, uint32_t target, int peer) {
  for (int i = 0; i < kSpins; i++) {
    if (reached(word.load(), target)) return;
    pause();
  }
  for (int i = 0; i < kYields; i++) {
    if (reached(word.load(), target)) return;
    sched_yield();
  }
  slow_wait(word, target, peer);
}

void Control::slow_wait(Word& word, uint32_t target, int peer) {
  RankRecord& me = block_->ranks[rank_];
  me.waiting_on.store(peer);
  me.heartbeat.store(now());
  const double start = now();
  double polled = start;
  for (;;) {
    const uint32_t seen = word.load();
    if (reached(seen, target)) break;
    check();
    word.sleep(seen, kSliceMs);
    const double time = now();
    if (time - polled < 0.9e-3 * kSliceMs) continue;
    polled = time;
    me.heartbeat.store(time);
    if (reached(word.load(), target)) break;
    if (!recovering_) compare(peer);
    poll_peers(peer);
    if (interrupt) interrupt();
    if (time - start > timeout_) {
      const int odd = culprit(peer);
      fail(Kind::stalled, odd,
           concat("rank ", odd, " did not answer for ", timeout_, " s (in ",
                  recovering_ ? "the first call after memory ran out" : me.calls[me.sequence.load() % kHistory].name,
                  "); it may be stopped, busy or in other code; init(timeout=) sets the limit"));
      raise();
    }
  }
  me.waiting_on.store(-1);
}

namespace {

// Where the kernel does not tell: whether a process is gone, or waits only for its parent to ask how it ended.
bool gone(int pid) {
  char stat[512];
  FILE* file = fopen(concat("/proc/", pid, "/stat").c_str(), "r");
  if (!file) return kill(pid, 0) != 0 && errno == ESRCH;
  const size_t n = fread(stat, 1, sizeof(stat) - 1, file);
  fclose(file);
  stat[n] = 0;
  const char* state = strrchr(stat, ')');
  return n == 0 || (state && strlen(state) > 2 && strchr("ZXx", state[2]));
}

}  // namespace

void Control::poll_peers(int peer) {
  std::vector<pollfd> fds;
  std::vector<int> ranks;
  const auto died = [this](int r) {
    if (!block_->ranks[r].closed.load()) fail(Kind::died, r, concat("rank ", r, " (pid ", watched_[static_cast<size_t>(r)], ") died"));
  };
  for (int r = 0; r < static_cast<int>(pidfds_.size()); r++) {
    const size_t at = static_cast<size_t>(r);
    if (pidfds_[at] >= 0) {
      fds.push_back({pidfds_[at], POLLIN, 0});
      ranks.push_back(r);
    } else if (watched_[at] > 0 && gone(watched_[at])) {
      died(r);
    }
  }
  if (!fds.empty() && poll(fds.data(), fds.size(), 0) > 0) {
    for (size_t i = 0; i < fds.size(); i++)
      if (fds[i].revents & POLLIN) died(ranks[i]);
  }
  check();
  if (peer >= 0 && block_->ranks[peer].closed.load()) {
    fail(Kind::died, peer, concat("rank ", peer, " left the job (destroy or exit) while others wait for it"));
    raise();
  }
}

int Control::culprit(int peer) const {
  const double fresh = now() - 1.0;
  std::vector<Waiting> ranks;
  for (int r = 0; r < size_; r++) {
    const RankRecord& record = block_->ranks[r];
    ranks.push_back({record.waiting_on.load(), record.heartbeat.load() >= fresh});
  }
  return culprit_of(ranks, peer);
}

void Control::sleep_until(double time) {
  for (double left = time - now(); left > 0; left = time - now()) {
    nap(std::min(left, 1e-3 * kSliceMs));
    if (left > 1e-3 * kSliceMs) {
      block_->ranks[rank_].heartbeat.store(now());
      check();
    }
  }
}

void Control::close() {
  closed_.store(true);
  if (orphaned_) return;
  block_->ranks[rank_].closed.store(1);
}

}  // namespace gingham
