// Causal attention of a sequence of m places in zigzag order over a ring of ranks, n heads of k numbers, two of which share keys and values where
// n is even: forward and backward, against plain sums in double.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cases.h"
#include "kernels/cast.h"
#include "ops/attention.h"

namespace gingham {
namespace {

// Of q, k, v or dout (seed 0 to 3), by place in the sequence and column.
float value(int64_t place, int64_t column, int64_t seed) { return static_cast<float>((place * 37 + column * 101 + seed * 211) % 64) / 32.f - 1.f; }

struct Sizes {
  int64_t time, heads, kv_heads, width;
  explicit Sizes(const Options& o) : time(o.m), heads(o.n), kv_heads(o.n % 2 ? o.n : o.n / 2), width(o.k) {}
  int64_t shared() const { return heads / kv_heads; }
};

// Gradients and output of the whole sequence, [time, heads or kv_heads, width].
struct Expected {
  std::vector<double> out, dq, dk, dv;

  explicit Expected(const Sizes& s) : out(size(s.time * s.heads * s.width)), dq(out.size()), dk(size(s.time * s.kv_heads * s.width)), dv(dk.size()) {
    for (int64_t i = 0; i < s.time; i++)
      for (int64_t h = 0; h < s.heads; h++) add(s, i, h);
  }

 private:
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  void add(const Sizes& s, int64_t i, int64_t h) {
    const int64_t wide = h * s.width, narrow = h / s.shared() * s.width;
    const double scale = 1 / std::sqrt(static_cast<double>(s.width));
    std::vector<double> p(size(i + 1)), dp(p.size());
    double sum = 0, delta = 0;
    for (int64_t j = 0; j <= i; j++)
      for (int64_t w = 0; w < s.width; w++) {
        p[size(j)] += scale * value(i, wide + w, 0) * value(j, narrow + w, 1);
        dp[size(j)] += double{value(i, wide + w, 3)} * value(j, narrow + w, 2);
      }
    for (double& each : p) sum += each = std::exp(each);
    for (size_t j = 0; j < p.size(); j++) delta += (p[j] /= sum) * dp[j];
    for (int64_t j = 0; j <= i; j++) {
      const double ds = p[size(j)] * (dp[size(j)] - delta) * scale;
      for (int64_t w = 0; w < s.width; w++) {
        const size_t row = size(i * s.heads * s.width + wide + w), key = size(j * s.kv_heads * s.width + narrow + w);
        out[row] += p[size(j)] * value(j, narrow + w, 2);
        dq[row] += ds * value(j, narrow + w, 1);
        dk[key] += ds * value(i, wide + w, 0);
        dv[key] += p[size(j)] * value(i, wide + w, 3);
      }
    }
  }
};

class RingCase {
 public:
  RingCase(Job& job, Program& program, const Options& o)
      : job_(job),
        program_(program),
        sizes_(o),
        // windows move less where a mask is causal
        axis_(as_asked(job.axis(program, 0, everyone(o.size()), false, o.latency, o.bandwidth), o)) {
    for (int r = 0; r < o.size(); r++) call_.lengths.push_back(o.m / o.size() + (r < o.m % o.size()));
    call_.place = axis_->rank();
    call_.zigzag = true;
    call_.block.heads = sizes_.heads;
    call_.block.kv_heads = sizes_.kv_heads;
    call_.block.width = sizes_.width;
    call_.block.scale = 1 / std::sqrt(static_cast<double>(sizes_.width));
    call_.block.causal = true;
    call_.allocate = [this, o](int64_t rows, int64_t cols, bool accumulated) {
      return make(rows, cols, accumulated ? accumulator(o.dtype) : o.dtype);
    };
    call_.allocate_lse = [this, o](int64_t rows, int64_t cols) { return make(rows, cols, accumulator(o.dtype)); };
    runs_ = runs_of(call_.lengths, call_.place, true);
    for (int64_t seed = 0; seed < 4; seed++) {
      const bool narrow = seed == 1 || seed == 2;
      inputs_.emplace_back(job, rows(), (narrow ? sizes_.kv_heads : sizes_.heads) * sizes_.width, o.dtype);
      fill(inputs_.back(), seed, o.dtype);
    }
  }
  Axis& axis() { return *axis_; }
  void forget() { made_.clear(); }
  void once() {
    RingAttention attention(program_, axis_.get(), job_.stream(), call_);
    const auto at = [this](size_t i) { return inputs_[i].view(); };
    const RingAttention::Result result = attention.forward(at(0), at(1), at(2));
    gradients_ = attention.backward(at(0), at(1), at(2), at(3), result);
    out_ = result.out;
  }
  // How many of out, dq, dk, dv are off.
  double wrong(double bound) const {
    const Expected want(sizes_);
    return off(out_, want.out, bound) + off(gradients_.dq, want.dq, bound) + off(gradients_.dk, want.dk, bound) + off(gradients_.dv, want.dv, bound);
  }

