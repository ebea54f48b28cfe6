// Messages by copy engines: windows that ranks open for each other, flags, rounds.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#include "kernels/cast.h"
#include "numbers.h"
#include "pipeline.h"

namespace gingham {
namespace {

// Slots of 256 bytes, so that most messages go in several pieces, and some in more than a channel has slots.
class Engined {
 public:
  Engined() : asked_("GINGHAM_COPY_ENGINES", "1"), small_("GINGHAM_COPY_BYTES", "1") {}

 private:
  With asked_, small_;
};

// The case's axes go by copy engines, and NCCL carries nothing.
Options by_engines(Options o) {
  o.after = [](Job& job) {
    job.gpu()->synchronize();
    EXPECT(fake_nccl_received() == 0, "NCCL moved ", fake_nccl_received(), " bytes");
  };
  return o;
}

void every_step(const std::vector<std::array<int, 3>>& grids, DType dtype = DType::f32) {
  for (const auto& grid : grids)
    for (const char* name : kCases)
      for (int slices : {1, 3}) {
        Options o = by_engines(options(Carrier::nccl, grid));
        o.name = name;
        o.dtype = dtype;
        o.slices = slices;
        expect_right(o);
      }
}

void every_collective_by_engines(int64_t n) {
  for (int ranks : {2, 4})
    for (const char* name : kCollectives) {
      Options o = by_engines(options(Carrier::nccl, {1, 1, 1}));
      o.name = name;
      o.ranks = ranks;
      o.n = n;
      expect_right(o);
    }
}

// Each rank sends to those above it, in one piece or in many, and writes over what it sent behind the group: the number of values that came wrong.
// The first receives nothing that its group could wait for instead.
Row written_over(Job& job, Program& program) {
  enter(job, options(Carrier::nccl, {1, 1, 1}));
  const auto axis = job.axis(program, 0, {0, 1, 2}, false);
  const int rank = axis->rank();
  const int64_t rounds = 12;
  int64_t wrong = 0;
  for (const int64_t count : {3, 1000}) {
    Room right(job, 1, count, DType::f32), other(job, 1, count, DType::f32), x(job, 1, count, DType::f32), came(job, 2 * rounds, count, DType::f32);
    for (int64_t i = 0; i < count; i++) store(right.host(), i, rank + 1), store(other.host(), i, 100);
    right.upload();
    other.upload();
    for (int64_t round = 0; round < rounds; round++) {
      Call call;
      call.set_name("broadcast");
      program.begin(call);
      Session session(*axis);
      cast(right.view(), x.view(), job.stream());
      Ring& ring = axis->ring();
      const size_t bytes = static_cast<size_t>(count) * sizeof(float);
      ring.group_start();
      for (int peer = rank + 1; peer < axis->size(); peer++) ring.send(peer, x.view().data, bytes);
      for (int peer = 0; peer < rank; peer++) ring.recv(peer, static_cast<float*>(came.view().data) + (2 * round + peer) * count, bytes);
      ring.group_end();
      for (int peer = rank + 1; peer < axis->size(); peer++) ring.drain(peer);
      cast(other.view(), x.view(), job.stream());
      ring.arrived(0);
      session.end();
    }
    came.download();
    for (int64_t i = 0; i < 2 * rounds * count; i++) {
      const int64_t peer = i / count % 2;
      wrong += peer < rank && load(came.host(), i) != static_cast<double>(peer + 1);
    }
  }
  return {static_cast<double>(wrong)};
}

}  // namespace

void what_copy_engines_sent_is_written_over() {
  const Engined engined;
  for (const char* jitter : {"0", "500", "3000"}) {
    const With jittered("FAKE_CUDA_JITTER", jitter);
    for (const Row& row : run_ranks(3, As::processes, written_over)) EXPECT(row[0] == 0, row[0], " values came wrong");
  }
}

void messages_by_copy_engines() {
  const Engined engined;
  for (const char* jitter : {"0", "300"}) {
    const With jittered("FAKE_CUDA_JITTER", jitter);
    every_step({{2, 2, 1}, {2, 2, 2}, {1, 4, 1}, {4, 1, 2}});
    every_step({{2, 2, 2}}, DType::bf16);
    for (int64_t n : {1, 5000}) every_collective_by_engines(n);
    const With pieces("GINGHAM_CHUNK_BYTES", "64");
    every_collective_by_engines(777);
    for (int ranks : {2, 3, 4}) expect_right(by_engines(ring_of(Carrier::nccl, ranks, 37, DType::bf16)));
  }
}

// Streams that share a queue of the device do their work in the order in which the host queued it.
void copy_engines_behind_each_other() {
  const Engined engined;
  for (const char* queues : {"1", "2", "5"}) {
    const With shared("FAKE_CUDA_QUEUES", queues), jitter("FAKE_CUDA_JITTER", "200");
    every_step({{2, 2, 2}});
    every_collective_by_engines(5000);
    expect_right(by_engines(ring_of(Carrier::nccl, 4, 37)));
  }
}

// A graph's branches may run one after the other in any order that its edges allow, another one on each rank.
void copy_engines_in_a_graph() {
  const Engined engined;
  for (const char* seed : {"", "1", "2", "3"}) {
    const With order("FAKE_CUDA_GRAPHS", *seed ? seed : nullptr);
    for (int slices : {1, 3})
      for (const char* name : {"matmul", "backward"}) {
        Options o = options(Carrier::nccl, {2, 2, 2});
        o.name = name;
        o.slices = slices;
        expect_captured(o, cudaStreamCaptureModeGlobal);
      }
    for (const char* name : kCollectives) {
      Options o = options(Carrier::nccl, {1, 1, 1});
      o.name = name;
      o.ranks = 4;
      for (const int64_t n : {1, 5000}) {  // one message, one round: only one of the streams on which messages leave has work
        o.n = n;
        expect_captured(o, cudaStreamCaptureModeGlobal);
      }
    }
    expect_captured(ring_of(Carrier::nccl, 4, 37), cudaStreamCaptureModeThreadLocal);
  }
}

// A flag that never comes, behind those of the start-up check: the watch says so, and all ranks' streams go on.
void what_copy_engines_wait_for_is_let_go() {
  const Engined engined;
  struct Case {
    const char* lost;
    std::array<int, 3> grid;
  };
  for (const auto& [lost, grid] : {Case{"1,4", {1, 2, 1}}, Case{"0,5", {1, 2, 1}}, Case{"2,7", {2, 2, 1}}}) {
    Options o = options(Carrier::nccl, grid);
    o.name = "backward";
    o.slices = 8;
    o.before = [&](Job&) { set("FAKE_CUDA_LOSE", lost); };  // each rank is a process
    auto* left = static_cast<std::atomic<int>*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    const std::string said = failure_of(o, 1.0, [&] { ++*left; });
    EXPECT(said.find("have been on their way for 1 s") != std::string::npos, "it said: ", said);
    EXPECT(*left == o.size(), *left, " ranks were told");
    munmap(left, 4096);
  }
}

// A rank dies when its peer has launched a captured step, which no watch can see.
void a_replay_is_let_go() {
  const Engined engined;
  auto* told = static_cast<std::atomic<int>*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  Options o = options(Carrier::nccl, {1, 2, 1});
  o.slices = 8;
  int round = 0;
  o.before = [&](Job& job) {
    if (round++ == 1) CUDA_CHECK(cudaStreamBeginCapture(native(job.stream()), cudaStreamCaptureModeThreadLocal));
  };
  o.after = [&](Job& job) {
    if (round != 2) return;
    if (job.rank() == 1) kill(getpid(), SIGKILL);
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamEndCapture(native(job.stream()), &graph));
  };
  const std::string said = failure_of(o, 20, [&] { ++*told; });
  EXPECT(*told == 1 && said.find("rank 1") != std::string::npos, *told, " ranks were told: ", said);
  munmap(told, 4096);
}

