// Weights that are gathered before the call that reads them (ops/early.h): right, the bytes of a call without, the same bits, and beside what the
// caller computes.
#include <algorithm>
#include <barrier>
#include <mutex>

#include "base/cuda_stream.h"
#include "pipeline.h"
#include "transport/queued.h"

namespace gingham {
namespace {

Options early(const char* name, std::array<int, 3> grid, int slices, bool swapped, DType dtype = DType::f32) {
  Options o = options(Carrier::nccl, grid);
  o.name = name;
  o.slices = slices;
  o.swapped = swapped;
  o.dtype = dtype;
  o.early = true;
  return o;
}

const std::vector<std::array<int, 3>> kCut{{2, 2, 1}, {3, 2, 1}, {2, 2, 2}, {4, 1, 2}};

void every_early(const std::vector<std::array<int, 3>>& grids, DType dtype) {
  for (const auto& grid : grids)
    for (const char* name : {"matmul", "dx", "backward"})
      for (int slices : {1, 3})
        for (bool swapped : {false, true}) expect_right(early(name, grid, slices, swapped, dtype));
}

std::vector<std::vector<double>> bits_of(Options o) {
  static std::mutex mutex;
  std::vector<std::vector<double>> out(static_cast<size_t>(o.size()));
  o.carrier = Carrier::copy;  // ranks are threads: their results are here
  o.as = As::threads;
  o.fractions = true;
  o.check = false;
  o.see = [&](int rank, const Matrix& m) {
    const std::lock_guard lock(mutex);
    for (int64_t i = 0; i < m.rows; i++)
      for (int64_t j = 0; j < m.cols; j++)
        out[static_cast<size_t>(rank)].push_back(static_cast<const float*>(m.data)[i * m.row_stride + j * m.col_stride]);
  };
  // What a rank sent early it may write to, or free, when its peers have taken it: of device copies its own settle() says nothing (ops/early.h).
  std::barrier<> all_have(o.size());
  o.after = [&](Job& job) {
    job.gpu()->synchronize();
    all_have.arrive_and_wait();
  };
  measure(o);
  return out;
}

}  // namespace

void weights_gathered_early() {
  every_early(kCut, DType::f32);
  every_early({{2, 2, 2}}, DType::bf16);
  const With jitter("FAKE_CUDA_JITTER", "500");
  every_early({{2, 2, 1}, {3, 1, 2}}, DType::f32);
  Options o = early("backward", {2, 2, 1}, 1, false);
  o.delay = [](Job& job) { sleep_on(native(job.stream()), 30); };  // W is written late
  expect_right(o);
}

void early_weights_change_no_bits() {
  for (const auto& grid : {std::array{3, 2, 1}, {4, 1, 2}, {3, 3, 1}})
    for (const char* name : {"matmul", "dx", "backward"})
      for (bool swapped : {false, true}) {
        Options o = early(name, grid, 1, swapped);
        const auto with = bits_of(o);
        o.early = false;
        EXPECT(with == bits_of(o), name, " on ", grid[0], " ", grid[1], " ", grid[2], ": an early W gives other bits");
      }
}

// The messages wait for what the caller had queued when their room was made, not for what it has queued since.
void early_weights_come_while_the_caller_computes() {
  Options o = early("matmul", {2, 1, 1}, 1, false);
  o.rounds = 1;
  o.warmup = 0;
  static double begun = 0;
  o.between = [](Job& job) {
    begun = now();
    sleep_on(native(job.stream()), 1200);
  };
  // What NCCL has received by the time at which the caller's stream still sleeps.
  o.after = [](Job&) {
    while (fake_nccl_received() == 0 && now() - begun < 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT(fake_nccl_received() > 0, "nothing was received while the caller computed");
  };
  expect_right(o);
}

}  // namespace gingham
