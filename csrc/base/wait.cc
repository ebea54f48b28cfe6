#include "base/wait.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace gingham {

void Word::wake() {
  if (waiters.load(std::memory_order_seq_cst) != 0) syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Word::store(uint32_t next) {
  value.store(next, std::memory_order_seq_cst);
  wake();
}

void Word::add(uint32_t step) {
  value.fetch_add(step, std::memory_order_seq_cst);
  wake();
}

void Word::sleep(uint32_t seen, int milliseconds) {
  waiters.fetch_add(1, std::memory_order_seq_cst);
  if (value.load(std::memory_order_seq_cst) == seen) {
    timespec limit{milliseconds / 1000, (milliseconds % 1000) * 1000000L};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAIT, seen, &limit, nullptr, 0);
  }
  waiters.fetch_sub(1, std::memory_order_seq_cst);
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace gingham
