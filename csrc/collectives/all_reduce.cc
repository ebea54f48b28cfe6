#include "collectives/all_reduce.h"

#include <algorithm>

#include "collectives/all_gather.h"
#include "collectives/reduce_scatter.h"
#include "collectives/resident.h"
#include "kernels/tree_sum.h"

namespace gingham {
namespace {

constexpr int kMostPieces = 4;

// Between ranks of one host whose messages are queued: every share is cut into pieces, all of whose parts are on their way before the first is
// summed, so that the links do not wait for the sums. The sums are reduce_scatter's.
class InPieces {
 public:
  InPieces(Axis& axis, const Shares& shares, int pieces, const Stream& stream)
      : axis_(axis), ring_(axis.ring()), shares_(shares), pieces_(pieces), stream_(stream), outbox_(axis, stream) {
    for (int piece = 0; piece < pieces; piece++) {
      terms_.emplace_back();
      for (int place = 0; place < axis.size(); place++) {
        const Matrix own = at(axis.rank(), piece);
        const bool mine = place == axis.rank();
        terms_.back().push_back({place, place + 1, mine ? own : outbox_.room_like(own), !mine});
      }
    }
  }

  void run() {
    std::vector<uint64_t> groups;
    for (int piece = 0; piece < pieces_; piece++) {
      exchange([&](int to) { return at(to, piece); }, [&](int from) { return terms_[static_cast<size_t>(piece)][static_cast<size_t>(from)].sum; });
      groups.push_back(ring_.queued(0));
    }
    for (int piece = 0; piece < pieces_; piece++) {
      const std::vector<Term>& terms = terms_[static_cast<size_t>(piece)];
      ring_.settle(0, groups[static_cast<size_t>(piece)]);
      const Matrix own = at(axis_.rank(), piece);
      tree_sum(terms, own, stream_);
      exchange([&](int) { return own; }, [&](int from) { return at(from, piece); });
    }
    ring_.settle(0, ring_.queued(0));
    outbox_.drain();
  }

 private:
  Matrix at(int place, int piece) const {
    const Matrix share = shares_[place];
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
  const Shares& shares_;
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

void all_reduce(Axis& axis, const Matrix& x, const Stream& stream) {
  if (axis.size() == 1) return;
  CHECK(ShapeError, x.empty() || x.rows == 1 || x.row_stride == x.cols, "all_reduce of a strided matrix");
  const Matrix flat = dense(x.data, 1, x.count(), x.dtype);
  const Shares shares{flat, 1, chunk(flat.cols, axis.size())};
  const int pieces = pieces_of(axis, flat);
  if (pieces > 1) {
    Session session(axis, {}, flat.count());
    session.finish();
    InPieces(axis, shares, pieces, stream).run();
    return session.end();
  }
  const Matrix own = shares[axis.rank()];
  reduce_scatter(axis, shares, own, stream);
  all_gather(axis, own, shares.all(), stream);
}

}  // namespace gingham
