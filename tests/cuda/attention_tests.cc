// Attention's block kernels on the device, against float64: a head's queries and keys in several runs of a sequence, as a zigzag order leaves
// them, whose sums go on from call to call.
#include <algorithm>
#include <cmath>

#include "kernel_tests.h"
#include "kernels/attention.h"
#include "kernels/cast.h"
#include "shim.h"

namespace gingham::tests {
namespace {

const DType kReal[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

enum class Masked { no, bytes, added };

struct Config {
  int64_t batch, heads, kv_heads, width, queries, keys;
  bool causal = false;
  Masked masked = Masked::no;
  double p = 0;
  Layout layout{};
};

// Queries stand at both ends of the sequence; the last keys come before those of the middle.
std::vector<Run> query_runs(const Config& c) {
  const int64_t first = c.queries - c.queries / 2, rest = c.queries - first;
  return {{0, first, 0, 0}, {first, rest, c.keys - rest, 0}};
}
std::vector<Run> key_runs(const Config& c) {
  const int64_t third = c.keys / 3, rest = c.keys - 2 * third;
  return {{0, third, 0, 0}, {third, rest, 2 * third, third}, {third + rest, third, third, third + rest}};
}

// Element (row, column) of head `line`.
double number(const Matrix& m, int64_t row, int64_t line, int64_t width, int64_t j) { return load(m, row, line * width + j); }

struct Expected {
  std::vector<double> out, lse, dq, dk, dv;
};

struct Operands {
  Config c;
  Attention a;
  Buffer q, k, v, dout, mask;
  Operands(const Config& config, DType dtype, std::mt19937& random) : c(config) {
    const int64_t wide = c.batch * c.heads * c.width, narrow = c.batch * c.kv_heads * c.width;
    q = Buffer(c.queries, wide, dtype, c.layout, random);
    k = Buffer(c.keys, narrow, dtype, c.layout, random);
    v = Buffer(c.keys, narrow, dtype, c.layout, random);
    dout = Buffer(c.queries, wide, dtype, c.layout, random);
    for (int64_t i = 0; i < c.queries; i++)
      for (int64_t j = 0; j < wide; j++) store(q.view(), i, j, 3 * load(q.view(), i, j));
    a.batch = c.batch;
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.width = c.width;
    a.scale = 1.3 / std::sqrt(static_cast<double>(c.width));
    a.causal = c.causal;
    a.dropout = {3, 5, 7, c.p};
    a.first_batch = 1;
    a.first_head = 2;
    a.all_heads = c.heads + 3;
    a.time = c.keys;
    if (c.masked != Masked::no) add_mask(accumulator(dtype), random);
  }

  // Bytes: by head, query and key, the same for all samples; added numbers: by sample and query and key. One query sees nothing.
  void add_mask(DType wide, std::mt19937& random) {
    const bool bytes = c.masked == Masked::bytes;
    const int64_t lines = bytes ? c.heads : c.batch, blind = c.queries / 2;
    mask = Buffer(lines * c.queries, c.keys, bytes ? DType::bytes1 : wide, {false, 3, 1}, random);
    for (int64_t line = 0; line < lines; line++)
      for (int64_t i = 0; i < c.queries; i++)
        for (int64_t j = 0; j < c.keys; j++) {
          const double value = i == blind ? 1 : load(mask.view(), line * c.queries + i, j);
          const bool seen = i != blind && (bytes ? static_cast<int>(value) % 3 != 0 : value > -0.8);
          store(mask.view(), line * c.queries + i, j, bytes ? (seen ? 0.01 : 0) : (seen ? value : -INFINITY));
        }
    a.mask = mask.view().data;
    a.mask_dtype = mask.view().dtype;
    const int64_t pitch = mask.view().row_stride, each = c.queries * pitch;
    const int64_t strides[4] = {bytes ? 0 : each, bytes ? each : 0, pitch, 1};
    std::copy_n(strides, 4, a.mask_strides);
  }

  // What is added to a score; -inf where it is not seen.
  double bias(int64_t b, int64_t h, int64_t i, int64_t query, int64_t column, int64_t key) const {
    if (c.causal && key > query) return -INFINITY;
    if (c.masked == Masked::no) return 0;
    const double value = load(mask.view(), (c.masked == Masked::bytes ? h : b) * c.queries + i, column);
    return c.masked == Masked::added ? value : (value != 0 ? 0 : -INFINITY);
  }
  double factor(int64_t b, int64_t h, int64_t query, int64_t key) const {
    double out = 1;
    const int64_t line = (a.first_batch + b) * a.all_heads + a.first_head + h;
    if (c.p > 0) keep_run(&out, static_cast<uint64_t>((line * a.time + query) * a.time + key), 1, a.dropout);
    return out;
  }
};

// One query of one head.
void expect_query(const Operands& x, int64_t b, int64_t h, int64_t i, int64_t query, const std::vector<int64_t>& positions, Expected& want) {
  const Config& c = x.c;
  const int64_t line = b * c.heads + h, shared = b * c.kv_heads + h / (c.heads / c.kv_heads);
  std::vector<double> p(positions.size()), dp(positions.size());
  double top = -INFINITY, sum = 0, delta = 0;
  for (size_t j = 0; j < p.size(); j++) {
    const int64_t row = static_cast<int64_t>(j);
    for (int64_t w = 0; w < c.width; w++) {
      p[j] += number(x.q.view(), i, line, c.width, w) * number(x.k.view(), row, shared, c.width, w) * x.a.scale;
      dp[j] += number(x.dout.view(), i, line, c.width, w) * number(x.v.view(), row, shared, c.width, w);
    }
    p[j] += x.bias(b, h, i, query, row, positions[j]);
    top = std::max(top, p[j]);
  }
  for (double& each : p) sum += each = top == -INFINITY ? 0 : std::exp(each - top);
  want.lse[static_cast<size_t>(line * c.queries + i)] = sum > 0 ? top + std::log(sum) : -INFINITY;
  for (size_t j = 0; j < p.size(); j++) {
    const double factor = x.factor(b, h, query, positions[j]);
    p[j] = sum > 0 ? p[j] / sum : 0;
    dp[j] *= factor;
    delta += p[j] * dp[j];
    for (int64_t w = 0; w < c.width; w++) {
      const double dout = number(x.dout.view(), i, line, c.width, w);
      want.out[static_cast<size_t>((i * c.batch * c.heads + line) * c.width + w)] +=
          p[j] * factor * number(x.v.view(), static_cast<int64_t>(j), shared, c.width, w);
      want.dv[(j * static_cast<size_t>(c.batch * c.kv_heads) + static_cast<size_t>(shared)) * static_cast<size_t>(c.width) +
              static_cast<size_t>(w)] += p[j] * factor * dout;
    }
  }
  for (size_t j = 0; j < p.size(); j++)
    for (int64_t w = 0; w < c.width; w++) {
      const double ds = p[j] * (dp[j] - delta) * x.a.scale;
      want.dq[static_cast<size_t>((i * c.batch * c.heads + line) * c.width + w)] +=
          ds * number(x.k.view(), static_cast<int64_t>(j), shared, c.width, w);
      want.dk[(j * static_cast<size_t>(c.batch * c.kv_heads) + static_cast<size_t>(shared)) * static_cast<size_t>(c.width) +
              static_cast<size_t>(w)] += ds * number(x.q.view(), i, line, c.width, w);
    }
}

Expected expected(const Operands& x, const Buffer& dq, const Buffer& dk, const Buffer& dv) {
  const Config& c = x.c;
  Expected want;
  want.out.resize(static_cast<size_t>(c.queries * c.batch * c.heads * c.width));
  want.lse.resize(static_cast<size_t>(c.queries * c.batch * c.heads));
  want.dq = dq.values();
  want.dk = dk.values();
  want.dv = dv.values();
  std::vector<int64_t> positions(static_cast<size_t>(c.keys));
  for (const Run& run : key_runs(c))
    for (int64_t j = 0; j < run.count; j++) positions[static_cast<size_t>(run.row + j)] = run.position + j;
  for (const Run& run : query_runs(c))
    for (int64_t i = 0; i < run.count; i++)
      for (int64_t b = 0; b < c.batch; b++)
        for (int64_t h = 0; h < c.heads; h++) expect_query(x, b, h, run.row + i, run.position + i, positions, want);
  return want;
}

// -inf in the same places, and the error of the rest.
double error_of_lse(std::vector<double> got, std::vector<double> want) {
  for (size_t i = 0; i < want.size(); i++) {
    if (want[i] != -INFINITY) continue;
    if (got[i] == -INFINITY) got[i] = want[i] = 0;
  }
  return error_of(got, want);
}

void attend(const Config& c, DType dtype, const Stream& stream, const std::string& where) {
  std::mt19937 random(11);
  const Operands x(c, dtype, random);
  const DType wide = accumulator(dtype);
  const int64_t lines = c.batch * c.heads, all = lines * c.width, narrow = c.batch * c.kv_heads * c.width;
  const Layout rows{false, c.layout.pad, c.layout.offset};
  const Buffer out(c.queries, all, wide, rows, random), lse(lines, c.queries, wide, rows, random), sum = lse.copy(), delta = lse.copy();
  const Buffer dq(c.queries, all, wide, c.layout, random), dk(c.keys, narrow, wide, c.layout, random), dv = dk.copy();
  const Buffer out_before = out.copy(), dq_before = dq.copy(), dk_before = dk.copy();
  const Expected want = expected(x, dq, dk, dv);

  const AttentionSums sums{out.view(), lse.view(), sum.view()};
  attention_begin(sums, stream);
  for (const Run& keys : key_runs(c))
    for (const Run& queries : query_runs(c)) attention_forward(x.a, x.q.view(), queries, x.k.view(), x.v.view(), keys, sums, stream);
  attention_finish(x.a, sums, stream);
  const Buffer narrowed(c.queries, all, dtype, {}, random);
  cast(out.view(), narrowed.view(), HostStream());
  attention_delta(x.a, x.dout.view(), narrowed.view(), delta.view(), stream);
  for (const Run& keys : key_runs(c))
    for (const Run& queries : query_runs(c))
      attention_backward(x.a, x.q.view(), queries, x.k.view(), x.v.view(), keys, x.dout.view(), lse.view(), delta.view(),
                         {dq.view(), dk.view(), dv.view()}, stream);

  const double bounds[] = {2e-6, 2e-14, 4e-3, 5e-4}, bound = bounds[static_cast<int>(dtype)];
  const std::string shape = shape_of({c.queries, c.keys, c.heads, c.kv_heads, c.width}), type = name_of(dtype), name = "attention" + where + " ";
  report(name + "out", type, shape, error_of(out.values(), want.out), bound);
  report(name + "lse", type, shape, error_of_lse(lse.values(), want.lse), dtype == DType::f64 ? 1e-14 : 1e-6);
  report(name + "dq", type, shape, error_of(dq.values(), want.dq), bound);
  report(name + "dk", type, shape, error_of(dk.values(), want.dk), bound);
  report(name + "dv", type, shape, error_of(dv.values(), want.dv), bound);
  expect(out.same_padding(out_before) && dq.same_padding(dq_before) && dk.same_padding(dk_before), "attention wrote beside its output");
}

void on_both(const Config& c, DType dtype) {
  for_every_timing([&] { attend(c, dtype, DeviceStream(), ""); });
  attend(c, dtype, HostStream(), " (cpu)");
}

// Heads that are aligned and not, several tiles and tiles that are cut, rows that see nothing, every width of kernel.
template <DType dtype>
void quick() {
  const bool both = dtype == DType::f32 || dtype == DType::bf16;  // their twins run the same code
  if (both || full()) on_both({1, 2, 1, 16, 140, 210, true, Masked::no, 0, {}}, dtype);
  on_both({2, 2, 1, 20, 9, 40, true, Masked::added, 0.3, {false, 8, 8}}, dtype);
  on_both({1, 2, 2, 7, 21, 36, false, Masked::bytes, 0.4, {false, 3, 1}}, dtype);
  if (both || full()) on_both({1, 2, 1, 72, 20, 40, true, Masked::no, 0.2, {}}, dtype);
  if (dtype != DType::f64 && (both || full())) on_both({1, 1, 1, 136, 20, 100, true, Masked::bytes, 0, {}}, dtype);
}

void every_option() {
  if (!full()) return;
  const Layout layouts[] = {{}, {false, 5, 3}, {true, 1, 0}};
  size_t turn = 0;
  for (const DType dtype : kReal)
    for (const int64_t width : {16, 64, 80, 128, 200, 256})
      for (const bool causal : {false, true})
        for (const Masked masked : {Masked::no, Masked::bytes, Masked::added}) {
          if (dtype == DType::f64 && width > 128) continue;
          turn++;  // dropout and the layouts take turns
          on_both({1, 2, width % 3 ? 1 : 2, width, 77, 135, causal, masked, turn % 2 ? 0.3 : 0.0, layouts[turn % 3]}, dtype);
        }
}

const Register all[] = {{"attention float32", quick<DType::f32>},
                        {"attention float64", quick<DType::f64>},
                        {"attention bfloat16", quick<DType::bf16>},
                        {"attention float16", quick<DType::f16>},
                        {"attention every option", every_option}};

}  // namespace
}  // namespace gingham::tests
