#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

extern "C" void gingham_shim_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.globl gingham_shim_switch
.type gingham_shim_switch, @function
gingham_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gingham_shim_switch, .-gingham_shim_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace gingham::shim {
namespace {

constexpr size_t kStack = SHIM_ASAN || SHIM_TSAN ? 256 * 1024 : 64 * 1024;
thread_local Fiber* starting = nullptr;

}  // namespace

Fiber::~Fiber() {
  if (stack_) munmap(stack_, kStack);
#if SHIM_TSAN
  if (tsan_) __tsan_destroy_fiber(tsan_);
#endif
}

void Fiber::start(void (*entry)(void*), void* argument) {
  if (!stack_) {
    stack_ = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack_ == MAP_FAILED) abort();
  }
#if SHIM_ASAN
  __asan_unpoison_memory_region(stack_, kStack);
#endif
#if SHIM_TSAN
  if (!tsan_) tsan_ = __tsan_create_fiber(0);
#endif
  entry_ = entry;
  argument_ = argument;
  fake_stack_ = nullptr;
  // As gingham_shim_switch leaves a stack: six registers, then where to return to, with the alignment of a call.
  uint64_t* top = reinterpret_cast<uint64_t*>(stack_ + kStack) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(&Fiber::begin);
  for (int i = 0; i < 6; i++) *--top = 0;
  sp_ = top;
}

void Fiber::begin() {
  Fiber* self = starting;
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_bottom_, &self->scheduler_size_);
#endif
  self->entry_(self->argument_);
  abort();
}

void Fiber::resume() {
  starting = this;
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, kStack);
#endif
#if SHIM_TSAN
  tsan_scheduler_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  gingham_shim_switch(&scheduler_sp_, sp_);
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_bottom_, scheduler_size_);
#endif
#if SHIM_TSAN
  __tsan_switch_to_fiber(tsan_scheduler_, __tsan_switch_to_fiber_no_sync);
#endif
  gingham_shim_switch(&sp_, scheduler_sp_);
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_bottom_, &scheduler_size_);
#endif
}

void Fiber::finish() {
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_bottom_, scheduler_size_);
#endif
#if SHIM_TSAN
  __tsan_switch_to_fiber(tsan_scheduler_, __tsan_switch_to_fiber_no_sync);
#endif
  gingham_shim_switch(&sp_, scheduler_sp_);
  abort();
}

}  // namespace gingham::shim
