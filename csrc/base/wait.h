// A word in shared memory that one rank advances and others wait for. More ranks than cores is normal: waits spin briefly, yield a
// few times, then sleep in a futex. Advance and register-as-waiter are sequentially consistent on both sides, so no wake is lost.
#pragma once
#include <atomic>
#include <cstdint>

namespace gingham {

struct alignas(64) Word {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> waiters{0};

  uint32_t load() const { return value.load(std::memory_order_acquire); }
  void store(uint32_t next);
  void add(uint32_t step);
  // Sleeps until the value differs from `seen` or the time is over; may return early.
  void sleep(uint32_t seen, int milliseconds);

 private:
  void wake();
};

// a >= b for counters that wrap.
inline bool reached(uint32_t a, uint32_t b) { return static_cast<int32_t>(a - b) >= 0; }

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

double now();  // seconds, CLOCK_MONOTONIC: the same clock for all processes of a host

}  // namespace gingham
