#include "collectives/reduce_scatter.h"

#include <algorithm>

#include "collectives/route.h"
#include "kernels/tree_sum.h"

namespace gingham {
namespace {

void through_window(Axis& axis, const Shares& x, const Matrix& out, const Stream& stream) {
  const Resident resident(x.whole, axis, stream);
  const Matrix posted[] = {resident.view()};
  Session session(axis, posted, x.whole.count());
  Window& window = *axis.window();
  Request last;
  std::vector<Term> terms;
  for (int rank = 0; rank < axis.size(); rank++) {
    Matrix share = x[rank];
    if (rank != axis.rank()) {
      axis.count_sent(share.bytes());
      const Matrix theirs = window.panel(rank, 0);
      CHECK(ShapeError, theirs.rows == x.whole.rows && theirs.cols == x.whole.cols && theirs.dtype == x.whole.dtype, "reduce_scatter of [",
            x.whole.rows, ",", x.whole.cols, "] here and [", theirs.rows, ",", theirs.cols, "] at place ", rank, " of the axis");
      share = x.of(theirs, axis.rank());
      const Request request = window.begin_get(rank, share.bytes());
      last.due = std::max(last.due, request.due);
    }
    terms.push_back({rank, rank + 1, share, false});
  }
  window.wait_get(last);
  tree_sum(terms, out, stream);
  session.end();
}

// One rank's part in all the sums. All its memory is taken before the first byte goes: what fails then, fails on every rank alike.
class Sums {
 public:
  Sums(Axis& axis, const Shares& x, const Stream& stream)
      : axis_(axis), ring_(axis.ring()), route_(axis), x_(x), stream_(stream), outbox_(axis, stream) {
    for (int owner : route_.elsewhere()) plan(owner);
    for (int owner : route_.here())
      if (owner != axis.rank()) passed_.push_back({owner, owner, {}, outbox_.packed(x[owner])});
    for (int peer : route_.here())
      if (peer != axis.rank()) own_.push_back({peer, peer + 1, outbox_.room_like(x[axis.rank()]), true});
    for (const Route::Branch& branch : route_.branches())
      if (!route_.is_here(branch.begin)) coming_.push_back({branch.begin, branch.end, outbox_.room_like(x[axis.rank()]), true});
  }

  void run(const Matrix& out) {
    for (const Term& term : coming_) ring_.expect(sender(term), term.sum.data, term.sum.bytes());
    ring_.group_start();
    for (Passed& each : passed_) {
      for (const Term& term : each.terms) ring_.recv(term.begin, term.sum.data, term.sum.bytes());
      if (!ring_.queues() || route_.is_here(each.to)) pass(each);
    }
    for (const Term& term : own_) ring_.recv(term.begin, term.sum.data, term.sum.bytes());
    ring_.group_end();
    ring_.arrived(0);

    ring_.group_start();
    for (Passed& each : passed_)
      if (ring_.queues() && !route_.is_here(each.to)) pass(each);  // what it is the sum of came with the first group
    for (const Term& term : coming_) ring_.recv(sender(term), term.sum.data, term.sum.bytes());
    ring_.group_end();
    ring_.arrived(0);
    own_.insert(own_.end(), coming_.begin(), coming_.end());
    add(own_, axis_.rank(), out);
    outbox_.drain();
  }

 private:
  // What goes from here to another rank: this rank's share for an owner, or its sum with the other terms.
  struct Passed {
    int owner, to;
    std::vector<Term> terms;
    Matrix sent;
  };

  // An owner on another host gets one sum of this branch.
  void plan(int owner) {
    const Route::Branch& branch = route_.own_branch();
    const int summer = route_.summer(branch, owner);
    const bool sums = summer == axis_.rank() && branch.end - branch.begin > 1;
    if (!sums) {
      passed_.push_back({owner, summer == axis_.rank() ? owner : summer, {}, outbox_.packed(x_[owner])});
      return;
    }
    Passed sum{owner, owner, {}, outbox_.room_like(x_[owner])};
    for (int peer = branch.begin; peer < branch.end; peer++)
      if (peer != axis_.rank()) sum.terms.push_back({peer, peer + 1, outbox_.room_like(x_[owner]), true});
    passed_.push_back(std::move(sum));
  }

  void pass(Passed& each) {
    if (!each.terms.empty()) add(each.terms, each.owner, each.sent);
    outbox_.send(each.to, each.sent);
  }

  // The rank that sends this one a branch's sum.
  int sender(const Term& term) const { return route_.summer({term.begin, term.end}, axis_.rank()); }

  void add(std::vector<Term>& terms, int owner, const Matrix& out) {
    terms.push_back({axis_.rank(), axis_.rank() + 1, x_[owner], false});
    std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.begin < b.begin; });
    tree_sum(terms, out, stream_);
  }

  Axis& axis_;
  Ring& ring_;
  const Route route_;
  const Shares& x_;
  const Stream& stream_;
  Outbox outbox_;
  std::vector<Passed> passed_;
  std::vector<Term> own_, coming_;
};

void through_ring(Axis& axis, const Shares& x, const Matrix& out, const Stream& stream) {
  Session session(axis, {}, x.whole.count());
  session.finish();
  Sums(axis, x, stream).run(out);
  session.end();
}

}  // namespace

void reduce_scatter(Axis& axis, const Shares& x, const Matrix& out, const Stream& stream) {
  if (axis.size() == 1) {
    if (x.whole.data != out.data) cast(x.whole, out, stream);
    return;
  }
  if (axis.window())
    through_window(axis, x, out, stream);
  else
    through_ring(axis, x, out, stream);
}

}  // namespace gingham
