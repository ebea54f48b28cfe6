// The kernels of one device alone, on one rank: every kernel on the device beside its CPU twin on the same numbers: the largest difference, in units
// of the twin's largest value.
#include <stdio.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "cases.h"
#include "kernels/accumulate.h"
#include "kernels/attention.h"
#include "kernels/cast.h"
#include "kernels/dropout.h"
#include "kernels/epilogue.h"
#include "kernels/gemm.h"
#include "numbers.h"

namespace gingham {
namespace {

// max |device - twin| / max |twin|, with the twin's result in `expected`.
double difference(const Room& got, const Room& expected) {
  got.download();
  double worst = 0, largest = 1e-30;
  for (int64_t i = 0; i < got.host().count(); i++) {
    const double want = load(expected.host(), i), have = load(got.host(), i);
    largest = std::max(largest, std::abs(want));
    const double off = std::abs(want - have);
    worst = std::isnan(off) ? HUGE_VAL : std::max(worst, off);
  }
  return worst / largest;
}

struct Check {
  std::string name;
  double bound;
  std::function<double()> run;
};

// Causal attention with dropout of the last 100 of 130 places and its gradients, heads sharing keys and values: the largest of four differences.
double attention_difference(Job& job, DType dtype, int64_t width) {
  constexpr int64_t kQueries = 100, kKeys = 130, kHeads = 4, kKeyHeads = 2;
  const int64_t wide = kHeads * width, narrow = kKeyHeads * width;
  const DType sum = accumulator(dtype);
  Attention a;
  a.heads = a.all_heads = kHeads;
  a.kv_heads = kKeyHeads;
  a.width = width;
  a.scale = 1 / std::sqrt(static_cast<double>(width));
  a.causal = true;
  a.dropout = {1, 2, 3, 0.1};
  a.time = kKeys;
  const Run queries{0, kQueries, kKeys - kQueries, 0}, keys{0, kKeys, 0, 0};
  const Room q = filled(job, kQueries, wide, dtype, 1), k = filled(job, kKeys, narrow, dtype, 2), v = filled(job, kKeys, narrow, dtype, 3),
             dout = filled(job, kQueries, wide, dtype, 4);
  const auto run = [&](bool device, const Room& out, const Room& lse, const Room& dq, const Room& dk, const Room& dv) {
    const Stream& stream = device ? job.stream() : job.host_stream();
    const auto at = [device](const Room& room) { return device ? room.view() : room.host(); };
    const Room total(job, kHeads, kQueries, sum), delta(job, kHeads, kQueries, sum), narrowed(job, kQueries, wide, dtype);
    const AttentionSums sums{at(out), at(lse), at(total)};
    attention_begin(sums, stream);
    attention_forward(a, at(q), queries, at(k), at(v), keys, sums, stream);
    attention_finish(a, sums, stream);
    cast(at(out), at(narrowed), stream);
    attention_delta(a, at(dout), at(narrowed), at(delta), stream);
    for (const Room* each : {&dq, &dk, &dv}) fill_zero(at(*each), stream);
    attention_backward(a, at(q), queries, at(k), at(v), keys, at(dout), at(lse), at(delta), {at(dq), at(dk), at(dv)}, stream);
  };
  const auto results = [&] {
    std::vector<Room> out;
    for (const auto& [rows, cols] : {std::pair{kQueries, wide}, {kHeads, kQueries}, {kQueries, wide}, {kKeys, narrow}, {kKeys, narrow}})
      out.emplace_back(job, rows, cols, sum);
    return out;
  };
  const std::vector<Room> got = results(), twin = results();
  run(true, got[0], got[1], got[2], got[3], got[4]);
  run(false, twin[0], twin[1], twin[2], twin[3], twin[4]);
  double worst = 0;
  for (size_t i = 0; i < got.size(); i++) worst = std::max(worst, difference(got[i], twin[i]));
  return worst;
}

std::vector<Check> checks_of(Job& job) {
  const int64_t rows = 131, cols = 197;
  const auto pair = [&job, rows, cols](DType from, DType to, auto kernel) {
    const Room a = filled(job, rows, cols, from, 3);
    const Room device = filled(job, rows, cols, to, 4), twin = filled(job, rows, cols, to, 4);
    kernel(a.view(), device.view(), job.stream());
    kernel(a.host(), twin.host(), job.host_stream());
    return difference(device, twin);
  };
  const auto plain_cast = [](const Matrix& a, const Matrix& b, const Stream& s) { cast(a, b, s); };
  const auto drop = [rows, cols](const Matrix& a, const Matrix& b, const Stream& s) {
    dropout(a.data, b.data, a.dtype, {rows, cols}, {2 * rows, 2 * cols}, {rows, 3}, {1, 2, 3, 0.3}, s);
  };
  std::vector<Check> out{
      {"cast f32 bf16", 0, [=] { return pair(DType::f32, DType::bf16, plain_cast); }},
      {"cast f16 f32", 0, [=] { return pair(DType::f16, DType::f32, plain_cast); }},
      {"accumulate f32", 0, [=] { return pair(DType::f32, DType::f32, [](auto& a, auto& b, auto& s) { accumulate(a, b, s); }); }},
      {"accumulate f64", 0, [=] { return pair(DType::f64, DType::f64, [](auto& a, auto& b, auto& s) { accumulate(a, b, s); }); }},
      {"dropout f32", 0, [=] { return pair(DType::f32, DType::f32, drop); }},
      {"dropout bf16", 0, [=] { return pair(DType::bf16, DType::bf16, drop); }},
      {"column_sums f32", 1e-5,
       [=] { return pair(DType::f32, DType::f32, [](auto& a, auto& b, auto& s) { column_sums(a, b.slice(0, 0, 1), false, s); }); }},
      {"gelu f32", 1e-5, [=] { return pair(DType::f32, DType::f32, [](auto& a, auto& b, auto& s) { epilogue(a, {}, b, b, Epilogue::gelu, s); }); }},
      {"gelu gradient f32", 1e-5, [=] { return pair(DType::f32, DType::f32, [](auto& a, auto& b, auto& s) { gelu_backward(a, a, b, s); }); }}};
  const double bounds[] = {1e-5, 1e-13, 6e-3, 1e-3};  // p and ds are rounded to 16 bits on the device
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (int64_t width : {20, 64, 128, 256})
      if (width <= widest_head(dtype, job.stream()))
        out.push_back({concat("attention ", name_of(dtype), " ", width), bounds[static_cast<int>(dtype)],
                       [=, &job] { return attention_difference(job, dtype, width); }});
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (bool left : {false, true})
      for (bool right : {false, true})
        out.push_back({"gemm", dtype == DType::f64 ? 1e-13 : 1e-5, [=, &job] {
                         const Room a = filled(job, left ? 90 : 136, left ? 136 : 90, dtype, 5);
                         const Room b = filled(job, right ? 128 : 90, right ? 90 : 128, dtype, 6);
                         const Room device(job, 136, 128, accumulator(dtype)), twin(job, 136, 128, accumulator(dtype));
                         const auto product = [&](const Matrix& x, const Matrix& y, const Matrix& c, const Stream& s) {
                           gemm(left ? x.t() : x, right ? y.t() : y, c, false, s);
                         };
                         product(a.view(), b.view(), device.view(), job.stream());
                         product(a.host(), b.host(), twin.host(), job.host_stream());
                         return difference(device, twin);
                       }});
  return out;
}

Row run_kernels(Job& job, const Options& o) {
  enter(job, o);
  double wrong = 0;
  for (const Check& check : checks_of(job)) {
    const double off = check.run();
    printf("#   %-24s largest difference %.2e of %.2e allowed%s\n", check.name.c_str(), off, check.bound, off <= check.bound ? "" : "   WRONG");
    wrong += off > check.bound;
  }
  fflush(stdout);
  return {1, 0, 0, wrong};
}

}  // namespace

Measured run_kernel(const Options& o) {
  const std::vector<Row> rows = run_ranks(1, o.as, [&](Job& job, Program&) { return o.name == "gemm" ? run_gemm(job, o) : run_kernels(job, o); });
  Measured out = over_ranks(rows);
  out.flops = o.name == "gemm" ? 2.0 * static_cast<double>(o.m) * static_cast<double>(o.k) * static_cast<double>(o.n) : 0;
  return out;
}

}  // namespace gingham
