// Fibers: threads of control on stacks of their own, switched by hand in user space, with what the sanitizers must be told. A switch orders
// nothing between fibers in ThreadSanitizer's eyes: only the meetings of shim.cc do, so that it sees CUDA threads race.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__) || defined(GINGHAM_SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SHIM_ASAN 1
#else
#define SHIM_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || defined(GINGHAM_SHIM_TSAN)
#include <sanitizer/tsan_interface.h>
#define SHIM_TSAN 1
#else
#define SHIM_TSAN 0
#endif

namespace gingham::shim {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();
  void start(void (*entry)(void*), void* argument);  // on the next resume; entry must end in finish()
  void resume();                                     // from the scheduler: runs until suspend() or finish()
  void suspend();
  [[noreturn]] void finish();

 private:
  static void begin();
  void* sp_ = nullptr;
  void* scheduler_sp_ = nullptr;
  char* stack_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  void* tsan_ = nullptr;
  void* tsan_scheduler_ = nullptr;
};

inline void order_before([[maybe_unused]] void* meeting) {
#if SHIM_TSAN
  __tsan_release(meeting);
#endif
}

inline void order_after([[maybe_unused]] void* meeting) {
#if SHIM_TSAN
  __tsan_acquire(meeting);
#endif
}

}  // namespace gingham::shim
