#include "shim.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <vector>

#include "fiber.h"
#include "shared_watch.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

#ifndef GINGHAM_FAKE_CUDA  // there enqueue.cc has streams; a weak function here would be taken or not, as the linker meets the archive's files
void shim_enqueue(cudaStream_t, std::function<void()> work) { work(); }
#endif

extern "C" {
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  return which == cudaFuncAttributeMaxDynamicSharedMemorySize ? gingham::shim::grant(kernel, value) : cudaSuccess;
}
__attribute__((weak)) cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
__attribute__((weak)) const char* cudaGetErrorString(cudaError_t) { return "error of the shim"; }
}

namespace gingham::shim {
namespace {

constexpr size_t kMostShared = 227 * 1024;  // sm_90; sm_80 has 163 KiB
constexpr size_t kSharedWithoutAsking = 48 * 1024;

std::mutex global;
std::map<const void*, size_t> granted;  // shared memory of a launch, by kernel
Settings settings_now = [] {
  Settings out;
  if (const char* seed = getenv("GINGHAM_SHIM_SEED")) out.seed = strtoull(seed, nullptr, 10);
  if (const char* copy = getenv("GINGHAM_SHIM_COPY")) out.early = strcmp(copy, "early") == 0;
  return out;
}();
Conflicts conflicts_now[4];
uint64_t launches = 0;

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid;
};

enum class State { ready, waiting, done };

struct Thread {
  Fiber fiber;
  uint3 index;
  int number = 0;
  State state = State::ready;
  const char* at = "";                    // what it waits for
  std::vector<std::vector<Copy>> groups;  // committed copies under way, oldest first
  std::vector<Copy> open;                 // not yet committed
};

struct Warp {
  Lane lanes[32];
  int arrived = 0;
  Action action = nullptr;
  const char* name = "";
};

// One OS thread's simulated multiprocessor; the fibers are kept from launch to launch.
struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<int> ready;
  int count = 0, at_barrier = 0, done = 0, running = 0;
  bool early = false;
  const std::function<void()>* body = nullptr;
  std::exception_ptr failure;
  std::mt19937_64 random;
  SharedWatch watch;
  char* memory = nullptr;
  char begun = 0, ended = 0;  // meetings of the scheduler with the threads
};

thread_local Machine machine;

Machine& now() { return machine; }

[[noreturn]] void fail(const std::string& what) {
  std::ostringstream out;
  out << "block (" << blockIdx.x << "," << blockIdx.y << "," << blockIdx.z << ") thread " << now().running << ": " << what;
  throw Error(out.str());
}

void wake(Machine& m, int thread) {
  m.threads[static_cast<size_t>(thread)]->state = State::ready;
  m.ready.push_back(thread);
}

void wait_here(const char* what) {
  Machine& m = now();
  Thread& self = *m.threads[static_cast<size_t>(m.running)];
  self.state = State::waiting;
  self.at = what;
  self.fiber.suspend();
}

void entry(void* argument) {
  Machine& m = *static_cast<Machine*>(argument);
  Thread& self = *m.threads[static_cast<size_t>(m.running)];
  order_after(&m.begun);
  try {
    (*m.body)();
  } catch (...) {
    m.failure = std::current_exception();
  }
  order_before(&m.ended);
  self.state = State::done;
  m.done++;
  self.fiber.finish();
}

std::string stuck(const Machine& m) {
  std::ostringstream out;
  out << "block (" << blockIdx.x << "," << blockIdx.y << "," << blockIdx.z << "): threads wait for others that never come:";
  for (int i = 0; i < m.count; i++) {
    const Thread& t = *m.threads[static_cast<size_t>(i)];
    if (i < 8 || t.state == State::waiting) out << " " << i << (t.state == State::done ? " has ended" : std::string(" at ") + t.at) << ";";
    if (out.tellp() > 600) break;
  }
  return out.str();
}

void run_block(Machine& m) {
  m.at_barrier = m.done = 0;
  m.failure = nullptr;
  m.ready.clear();
  m.ready.reserve(static_cast<size_t>(m.count));  // fibers must not allocate for each other
  for (Warp& warp : m.warps) warp.arrived = 0;
  for (int i = 0; i < m.count; i++) {
    Thread& t = *m.threads[static_cast<size_t>(i)];
    t.groups.clear();
    t.open.clear();
    t.fiber.start(entry, &m);
    wake(m, i);
  }
  order_before(&m.begun);
  while (!m.ready.empty()) {
    const size_t pick = m.random() % m.ready.size();
    m.running = m.ready[pick];
    m.ready[pick] = m.ready.back();
    m.ready.pop_back();
    Thread& t = *m.threads[static_cast<size_t>(m.running)];
    threadIdx = t.index;
    t.fiber.resume();
    if (m.failure) std::rethrow_exception(m.failure);
  }
  order_after(&m.ended);
  if (m.done != m.count) throw Error(stuck(m));
  m.watch.flush_all();
}

}  // namespace

char* block_memory() { return now().memory; }

