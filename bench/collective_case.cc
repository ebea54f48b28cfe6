// Each collective alone: n elements of integer values over `ranks` ranks. Sizes and bus factors are those of nccl-tests.
#include <algorithm>

#include "cases.h"
#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/broadcast.h"
#include "collectives/reduce.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"

namespace gingham {
namespace {

double value(int rank, int64_t i) { return static_cast<double>((rank * 31 + i * 7) % 11 - 5); }

struct Vector {
  Scratch room;
  Matrix view;
  Vector(Job& job, int64_t n, DType dtype) : room(job.stream(), static_cast<size_t>(n) * size_of(dtype)), view(dense(room.data(), 1, n, dtype)) {}
  void fill(int rank, int64_t from) {
    DISPATCH(view.dtype, T, {
      for (int64_t i = 0; i < view.cols; i++) static_cast<T*>(view.data)[i] = static_cast<T>(value(rank, from + i));
    });
  }
  template <class Expected>
  int64_t differing(const Matrix& m, Expected expected) const {
    int64_t wrong = 0;
    DISPATCH(view.dtype, T, {
      for (int64_t i = 0; i < m.cols; i++) wrong += static_cast<const T*>(m.data)[i] != static_cast<T>(expected(i));
    });
    return wrong;
  }
};

Row run_rank(Job& job, const Options& o) {
  const int g = o.size(), me = job.rank();
  std::vector<int> members;
  for (int r = 0; r < g; r++) members.push_back(r);
  auto axis = job.axis(0, members, o.latency, o.bandwidth);
  const std::vector<int64_t> cuts = chunk(o.n, g);
  const size_t at = static_cast<size_t>(me);
  Vector whole(job, o.n, o.dtype), part(job, cuts[at + 1] - cuts[at], o.dtype);
  std::vector<Matrix> parts;
  for (size_t i = 0; i + 1 < cuts.size(); i++) parts.push_back(whole.view.slice(1, cuts[i], cuts[i + 1]));
  auto total = [&](int64_t i) {
    double sum = 0;
    for (int r = 0; r < g; r++) sum += value(r, i);
    return sum;
  };
  auto prepare = [&] {
    whole.fill(me, 0);
    part.fill(me, cuts[at]);
  };
  auto once = [&] {
    Call call;
    call.set_name(o.name);
    call.n = o.n;
    job.control().begin(call);
    if (o.name == "all_gather") all_gather(*axis, part.view, parts, o.source, job.stream());
    if (o.name == "reduce_scatter") reduce_scatter(*axis, parts, part.view, o.source, job.stream());
    if (o.name == "all_reduce") all_reduce(*axis, whole.view, o.source, job.stream());
    if (o.name == "broadcast") broadcast(*axis, whole.view, 0, job.stream());
    if (o.name == "reduce") reduce(*axis, whole.view, 0, job.stream());
  };
  for (int i = 0; i < o.warmup; i++) {
    prepare();
    once();
  }
  axis->traffic(true);
  std::vector<double> times;
  for (int i = 0; i < o.rounds; i++) {
    prepare();
    const double start = now();
    once();
    times.push_back(now() - start);
  }
  const Traffic traffic = axis->traffic(true);
  std::nth_element(times.begin(), times.begin() + o.rounds / 2, times.end());
  double wrong = -1;
  if (o.check) {
    if (o.name == "all_gather") {
      wrong = 0;
      for (int r = 0; r < g; r++)
        wrong += static_cast<double>(whole.differing(parts[static_cast<size_t>(r)], [&](int64_t i) { return value(r, cuts[static_cast<size_t>(r)] + i); }));
    } else if (o.name == "reduce_scatter") {
      wrong = static_cast<double>(whole.differing(part.view, [&](int64_t i) { return total(cuts[at] + i); }));
    } else if (o.name == "broadcast") {
      wrong = static_cast<double>(whole.differing(whole.view, [&](int64_t i) { return value(0, i); }));
    } else {
      const bool summed = o.name == "all_reduce" || me == 0;
      wrong = static_cast<double>(whole.differing(whole.view, [&](int64_t i) { return summed ? total(i) : value(me, i); }));
    }
  }
  return {times[static_cast<size_t>(o.rounds) / 2], static_cast<double>(traffic.bytes_received) / o.rounds, static_cast<double>(traffic.messages) / o.rounds, wrong};
}

}  // namespace

Measured run_collective(const Options& o) {
  const std::vector<Row> rows = run_ranks(o.size(), o.as, [&](Job& job) { return run_rank(job, o); });
  Measured out;
  for (const Row& r : rows) {
    out.seconds = std::max(out.seconds, r[0]);
    out.bytes += r[1];
    out.messages += r[2];
    out.wrong = r[3] < 0 ? -1 : out.wrong + r[3];
  }
  const double g = o.size(), bytes = static_cast<double>(o.n) * static_cast<double>(size_of(o.dtype));
  out.algbw_bytes = bytes;
  out.bus_factor = o.name == "all_reduce" ? 2 * (g - 1) / g : o.name == "broadcast" || o.name == "reduce" ? 1 : (g - 1) / g;
  out.formula = o.name == "all_reduce" ? 2 * (g - 1) * bytes : (g - 1) * bytes;
  return out;
}

}  // namespace gingham