// What one rank cannot all leave, for NCCL, and all say whose it is.
void copy_engines_that_cannot() {
  const Engined engined;
  struct Case {
    const char *name, *value, *why;
  };
  for (const Case& each :
       {Case{"FAKE_CUDA_WINDOWS", "none", "rank 1: cudaIpcGetMemHandle"}, Case{"FAKE_CUDA_WINDOWS", "closed", "rank 1: cudaIpcOpenMemHandle"},
        Case{"FAKE_CUDA_WINDOWS", "private", "rank 0: what rank 1 pushed in the start-up check came wrong"},
        Case{"FAKE_CUDA_OLD_DRIVER", "1", "rank 0: this driver has no cuStreamBatchMemOp"},
        Case{"GINGHAM_COPY_BYTES", "64M", "rank 0: GINGHAM_COPY_BYTES=64M, expected a number of bytes"},
        Case{"GINGHAM_COPY_ENGINES", "0", "rank 0: GINGHAM_COPY_ENGINES=0, 1 asks for them"}}) {
    const With cannot(each.name, each.value);
    run_ranks(2, As::processes, [&](Job& job, Program& program) -> Row {
      job.use_gpu(job.rank(), Carrier::nccl);
      const auto axis = job.axis(program, 0, {0, 1});
      EXPECT(axis->carried_by().find(each.why) != std::string::npos, each.name, "=", each.value, ": ", axis->carried_by());
      return {};
    });
    Options o = options(Carrier::nccl, {1, 2, 1});
    o.after = [](Job& job) {
      job.gpu()->synchronize();
      EXPECT(fake_nccl_received() > 0, "NCCL moved nothing");
    };
    expect_right(o);
  }
}

}  // namespace gingham