 private:
  static std::vector<int> everyone(int n) {
    std::vector<int> out(static_cast<size_t>(n));
    std::iota(out.begin(), out.end(), 0);
    return out;
  }
  int64_t rows() const { return call_.lengths[static_cast<size_t>(call_.place)]; }
  Matrix make(int64_t rows, int64_t cols, DType dtype) {
    made_.emplace_back(job_.stream(), std::max<size_t>(static_cast<size_t>(rows * cols), 1) * size_of(dtype));
    return dense(made_.back().data(), rows, cols, dtype);
  }
  void fill(Room& room, int64_t seed, DType dtype) {
    const Matrix host = room.host();
    std::vector<double> row(static_cast<size_t>(host.cols));
    for (const Run& run : runs_)
      for (int64_t i = 0; i < run.count; i++) {
        for (int64_t j = 0; j < host.cols; j++) row[static_cast<size_t>(j)] = value(run.position + i, j, seed);
        if (dtype == DType::f64) std::copy(row.begin(), row.end(), static_cast<double*>(host.data) + (run.row + i) * host.cols);
        std::vector<float> narrow(row.begin(), row.end());
        if (dtype != DType::f64) store_row(narrow.data(), host, run.row + i, CpuStream{});
      }
    room.upload();
  }
  double off(const Matrix& got, const std::vector<double>& want, double bound) const {
    std::vector<char> bytes(got.bytes());
    if (job_.gpu() && !bytes.empty())
      job_.gpu()->download(bytes.data(), got.data, bytes.size());
    else
      std::copy_n(static_cast<const char*>(got.data), bytes.size(), bytes.data());
    double worst = 0, largest = 0;
    for (double each : want) largest = std::max(largest, std::abs(each));
    for (const Run& run : runs_)
      for (int64_t i = 0; i < run.count; i++)
        for (int64_t j = 0; j < got.cols; j++) {
          const double off =
              std::abs(at(bytes, got.dtype, (run.row + i) * got.cols + j) - want[static_cast<size_t>((run.position + i) * got.cols + j)]);
          worst = std::isnan(off) ? HUGE_VAL : std::max(worst, off);
        }
    return worst > bound * largest;
  }
  static double at(const std::vector<char>& bytes, DType dtype, int64_t i) {
    const void* data = bytes.data();
    if (dtype == DType::f64) return static_cast<const double*>(data)[i];
    if (dtype == DType::f32) return static_cast<const float*>(data)[i];
    return dtype == DType::bf16 ? widen_bf16(static_cast<const uint16_t*>(data)[i]) : widen_f16(static_cast<const uint16_t*>(data)[i]);
  }

  Job& job_;
  Program& program_;
  Sizes sizes_;
  std::unique_ptr<Axis> axis_;
  AttentionCall call_;
  std::vector<Run> runs_;
  std::vector<Room> inputs_;
  std::vector<Scratch> made_;
  Matrix out_;
  RingAttention::Gradients gradients_;
};

Row run_rank(Job& job, Program& program, const Options& o) {
  enter(job, o);
  RingCase ring(job, program, o);
  Traffic traffic;
  const double seconds = median_of_rounds(
      o, [&] { ring.forget(); },
      [&] {
        if (o.before) o.before(job);
        ring.once();
        if (o.after) o.after(job);
        settle(job);
      },
      [&] { ring.axis().traffic(true); });
  traffic = ring.axis().traffic(true);
  const double bounds[] = {1e-5, 1e-13, 2e-2, 4e-3};
  const double wrong = o.check ? ring.wrong(bounds[static_cast<int>(o.dtype)]) : -1;
  ring.forget();
  return {seconds, static_cast<double>(traffic.bytes_received) / o.rounds, static_cast<double>(traffic.messages) / o.rounds, wrong};
}

}  // namespace

Measured run_attention(const Options& o) {
  Measured out = over_ranks(start(o, [&](Job& job, Program& program) { return run_rank(job, program, o); }));
  const Sizes s(o);
  const double kv = 2.0 * static_cast<double>(s.time * s.kv_heads * s.width), item = static_cast<double>(size_of(o.dtype));
  // forward and backward k and v, backward their gradients in the accumulator
  out.formula = kv * (o.size() - 1) * (2 * item + static_cast<double>(size_of(accumulator(o.dtype))));
  out.flops = 7.0 * static_cast<double>(s.time) * static_cast<double>(s.time) * static_cast<double>(s.heads * s.width);
  return out;
}

}  // namespace gingham
