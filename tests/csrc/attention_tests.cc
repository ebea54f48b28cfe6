// Attention over a cut sequence: against plain sums in double, the same bits on windows, rings and other hosts, and what a rank refuses.
#include <cmath>
#include <cstring>

#include "ops/attention.h"
#include "virtual_hosts.h"

namespace gingham {
namespace {

constexpr int64_t kTime = 11, kHeads = 2, kWidth = 4;  // one head of keys and values
const std::vector<int64_t> kLengths{4, 3, 3, 1};

float number_at(int64_t i, int seed) { return static_cast<float>((i * 37 + seed * 101) % 29) / 14.f - 1.f; }

// [kTime, heads * kWidth], by place.
std::vector<float> tensor(int64_t heads, int seed) {
  std::vector<float> out;
  for (int64_t i = 0; i < kTime * heads * kWidth; i++) out.push_back(number_at(i, seed));
  return out;
}

// The same, one query and head at a time.
std::vector<double> expected_out(bool causal) {
  const std::vector<float> q = tensor(kHeads, 1), k = tensor(1, 2), v = tensor(1, 3);
  std::vector<double> out(q.size());
  for (int64_t i = 0; i < kTime; i++)
    for (int64_t h = 0; h < kHeads; h++) {
      double sum = 0;
      double* row = &out[static_cast<size_t>((i * kHeads + h) * kWidth)];
      for (int64_t j = 0; j < (causal ? i + 1 : kTime); j++) {
        double score = 0;
        for (int64_t w = 0; w < kWidth; w++) score += q[static_cast<size_t>((i * kHeads + h) * kWidth + w)] * k[static_cast<size_t>(j * kWidth + w)];
        sum += std::exp(score / 2);
        for (int64_t w = 0; w < kWidth; w++) row[w] += std::exp(score / 2) * v[static_cast<size_t>(j * kWidth + w)];
      }
      for (int64_t w = 0; w < kWidth; w++) row[w] /= sum;
    }
  return out;
}

// This rank's rows of a tensor, in memory that peers may read.
struct Rows {
  Rows(Job& job, int64_t heads, const std::vector<float>* full, const std::vector<Run>& runs, int64_t count)
      : room(job.stream(), static_cast<size_t>(std::max<int64_t>(count, 1) * heads * kWidth) * 4),
        matrix(dense(room.data(), count, heads * kWidth, DType::f32)) {
    for (const Run& run : runs)
      for (int64_t i = 0; full && i < run.count * matrix.cols; i++)
        at(run.row * matrix.cols + i) = (*full)[static_cast<size_t>(run.position * matrix.cols + i)];
  }
  float& at(int64_t i) { return static_cast<float*>(matrix.data)[i]; }
  Scratch room;
  Matrix matrix;
};

// Forward and backward on one rank: the results' bytes. wrong: its out must be that of plain sums.
std::string attend(Job& job, Program& program, bool causal, bool zigzag, bool window, int64_t heads_of_keys = 1) {
  const auto axis = job.axis(program, 0, everyone(kRanks), window);
  const int place = axis->rank();
  const std::vector<Run> runs = runs_of(kLengths, place, zigzag);
  const int64_t count = kLengths[static_cast<size_t>(place)];
  const std::vector<float> q_all = tensor(kHeads, 1), k_all = tensor(1, 2), v_all = tensor(1, 3), g_all = tensor(kHeads, 4);
  Rows q(job, kHeads, &q_all, runs, count), k(job, 1, &k_all, runs, count), v(job, 1, &v_all, runs, count), g(job, kHeads, &g_all, runs, count);
  std::vector<Scratch> made;
  AttentionCall call;
  call.block.heads = kHeads;
  call.block.kv_heads = heads_of_keys;
  call.block.width = kWidth;
  call.block.scale = 0.5;
  call.block.causal = causal;
  call.lengths = kLengths;
  call.place = place;
  call.zigzag = zigzag;
  call.allocate = [&](int64_t rows, int64_t cols, bool) {
    made.emplace_back(job.stream(), static_cast<size_t>(rows * cols) * 4);
    return dense(made.back().data(), rows, cols, DType::f32);
  };
  call.allocate_lse = [&](int64_t rows, int64_t cols) { return call.allocate(rows, cols, true); };
  RingAttention attention(program, axis.get(), job.stream(), call);
  const RingAttention::Result result = attention.forward(q.matrix, k.matrix, v.matrix);
  const std::vector<double> expected = expected_out(causal);
  for (const Run& run : runs)
    for (int64_t i = 0; i < run.count * q.matrix.cols; i++) {
      const double want = expected[static_cast<size_t>(run.position * q.matrix.cols + i)];
      EXPECT(std::abs(static_cast<float*>(result.out.data)[run.row * q.matrix.cols + i] - want) < 1e-6);
    }
  const RingAttention::Gradients gradients = attention.backward(q.matrix, k.matrix, v.matrix, g.matrix, result);
  std::string bytes;
  for (const Matrix& m : {result.out, result.lse, gradients.dq, gradients.dk, gradients.dv}) bytes.append(static_cast<char*>(m.data), m.bytes());
  return bytes;
}

std::vector<std::string> on_hosts(const Layout& hosts, Via via, bool causal, bool zigzag, bool window) {
  std::vector<std::string> results(kRanks);
  rows_on_hosts(hosts, via, [&](Job& job, Program& program) -> Row {
    results[static_cast<size_t>(job.rank())] = attend(job, program, causal, zigzag, window);
    return {};
  });
  return results;
}

void attention_has_the_same_bits_everywhere() {
  for (const bool causal : {false, true})
    for (const bool zigzag : {false, true}) {
      const std::vector<std::string> expected = on_hosts(kOne, Via::queues, causal, zigzag, true);
      EXPECT(on_hosts(kOne, Via::queues, causal, zigzag, false) == expected);
      for (const Layout& hosts : kLayouts)
        for (const Via via : {Via::queues, Via::handed}) EXPECT(on_hosts(hosts, via, causal, zigzag, true) == expected);
    }
}

void attention_refused_by_one_is_told_to_all() {
  for (const Layout& hosts : {kOne, kLayouts[0]})
    for (const Ending& ending : run_on_hosts(hosts, Via::queues, [](Job& job, Program& program) -> Row {
           attend(job, program, true, false, true, job.rank() == 2 ? 3 : 1);
           return {};
         }))
      EXPECT(ending.kind == "ShapeError" && has(ending.text, "rank 2") && has(ending.text, "must divide them"));
}

}  // namespace

std::vector<Test> attention_tests() {
  return {{"attention has the same bits everywhere", attention_has_the_same_bits_everywhere},
          {"attention refused by one is told to all", attention_refused_by_one_is_told_to_all}};
}

}  // namespace gingham
