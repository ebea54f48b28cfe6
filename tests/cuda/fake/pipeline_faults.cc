// What goes wrong beside the step: hangs, refusals and long kernels, as the watch sees them.
#include <sys/mman.h>

#include <atomic>
#include <functional>

#include "pipeline.h"

namespace gingham {

// A group that hangs while the host has queued all and waits for the device, the watch having seen earlier ones end.
void a_late_hang_is_named() {
  const With hang("FAKE_NCCL_HANG", "1,3"), jitter("FAKE_CUDA_JITTER", "200");
  Options o = options(Carrier::nccl, {1, 2, 1});
  o.slices = 8;
  o.warmup = 0;
  o.before = [](Job&) { watched(); };
  const std::string said = failure_of(o, 1.0, [] {});
  EXPECT(said.find("have been on their way for 1 s") != std::string::npos, "it said: ", said);
}

// A host that runs ahead of long kernels: what a group waits for is not the group's time.
void long_kernels_are_no_stall() {
  Options o = options(Carrier::nccl, {1, 2, 1});
  o.rounds = 1;
  o.before = [](Job& job) {
    CUDA_CHECK(fake_enqueue(job.stream().native(), [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(1500)); }, nullptr));
  };
  const std::string said = failure_of(o, 0.7, [] {});
  EXPECT(said.empty(), "it said: ", said);
}

// A call of NCCL's that fails inside of a group leaves none open; the other rank's groups under way do not keep it from its end.
void a_refused_send_closes_its_group() {
  for (const char* which : {"0,0", "0,2"}) {
    const With refused("FAKE_NCCL_REFUSE", which), jitter("FAKE_CUDA_JITTER", "5000");  // messages are under way when the axis ends
    auto* open = static_cast<std::atomic<int>*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    const std::string said = failure_of(options(Carrier::nccl, {1, 2, 1}), 2, [&] { *open += fake_nccl_open_groups(); });
    EXPECT(said.find("a send was refused (injected)") != std::string::npos, "it said: ", said);
    EXPECT(*open == 0, *open, " groups are still open");
    munmap(open, 4096);
  }
}

// The watch finds an error while the rank's thread is inside of a call with the communicator: the fake NCCL ends the process where it is
// aborted there.
void an_abort_waits_for_a_call() {
  const With fails("FAKE_NCCL_FAIL", "0,1"), slow("FAKE_NCCL_SLOW", "0,4");
  Options o = options(Carrier::nccl, {1, 2, 1});
  o.slices = 8;
  const std::string said = failure_of(o, 20, [] {});
  EXPECT(said.find("NCCL reports on rank 0") != std::string::npos, "it said: ", said);
}

// A call that an error leaves while a message hangs: the fake runtime ends a process that uses the memory of one again.
void memory_outlasts_messages() {
  const With hang("FAKE_NCCL_HANG", "0,1");
  for (const char* which : {"0,2", "0,3"}) {
    const With refused("FAKE_NCCL_REFUSE", which);
    Options o = options(Carrier::nccl, {1, 2, 1});
    o.name = "backward";
    o.slices = 4;
    const std::string said = failure_of(o, 1, [] {});
    EXPECT(said.find("a send was refused (injected)") != std::string::npos, "it said: ", said);
  }
}

// Rank 1 computes on device 1 and its thread was on another.
void a_scope_gives_the_device_back() {
  Options o = options(Carrier::nccl, {1, 2, 1});
  o.entered = [](Job& job) {
    int within = -1, behind = -1;
    CUDA_CHECK(cudaSetDevice(3));
    {
      const OnDevice on(*job.gpu());
      CUDA_CHECK(cudaGetDevice(&within));
    }
    CUDA_CHECK(cudaGetDevice(&behind));
    EXPECT(within == job.rank() && behind == 3, "device ", within, " within the scope, ", behind, " behind it");
    job.gpu()->begin(std::nullopt);
  };
  expect_right(o);
}

// More messages than slots, and a receiver that is slower than the sender: a slot is written again only when it has been taken.
void slots_of_copies_are_taken_in_turn() {
  const With slow("FAKE_CUDA_SLOW", "1,20000");
  Options o = options(Carrier::copy, {1, 1, 1});
  o.name = "broadcast";
  o.ranks = 2;
  o.n = 12 << 20;  // 12 pieces of 4 MiB
  o.rounds = 1;
  o.warmup = 0;
  expect_right(o);
}

// Fewer columns than ranks: some have nothing to send.
void some_shares_are_empty() {
  for (Carrier carrier : {Carrier::nccl, Carrier::copy})
    for (const char* name : {"matmul", "dx", "dw", "backward"}) {
      Options o = options(carrier, {1, 4, 1});
      o.name = name;
      o.k = 3;
      expect_right(o);
    }
}

}  // namespace gingham
