// One rank's product, gingham's or with library "cublaslt" the yardstick's, timed against its flops. On a GPU a round is kLaunches products by
// the device's own clock, with operands that are not in its cache and a host that has queued them all before the first begins.
#include <stdio.h>

#include <algorithm>
#include <cmath>
#include <thread>

#include "cases.h"
#include "kernels/blas.h"
#include "kernels/cast.h"
#include "kernels/gemm.h"
#include "kernels/hopper.h"
#include "numbers.h"
#include "yardstick.h"

namespace gingham {
namespace {

constexpr int kLaunches = 20, kMostSets = 64;
constexpr size_t kBeyondCache = size_t{160} << 20;  // an H100 has 50 MB of L2 cache
constexpr size_t kLead = size_t{1} << 30;           // zeros, of which a device writes some 3 TB/s: longer than the host queues kLaunches

// C in the accumulator of the operands' type, or with --narrow in that type, which the tail writes and no C. With --add C += A B.
class Gemm {
 public:
  Gemm(Job& job, const Options& o)
      : job_(job),
        o_(o),
        a_(filled(job, o.m, o.k, o.dtype, 1)),
        b_(filled(job, o.k, o.n, o.dtype, 2)),
        c_(job, o.m, o.n, o.narrow ? o.dtype : accumulator(o.dtype)) {
    sets_.push_back({a_.view(), b_.view(), c_.view()});
    if (job.gpu()) add_sets();
    if (o.library == "cublaslt") lt_ = std::make_unique<CublasLt>(a_.view(), b_.view(), c_.view(), job.stream());
  }
  size_t sets() const { return sets_.size(); }

  double round() {
    if (!job_.gpu()) {
      const double start = now();
      product(sets_[0]);
      return now() - start;
    }
    const auto lead = [this] { fill_zero(dense(lead_.data(), 1, static_cast<int64_t>(lead_bytes_ / 4), DType::f32), job_.stream()); };
    const auto timed = [this] {
      for (size_t i = 0; i < kLaunches; i++) product(sets_[i % sets_.size()]);
    };
    return job_.gpu()->seconds(lead, timed) / kLaunches;
  }

  // Elements of C beyond 4 sqrt(K) u |a| |b| of the host's product, u of the sums: twice what K roundings of a random sign add up to, for
  // either side; a narrow C is rounded once more. Operands have at most 10 bits, so that tf32 rounds none of them.
  double wrong() {
    const DType sum = accumulator(o_.dtype);
    const Scratch room(job_.host_stream(), static_cast<size_t>(o_.m * o_.n) * size_of(sum));
    const Matrix expected = dense(room.data(), o_.m, o_.n, sum);
    set_blas_threads(static_cast<int>(std::thread::hardware_concurrency()));
    if (o_.add) {  // what the rounds have added up is put aside
      for (int64_t i = 0; i < expected.count(); i++) store(c_.host(), i, number_at(i, 3));
      cast(c_.host(), expected, job_.host_stream());
      c_.upload();
      product(sets_[0]);
    }
    gemm(a_.host(), b_.host(), expected, o_.add, job_.host_stream());
    set_blas_threads(1);
    c_.download();
    const std::vector<double> rows = lengths(a_.host()), cols = lengths(b_.host().t());
    const double bound = 4 * std::sqrt(static_cast<double>(o_.k)) * (sum == DType::f64 ? 0x1p-53 : 0x1p-24);
    const double last = !o_.narrow ? 0 : o_.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
    double wrong = 0;
    for (int64_t i = 0; i < o_.m; i++)
      for (int64_t j = 0; j < o_.n; j++) {
        const double want = load(expected, i * o_.n + j), off = std::abs(load(c_.host(), i * o_.n + j) - want);
        wrong += !(off <= bound * rows[static_cast<size_t>(i)] * cols[static_cast<size_t>(j)] + last * std::abs(want));
      }
    return wrong;
  }

 private:
  struct Set {
    Matrix a, b, c;
  };

  void product(const Set& s) {
    if (lt_) return lt_->gemm(s.a, s.b, s.c);
    if (!o_.narrow) return gemm(s.a, s.b, s.c, o_.add, job_.stream());
    Tail tail;
    tail.z = s.c;
    gemm(s.a, s.b, {}, false, tail, job_.stream());
  }

  // Copies of the operands, taken in turn. A runtime that stands in for a device has no cache to get out of.
  void add_sets() {
    lead_bytes_ = job_.gpu()->memory_is_host() ? 1024 : kLead;
    lead_ = Scratch(job_.stream(), lead_bytes_);
    const size_t bytes = a_.view().bytes() + b_.view().bytes() + c_.view().bytes();
    const size_t wanted = job_.gpu()->memory_is_host() ? 2 : std::min<size_t>(kMostSets, kBeyondCache / bytes + 1);
    while (sets_.size() < wanted) {
      const auto copy = [this](const Matrix& m) {
        rooms_.emplace_back(job_.stream(), m.bytes());
        const Matrix out = dense(rooms_.back().data(), m.rows, m.cols, m.dtype);
        cast(m, out, job_.stream());
        return out;
      };
      sets_.push_back({copy(a_.view()), copy(b_.view()), copy(c_.view())});
    }
    settle(job_);
  }

  static std::vector<double> lengths(const Matrix& m) {
    std::vector<double> out(static_cast<size_t>(m.rows));
    const bool along = m.col_stride == 1;
    for (int64_t p = 0; p < m.count(); p++) {
      const double value = load(m, p);
      out[static_cast<size_t>(along ? p / m.cols : p % m.rows)] += value * value;
    }
    for (double& each : out) each = std::sqrt(each);
    return out;
  }

  Job& job_;
  const Options& o_;
  Room a_, b_, c_;
  Scratch lead_;
  size_t lead_bytes_ = 0;
  std::vector<Scratch> rooms_;
  std::vector<Set> sets_;
  std::unique_ptr<CublasLt> lt_;
};

}  // namespace

Row run_gemm(Job& job, const Options& o) {
  CHECK(Error, !o.narrow || size_of(o.dtype) == 2, "--narrow with dtype ", name_of(o.dtype), ", expected bfloat16 or float16: C is rounded to them");
  CHECK(Error, !o.add || (!o.narrow && o.library == "gingham"), "--add with --narrow or --library ", o.library, ", expected sums of gingham's alone");
  enter(job, o);
  if (job.gpu()) job.gpu()->stream().math = o.tf32 ? Math::tf32 : Math::exact;
  Gemm product(job, o);
  std::vector<double> times;
  for (int i = -o.warmup; i < o.rounds; i++) {
    const double seconds = product.round();
    if (i >= 0) times.push_back(seconds);
  }
  const auto middle = times.begin() + o.rounds / 2;
  std::nth_element(times.begin(), middle, times.end());
  if (job.gpu()) printf("#   sm90 %s; %d launches a round over %zu sets of operands\n", hopper_status().c_str(), kLaunches, product.sets());
  fflush(stdout);
  return {*middle, 0, 0, o.check ? product.wrong() : -1};
}

}  // namespace gingham
