// Each collective alone: n elements of integer values over `ranks` ranks, whose sums are small enough for 16 bits. Sizes and bus factors are those of
// nccl-tests.
#include <algorithm>

#include "cases.h"
#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/broadcast.h"
#include "collectives/reduce.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"
#include "numbers.h"
#ifdef GINGHAM_CUDA
#include "transport/nccl.h"
#endif

namespace gingham {
namespace {

double value(int rank, int64_t i) { return static_cast<double>((rank * 31 + i * 7) % 11 - 5); }

struct Vector {
  Room room;
  Matrix view;
  Vector(Job& job, int64_t n, DType dtype) : room(job, 1, n, dtype), view(room.view()) {}
  void fill(int rank, int64_t from, bool fractions) {
    for (int64_t i = 0; i < view.cols; i++) store(room.host(), i, value(rank, from + i) / (fractions ? 7 : 1));
    room.upload();
  }
  template <class Expected>
  int64_t differing(int64_t begin, int64_t end, Expected expected) const {
    int64_t wrong = 0;
    room.download();
    for (int64_t i = begin; i < end; i++) wrong += !(load(room.host(), i) == expected(i));
    return wrong;
  }
};

class Collective {
 public:
  Collective(Job& job, Program& program, const Options& o)
      : job_(job),
        program_(program),
        o_(o),
        axis_(as_asked(job.axis(program, 0, everyone(o.size()), o.source == Source::window, o.latency, o.bandwidth), o)),
        cuts_(chunk(o.n, o.size())),
        whole_(job, o.n, o.dtype),
        part_(job, end() - begin(), o.dtype) {
    for (size_t i = 0; i + 1 < cuts_.size(); i++) parts_.push_back(whole_.view.slice(1, cuts_[i], cuts_[i + 1]));
  }
  Axis& axis() { return *axis_; }
  void prepare() {
    whole_.fill(job_.rank(), 0, o_.fractions);
    part_.fill(job_.rank(), begin(), o_.fractions);
  }
  void once() {
    if (o_.library == "nccl") return by_nccl();
    Call call;
    call.set_name(o_.name);
    call.n = o_.n;
    program_.begin(call);
    if (o_.name == "all_gather") all_gather(*axis_, part_.view, parts_, job_.stream());
    if (o_.name == "reduce_scatter") reduce_scatter(*axis_, {whole_.view, 1, cuts_}, part_.view, job_.stream());
    if (o_.name == "all_reduce") all_reduce(*axis_, whole_.view, job_.stream());
    if (o_.name == "broadcast") broadcast(*axis_, whole_.view, 0, job_.stream());
    if (o_.name == "reduce") reduce(*axis_, whole_.view, 0, job_.stream());
  }
  void show() const {
    const Vector& result = o_.name == "reduce_scatter" ? part_ : whole_;
    result.room.download();
    o_.see(job_.rank(), result.room.host());
  }
  // Elements that differ from the exact result.
  int64_t wrong() const {
    const int g = o_.size(), me = job_.rank();
    auto total = [g](int64_t i) {
      double sum = 0;
      for (int r = 0; r < g; r++) sum += value(r, i);
      return sum;
    };
    if (o_.name == "reduce_scatter") return part_.differing(0, end() - begin(), [&](int64_t i) { return total(begin() + i); });
    if (o_.name == "broadcast") return whole_.differing(0, o_.n, [](int64_t i) { return value(0, i); });
    if (o_.name == "all_reduce" || me == 0) {
      if (o_.name != "all_gather") return whole_.differing(0, o_.n, total);
    } else if (o_.name == "reduce") {
      return whole_.differing(0, o_.n, [me](int64_t i) { return value(me, i); });
    }
    int64_t sum = 0;
    for (int r = 0; r < g; r++)
      sum += whole_.differing(cuts_[static_cast<size_t>(r)], cuts_[static_cast<size_t>(r) + 1], [r](int64_t i) { return value(r, i); });
    return sum;
  }

 private:
  static std::vector<int> everyone(int n) {
    std::vector<int> out;
    for (int r = 0; r < n; r++) out.push_back(r);
    return out;
  }
  // NCCL's own collective; n must divide by the ranks.
  void by_nccl() {
#ifdef GINGHAM_CUDA
    const auto* axis = dynamic_cast<const Nccl*>(axis_.get());
    CHECK(Error, axis && o_.n % o_.size() == 0 && o_.dtype == DType::f32, "library nccl wants --device cuda, float32 and n divisible by the ranks");
    const size_t count = static_cast<size_t>(part_.view.cols);
    const cudaStream_t stream = native(job_.stream());
    if (o_.name == "all_gather") NCCL_CHECK(nccl().AllGather(part_.view.data, whole_.view.data, count, ncclFloat32, axis->communicator(), stream));
    if (o_.name == "reduce_scatter")
      NCCL_CHECK(nccl().ReduceScatter(whole_.view.data, part_.view.data, count, ncclFloat32, ncclSum, axis->communicator(), stream));
    if (o_.name == "all_reduce")
      NCCL_CHECK(nccl().AllReduce(whole_.view.data, whole_.view.data, count * static_cast<size_t>(o_.size()), ncclFloat32, ncclSum,
                                  axis->communicator(), stream));
#else
    throw Error("library nccl: this microbenchmark was built without CUDA");
#endif
  }
  int64_t begin() const { return cuts_[static_cast<size_t>(job_.rank())]; }
  int64_t end() const { return cuts_[static_cast<size_t>(job_.rank()) + 1]; }

  Job& job_;
  Program& program_;
  const Options& o_;
  std::unique_ptr<Axis> axis_;
  std::vector<int64_t> cuts_;
  Vector whole_, part_;
  std::vector<Matrix> parts_;
};

Row run_rank(Job& job, Program& program, const Options& o) {
  enter(job, o);
  Collective collective(job, program, o);
  Traffic traffic;
  const double seconds = median_of_rounds(
      o, [&] { collective.prepare(); },
      [&] {
        if (o.before) o.before(job);
        collective.once();
        if (o.after) o.after(job);
        settle(job);
      },
      [&] { traffic = collective.axis().traffic(true); });
  traffic = collective.axis().traffic(true);
  if (o.see) collective.show();
  return {seconds,
          static_cast<double>(traffic.bytes_received) / o.rounds,
          static_cast<double>(traffic.messages) / o.rounds,
          o.check ? static_cast<double>(collective.wrong()) : -1,
          0,
          static_cast<double>(traffic.bytes_crossed) / o.rounds};
}

}  // namespace

Measured run_collective(const Options& o) {
  const std::vector<Row> rows = start(o, [&](Job& job, Program& program) { return run_rank(job, program, o); });
  Measured out = over_ranks(rows);
  const double g = o.size(), bytes = static_cast<double>(o.n) * static_cast<double>(size_of(o.dtype));
  out.algbw_bytes = bytes;
  out.bus_factor = o.name == "all_reduce" ? 2 * (g - 1) / g : o.name == "broadcast" || o.name == "reduce" ? 1 : (g - 1) / g;
  out.formula = o.name == "all_reduce" ? 2 * (g - 1) * bytes : (g - 1) * bytes;
  return out;
}

}  // namespace gingham
