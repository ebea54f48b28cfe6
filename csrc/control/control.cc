#include "control/control.h"

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

Control::Control(ControlBlock* block, int rank, int size, std::vector<int> locals, double timeout)
    : block_(block), rank_(rank), size_(size), locals_(std::move(locals)), here_(static_cast<size_t>(size)), timeout_(timeout) {
  for (int r : locals_) here_[static_cast<size_t>(r)] = true;
}

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

namespace {

// Of a rank that waits for the job itself.
struct Joining : Waiter {
  explicit Joining(Control& control) : control(control) {}
  void check() override { control.check(); }
  std::string doing() const override { return "the start of the job"; }
  double timeout() const override { return control.timeout(); }
  Control& control;
};

}  // namespace

void Control::attach(const std::string& version, const std::vector<int>& pids) {
  pidfds_.assign(static_cast<size_t>(size_), -1);
  watched_.assign(static_cast<size_t>(size_), -1);
  for (int r = 0; r < static_cast<int>(pids.size()); r++)
    if (here(r)) watch(r, pids[static_cast<size_t>(r)]);
  const int first = locals_[0];
  RankRecord& me = block_->ranks[rank_];
  for (auto& wait : me.waits) {
    wait.heartbeat = now();
    wait.on.store(-1);
  }
  if (rank_ == first) {
    copy_text(block_->version, sizeof(block_->version), version);
    block_->size = size_;
  }
  me.pid.store(getpid());
  if (rank_ != first) {
    Joining joining(*this);
    wait(block_->attached, 1, first, joining);
    CHECK(MeshError, version == block_->version, "rank ", rank_, " runs gingham ", version, ", rank ", first, " runs ", block_->version,
          "; install one version everywhere");
    CHECK(MeshError, size_ == block_->size, "rank ", rank_, " was started for ", size_, " ranks, rank ", first, " for ", block_->size);
  }
  block_->attached.add(1);
  const double start = now();
  while (!reached(block_->attached.load(), static_cast<uint32_t>(locals_.size()))) {
    look();
    nap(0.001);
    if (now() - start < timeout_) continue;
    std::vector<int> missing;
    for (int r : locals_)
      if (block_->ranks[r].pid.load() == 0) missing.push_back(r);
    fail(Kind::stalled, missing.empty() ? 0 : missing[0], concat(list_of(missing), " did not join within ", timeout_, " s"));
    raise();
  }
  for (int r : locals_) watch(r, block_->ranks[r].pid.load());
}

void Control::check() {
  if (failed()) raise();
}

ProgramEntry* Control::program(uint64_t id) {
  for (ProgramEntry& entry : block_->programs)
    if (entry.state.load() == 2 && entry.id.load() == id) return &entry;
  return nullptr;
}

ProgramEntry* Control::make_entry(uint64_t id, uint64_t offset) {
  for (ProgramEntry& entry : block_->programs) {
    uint32_t none = 0;
    if (!entry.state.value.compare_exchange_strong(none, 1)) continue;
    entry.id.store(id);
    entry.offset.store(offset);
    entry.state.store(2);
    return &entry;
  }
  throw MeshError(concat("rank ", rank_, ": this job has ", kMaxPrograms, " meshes already, sums over depth counted; end some with gingham.destroy"));
}

void Control::sweep(Heap& heap) {
  std::erase_if(ended_, [&heap](const Ended& each) {
    if (!reached(each.left->load(), each.members)) return false;
    each.entry->state.store(0);
    heap.free(each.memory);
    return true;
  });
}

void Control::raise() {
  if (broken_off) broken_off();
  const double start = now();
  const double patience = elsewhere_ ? kFarPatience : kVerdictPatience;
  while (block_->error.load() != 2 && now() - start < patience) nap(0.0005);
  const int odd = block_->error_rank;
  if (block_->error.load() != 2) throw MeshError(concat("rank ", rank_, ": rank ", odd, " met an error, and ended before it could tell which"));
  const std::string message(block_->message);
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
  fail([&] { return Verdict{kind, rank, message}; });
}

void Control::fail(const std::function<Verdict()>& verdict) {
  if (broken_off) broken_off();
  uint32_t none = 0;
  if (orphaned_ || !block_->error.value.compare_exchange_strong(none, 1)) return;
  block_->error_rank = rank_;  // who finds out, until it is known whose error it is
  const Verdict mine = verdict();
  set(elsewhere_ ? elsewhere_->publish(mine) : mine);
}