cudaError_t grant(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard lock(global);
  granted[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

bool may_use(const void* kernel, size_t bytes) {
  const std::lock_guard lock(global);
  const auto found = granted.find(kernel);
  return bytes <= (found == granted.end() ? kSharedWithoutAsking : found->second);
}

void set(const Settings& settings) {
  const std::lock_guard lock(global);
  settings_now = settings;
}

Conflicts conflicts(Access access) {
  const std::lock_guard lock(global);
  return conflicts_now[static_cast<int>(access)];
}

void reset_conflicts() {
  const std::lock_guard lock(global);
  for (Conflicts& c : conflicts_now) c = {};
}

void run(const Launch& launch, const std::function<void()>& thread_body) {
  Machine& m = now();
  {
    const std::lock_guard lock(global);
    m.random.seed(settings_now.seed + 0x9E3779B97F4A7C15ull * ++launches);
    m.early = settings_now.early;
  }
  m.count = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  if (launch.shared_bytes > kMostShared || m.count == 0 || m.count > 1024 || m.count % 32 || launch.block.y * launch.block.z != 1 ||
      launch.grid.y > 65535 || launch.grid.z > 65535 || launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0)
    throw Error("launch of a shape that no device takes, or that this shim does not");
  while (static_cast<int>(m.threads.size()) < m.count) {
    m.threads.push_back(std::make_unique<Thread>());
    m.threads.back()->number = static_cast<int>(m.threads.size()) - 1;
    m.threads.back()->index = {static_cast<unsigned>(m.threads.size()) - 1, 0, 0};
  }
  m.warps.resize(static_cast<size_t>(m.count / 32));
  m.body = &thread_body;
  blockDim = {launch.block.x, launch.block.y, launch.block.z};
  gridDim = {launch.grid.x, launch.grid.y, launch.grid.z};
  const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(aligned_alloc(128, (launch.shared_bytes + 127) / 128 * 128 + 128)), free);
  m.memory = memory.get();
  m.watch.begin(memory.get(), launch.shared_bytes, m.count);
  for (blockIdx.z = 0; blockIdx.z < launch.grid.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < launch.grid.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < launch.grid.x; blockIdx.x++) {
        memset(memory.get(), 0xff, launch.shared_bytes);
        m.watch.begin_block();
        run_block(m);
      }
  const std::lock_guard lock(global);
  for (int i = 0; i < 4; i++) {
    conflicts_now[i].phases += m.watch.conflicts[i].phases;
    conflicts_now[i].passes += m.watch.conflicts[i].passes;
    conflicts_now[i].worst = std::max(conflicts_now[i].worst, m.watch.conflicts[i].worst);
  }
}

void meet_warp(Action action, const char* name, const void* in, void* out) {
  Machine& m = now();
  const int number = m.running, first = number / 32 * 32;
  Warp& warp = m.warps[static_cast<size_t>(number / 32)];
  if (warp.arrived == 0) {
    warp.action = action;
    warp.name = name;
  } else if (warp.action != action) {
    fail(std::string("lanes of one warp meet at ") + warp.name + " and at " + name);
  }
  warp.lanes[number % 32] = {in, out};
  order_before(&warp);
  if (++warp.arrived < 32) {
    wait_here(name);
    order_after(&warp);
    return;
  }
  order_after(&warp);
  warp.arrived = 0;
  if (action) action(warp.lanes);
  m.watch.flush(number / 32);
  order_before(&warp);
  for (int i = first; i < first + 32; i++)
    if (i != number) wake(m, i);
}

void meet_warp_memory() {
  Machine& m = now();
  // Every lane ages its own clock; all have met before any goes on.
  const int number = m.running;
  meet_warp(nullptr, "warp barrier", nullptr, nullptr);
  m.watch.warp_passed(number);
}

void meet_block() {
  Machine& m = now();
  order_before(&m.at_barrier);
  const int number = m.running;
  if (++m.at_barrier < m.count) {
    wait_here("block barrier");
    order_after(&m.at_barrier);
    return;
  }
  order_after(&m.at_barrier);
  m.at_barrier = 0;
  m.watch.flush_all();
  m.watch.block_passed();
  order_before(&m.at_barrier);
  for (int i = 0; i < m.count; i++)
    if (i != number) wake(m, i);
}

void touch(const void* shared, size_t bytes, Access access) {
  Machine& m = now();
  if (const std::string wrong = m.watch.touch(m.running, shared, bytes, access); !wrong.empty()) fail(wrong);
}

void count_matrix_phase(const void* const (&rows)[8]) { now().watch.count_matrix_phase(rows); }

namespace {

void land(const Copy& copy) {
  memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid));
  memset(static_cast<char*>(copy.shared) + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
}

}  // namespace

void issue_copy(void* shared, const void* global, int bytes, int valid) {
  Machine& m = now();
  touch(shared, static_cast<size_t>(bytes), Access::copy);
  if (valid < 0 || valid > bytes || reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(bytes))
    fail("cp.async of " + std::to_string(valid) + " of " + std::to_string(bytes) + " bytes from a misaligned address or of too many");
  const Copy copy{shared, global, bytes, valid};
  if (m.early)
    land(copy);
  else
    memset(shared, 0xff, static_cast<size_t>(bytes));
  m.threads[static_cast<size_t>(m.running)]->open.push_back(copy);
}

void commit_copies() {
  Thread& t = *now().threads[static_cast<size_t>(now().running)];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void wait_copies(int pending) {
  Machine& m = now();
  Thread& t = *m.threads[static_cast<size_t>(m.running)];
  while (static_cast<int>(t.groups.size()) > pending) {
    for (const Copy& copy : t.groups.front()) {
      m.watch.landed(m.running, copy.shared, static_cast<size_t>(copy.bytes));
      if (!m.early) land(copy);
    }
    t.groups.erase(t.groups.begin());
  }
}

}  // namespace gingham::shim
