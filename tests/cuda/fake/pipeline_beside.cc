// Sums that are queued beside the caller's stream, as those of gradients are (autograd/background.py).
#include "base/cuda_stream.h"
#include "collectives/all_reduce.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "numbers.h"
#include "pipeline.h"

namespace gingham {
namespace {

constexpr int kRanks = 4, kCount = 1003;

struct Rank {
  Job& job;
  Program& program;
  std::unique_ptr<Axis> axis;
  Gpu& gpu() { return *job.gpu(); }

  void sum(const Matrix& x) {
    Call call;
    call.set_name("all_reduce");
    call.n = x.cols;
    program.begin(call);
    all_reduce(*axis, x, job.stream());
  }
};

void fill(Room& room, double value) {
  for (int64_t i = 0; i < kCount; i++) store(room.host(), i, value);
  room.upload();
}

int64_t differing(const Room& room, double expected) {
  room.download();
  int64_t wrong = 0;
  for (int64_t i = 0; i < kCount; i++) wrong += load(room.host(), i) != expected;
  return wrong;
}

// x is written late by the caller, summed beside, read by the caller after join(); y is summed by the caller meanwhile.
Row both(Rank& rank) {
  Job& job = rank.job;
  cudaStream_t mine = nullptr;
  CUDA_CHECK(cudaStreamCreateWithFlags(&mine, cudaStreamNonBlocking));
  rank.gpu().begin(static_cast<void*>(mine));
  Room from(job, 1, kCount, DType::f32), x(job, 1, kCount, DType::f32), y(job, 1, kCount, DType::f32);
  int64_t wrong = 0;
  for (int round = 0; round < 3; round++) {
    fill(from, job.rank() + 1);
    fill(x, -1);
    fill(y, 100);
    sleep_on(mine, 30);
    cast(from.view(), x.view(), job.stream());
    rank.gpu().beside(std::nullopt);
    rank.gpu().begin(static_cast<void*>(mine));  // as every call does
    EXPECT(job.stream().native() != static_cast<void*>(mine), "a call beside went to the caller's stream");
    rank.sum(x.view());
    accumulate(from.view(), x.view(), job.stream());  // x += from: a kernel that no message waits for
    rank.gpu().back();
    EXPECT(job.stream().native() == static_cast<void*>(mine), "the caller's stream was not given back");
    EXPECT(fake_unjoined(mine) > 0, "the caller waits already");
    rank.sum(y.view());
    rank.gpu().join(std::nullopt);
    EXPECT(fake_unjoined(mine) == 0, "what ran beside is not joined");
    accumulate(y.view(), x.view(), job.stream());  // x += y
    wrong += differing(x, 411 + job.rank()) + differing(y, 400);
  }
  return {static_cast<double>(wrong)};
}

// The sum is there while what the caller has queued since goes on.
Row overlapped(Rank& rank) {
  Job& job = rank.job;
  Room x(job, 1, kCount, DType::f32);
  fill(x, 2);
  Event summed;
  const cudaStream_t mine = native(job.stream());
  rank.gpu().beside(std::nullopt);
  sleep_on(mine, 1500);
  rank.sum(x.view());
  summed.record(native(job.stream()));
  rank.gpu().back();
  Event callers;
  callers.record(native(job.stream()));
  const double begun = now();
  while (cudaEventQuery(summed.get()) == cudaErrorNotReady && now() - begun < 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const bool early = cudaEventQuery(summed.get()) == cudaSuccess && cudaEventQuery(callers.get()) == cudaErrorNotReady;
  rank.gpu().join(std::nullopt);
  return {static_cast<double>(differing(x, 8) + !early)};
}

// In a graph: what runs beside is part of the capture, and has come back when it ends.
Row captured(Rank& rank) {
  Job& job = rank.job;
  cudaStream_t mine = nullptr;
  CUDA_CHECK(cudaStreamCreateWithFlags(&mine, cudaStreamNonBlocking));
  rank.gpu().begin(static_cast<void*>(mine));
  Room x(job, 1, kCount, DType::f32);
  const auto once = [&] {
    rank.gpu().beside(std::nullopt);
    rank.sum(x.view());
    rank.gpu().back();
    rank.sum(x.view());
    rank.gpu().join(std::nullopt);
  };
  fill(x, 1);
  once();
  int64_t wrong = differing(x, 16);
  CUDA_CHECK(cudaStreamBeginCapture(mine, cudaStreamCaptureModeThreadLocal));
  once();
  cudaGraph_t graph = nullptr;
  CUDA_CHECK(cudaStreamEndCapture(mine, &graph));
  CUDA_CHECK(cudaGraphDestroy(graph));
  fill(x, 1);
  once();  // eagerly again
  return {static_cast<double>(wrong + differing(x, 16))};
}

// The second send of rank 0 is refused, in a sum beside: the caller waits for the first, and what was not queued, whose memory the call has
// given back, must not leave with the next messages.
Row refused(Rank& rank) {
  Room x(rank.job, 1, kCount, DType::f32);
  bool told = false;
  rank.gpu().beside(std::nullopt);
  try {
    rank.sum(x.view());
  } catch (const Error&) {
    told = true;
    rank.gpu().break_off();  // as a call of the binding does on its way out
  }
  rank.gpu().back();
  const bool joined = fake_unjoined(rank.job.stream().native()) == 0;
  Ring& ring = rank.axis->ring();
  const uint64_t queued = ring.queued(0);
  ring.group_start();
  ring.group_end();
  rank.gpu().join(std::nullopt);  // of ranks that saw no error
  const bool right = told && joined && ring.queued(0) == queued;
  return {static_cast<double>(rank.job.rank() == 0 && !right)};
}

void expect_none_wrong(Row (*body)(Rank&)) {
  const auto rows = run_ranks(kRanks, As::processes, [&](Job& job, Program& program) {
    Options o = options(Carrier::nccl, {1, 1, 1});
    enter(job, o);
    Rank rank{job, program, job.axis(program, 0, {0, 1, 2, 3}, false)};
    return body(rank);
  });
  for (const Row& row : rows) EXPECT(row[0] == 0, row[0], " wrong");
}

}  // namespace

void sums_beside_the_caller() {
  const With jitter("FAKE_CUDA_JITTER", "200");
  expect_none_wrong(both);
}

void sums_beside_are_captured() { expect_none_wrong(captured); }

void what_an_error_left_is_not_sent() {
  const With second("FAKE_NCCL_REFUSE", "0,1");
  expect_none_wrong(refused);
}

void sums_beside_run_while_the_caller_does() { expect_none_wrong(overlapped); }

}  // namespace gingham
