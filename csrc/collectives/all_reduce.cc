#include "collectives/all_reduce.h"

#include <algorithm>

#include "collectives/all_gather.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"
#include "kernels/cast.h"
#include "kernels/tree_sum.h"

namespace gingham {
namespace {

constexpr int kMostPieces = 4;

// Between ranks of one host whose messages are queued: every share is cut into pieces, all of whose parts are on their way before the first is
// summed, so that the links do not wait for the sums. The sums are reduce_scatter's.
class InPieces {
 public:
  InPieces(Axis& axis, const Shares& shares, const Shares& sums, int pieces, const Stream& stream)
      : axis_(axis), ring_(axis.ring()), shares_(shares), sums_(sums), pieces_(pieces), stream_(stream), outbox_(axis, stream) {
    for (int piece = 0; piece < pieces; piece++) {
      terms_.emplace_back();
      for (int place = 0; place < axis.size(); place++) {
        const Matrix own = at(shares_, axis.rank(), piece);
        const bool mine = place == axis.rank();
        terms_.back().push_back({place, place + 1, mine ? own : outbox_.room_like(own), !mine});
      }
    }
  }

  void run() {
    std::vector<uint64_t> groups;
    for (int piece = 0; piece < pieces_; piece++) {
      exchange([&](int to) { return at(shares_, to, piece); },
               [&](int from) { return terms_[static_cast<size_t>(piece)][static_cast<size_t>(from)].sum; });
      groups.push_back(ring_.queued(0));
    }
    for (int piece = 0; piece < pieces_; piece++) {
      const std::vector<Term>& terms = terms_[static_cast<size_t>(piece)];
      ring_.settle(0, groups[static_cast<size_t>(piece)]);
      const Matrix own = at(sums_, axis_.rank(), piece);
      tree_sum(terms, own, stream_);
      exchange([&](int) { return own; }, [&](int from) { return at(sums_, from, piece); });
    }
    ring_.settle(0, ring_.queued(0));
    outbox_.drain();
  }

 private:
  Matrix at(const Shares& of, int place, int piece) const {
    const Matrix share = of[place];
    const std::vector<int64_t> cuts = chunk(share.cols, pieces_);
    return share.slice(1, cuts[static_cast<size_t>(piece)], cuts[static_cast<size_t>(piece) + 1]);
  }
  template <class Sent, class Received>
  void exchange(const Sent& sent, const Received& received) {
    ring_.group_start();
    for (int hop = 1; hop < axis_.size(); hop++) {
      outbox_.send(axis_.next(hop), sent(axis_.next(hop)));
      const Matrix into = received(axis_.next(-hop));
      ring_.recv(axis_.next(-hop), into.data, into.bytes());
    }
    ring_.group_end();
  }

  Axis& axis_;
  Ring& ring_;
  const Shares &shares_, &sums_;
  int pieces_;
  const Stream& stream_;
  Outbox outbox_;
  std::vector<std::vector<Term>> terms_;
};

int pieces_of(Axis& axis, const Matrix& flat) {
  if (!axis.ring().queues() || axis.window() || axis.crosses_any()) return 1;
  const size_t share = flat.bytes() / static_cast<size_t>(axis.size());
  return static_cast<int>(std::clamp<size_t>(share / axis.ring().chunk_bytes(), 1, kMostPieces));
}

}  // namespace

void all_reduce(Axis& axis, const Matrix& x, const Matrix& rounded, const Stream& stream) {
  if (axis.size() == 1) {
    if (x.data != rounded.data) cast(dense(x.data, 1, x.count(), x.dtype), dense(rounded.data, 1, x.count(), rounded.dtype), stream);
    return;
  }
  for (const Matrix& each : {x, rounded})
    CHECK(ShapeError, each.empty() || each.rows == 1 || each.row_stride == each.cols, "all_reduce of a strided matrix");
  CHECK(ShapeError, x.count() == rounded.count(), "all_reduce of ", x.count(), " numbers into ", rounded.count());
  const Matrix flat = dense(x.data, 1, x.count(), x.dtype);
  const Shares shares{flat, 1, chunk(flat.cols, axis.size())};
  const Shares sums{dense(rounded.data, 1, x.count(), rounded.dtype), 1, shares.cuts};
  const int pieces = pieces_of(axis, flat);
  if (pieces > 1) {
    Session session(axis, {}, flat.count());
    session.finish();
    InPieces(axis, shares, sums, pieces, stream).run();
    return session.end();
  }
  const Matrix own = shares[axis.rank()], sum = sums[axis.rank()];
  reduce_scatter(axis, shares, own, stream);
  if (own.data != sum.data) cast(own, sum, stream);
  all_gather(axis, sum, sums.all(), stream);
}

void all_reduce(Axis& axis, const Matrix& x, const Stream& stream) { all_reduce(axis, x, x, stream); }

}  // namespace gingham