void Control::set(const Verdict& verdict) {
  block_->error_kind = static_cast<int32_t>(verdict.kind);
  block_->error_rank = verdict.rank;
  copy_text(block_->message, sizeof(block_->message), verdict.message);
  block_->error.store(2);
}

void Control::hear(const Verdict& verdict) {
  uint32_t none = 0;
  if (!orphaned_ && block_->error.value.compare_exchange_strong(none, 1)) set(verdict);
}

namespace {

struct Reached : Condition {
  Reached(Word& word, uint32_t target) : word(word), target(target) {}
  bool met() override {
    seen = word.load();
    return reached(seen, target);
  }
  void sleep(int milliseconds) override { word.sleep(seen, milliseconds); }
  Word& word;
  uint32_t target, seen = 0;
};

}  // namespace

void Control::wait(Word& word, uint32_t target, int peer, Waiter& waiter) {
  for (int i = 0; i < kSpins; i++) {
    if (reached(word.load(), target)) return;
    pause();
  }
  for (int i = 0; i < kYields; i++) {
    if (reached(word.load(), target)) return;
    sched_yield();
  }
  Reached condition(word, target);
  slow_wait(condition, peer, waiter);
}

void Control::wait(Condition& condition, int peer, Waiter& waiter) {
  if (!condition.met()) slow_wait(condition, peer, waiter);
}

void Control::slow_wait(Condition& condition, int peer, Waiter& waiter) {
  try {
    wait_in_slices(condition, peer, waiter);
  } catch (...) {  // a refusal, a signal, an engine's error
    if (broken_off) broken_off();
    throw;
  }
}

void Control::wait_in_slices(Condition& condition, int peer, Waiter& waiter) {
  auto& mine = block_->ranks[rank_].waits[waiter.thread()];
  mine.on.store(peer);
  mine.heartbeat.store(now());
  const double start = now();
  double polled = start;
  while (!condition.met()) {
    waiter.check();
    condition.sleep(kSliceMs);
    const double time = now();
    if (time - polled < 0.9e-3 * kSliceMs) continue;
    polled = time;
    mine.heartbeat.store(time);
    const bool gone = peer >= 0 && (left(peer) || waiter.left());
    if (condition.met()) break;  // asked after: the peer may have done this, and left since
    waiter.compare(time - start, gone);
    look();
    if (gone) raise_left(peer);
    waiter.check();
    if (interrupt) interrupt();
    if (time - start > waiter.timeout()) {
      const int odd = culprit(peer, waiter.thread());
      fail(Kind::stalled, odd,
           concat("rank ", odd, " did not answer for ", waiter.timeout(), " s (in ", waiter.doing(),
                  "); it may be stopped, busy or in other code; init(timeout=) sets the limit"));
      raise();
    }
  }
  mine.on.store(-1);
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

void Control::look(int peer) {
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
  if (elsewhere_)
    if (const auto gone = elsewhere_->failure()) fail(gone->kind, gone->rank, gone->message);
  check();
  if (peer >= 0 && left(peer)) raise_left(peer);
}

void Control::raise_left(int rank) {
  fail(Kind::died, rank, concat("rank ", rank, " left the job (destroy or exit) while others wait for it"));
  raise();
}

std::vector<Waiting> Control::waits(int rank) const {
  std::vector<Waiting> found;
  for (const auto& wait : block_->ranks[rank].waits) found.push_back({wait.on.load(), wait.heartbeat.load() >= now() - 1.0});
  return found;
}

int Control::culprit(int peer, int thread) const {
  std::vector<Waiting> ranks(static_cast<size_t>(size_));
  for (int r : locals_) ranks[static_cast<size_t>(r)] = waits(r)[static_cast<size_t>(thread)];
  if (elsewhere_)
    for (const Told& told : elsewhere_->ask(0)) ranks[static_cast<size_t>(told.rank)] = told.waits[thread];
  return culprit_of(ranks, peer);
}

void Control::sleep_until(double time, Waiter& waiter) {
  for (double left = time - now(); left > 0; left = time - now()) {
    nap(std::min(left, 1e-3 * kSliceMs));
    if (left > 1e-3 * kSliceMs) {
      block_->ranks[rank_].waits[waiter.thread()].heartbeat.store(now());
      waiter.check();
    }
  }
}

void Control::close() {
  if (!orphaned_) block_->ranks[rank_].closed.store(1);
}

}  // namespace gingham
