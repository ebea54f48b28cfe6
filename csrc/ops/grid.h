// How the three operands of one linear map Y[M, N] = X[M, K] W[K, N] lie on the grid (docs/theory.md section 1). Each operand's block
// is cut further along one axis of ranks: X over n, W over m, Y over k. Nothing here knows a mode: modes are grid shapes.
//   unswapped            slice dim K   X cut along K over n   W along K over m   Y along N over k
//   swapped (n, k trade) slice dim N   X cut along K over k   W along N over m   Y along N over n
//   sequence             slice dim M   X along M              W not cut          Y along M
#pragma once
#include <cstdint>
#include <vector>

#include "transport/axis.h"

namespace gingham {

enum class Dim { M, K, N };

struct Operand {
  Axis* axis = nullptr;          // the axis of the further cut; null: none
  int dim = 0;                   // rows (0) or columns (1) of the matrix as written above
  std::vector<int64_t> offsets;  // cut points inside the block along dim; empty: cut along M, at the rows that the ranks post
  bool replicated = false;       // the whole block stands on every rank of the axis: no gather, an all-reduce instead of a reduce-scatter

  bool shared() const { return axis && axis->size() > 1; }
  bool cut() const { return shared() && !replicated; }
  bool by_posted_rows() const { return cut() && offsets.empty(); }
};

// The slice dim of one call: the intervals between all cut points of the operands that stream, slice s being the s-th of S pieces of each
// interval. Operands cut at the same points give one interval a rank; cut at different points, pm + pn - gcd of them.
struct Slices {
  struct Piece {
    int64_t begin, end;
  };
  std::vector<int64_t> cuts;
  int slices = 1;

  void add(const std::vector<int64_t>& offsets);
  int intervals() const { return static_cast<int>(cuts.size()) - 1; }
  Piece piece(int slice, int interval) const;
  // The rank of an axis with these cut points that owns the interval.
  int owner(int interval, const std::vector<int64_t>& offsets) const;
};

// One operand's matrix cut over an axis: who owns which interval of the slice dim, and how a rank's share of a slice is packed as one
// message: its pieces one after the other, each dense in the operand's storage order.
class Cut {
 public:
  Cut(const Matrix& own, int dim, const std::vector<int64_t>& offsets, Storage storage, Axis& axis, const Slices& slices);

  Axis& axis() const { return axis_; }
  const Slices& slices() const { return slices_; }
  const Matrix& own() const { return own_; }
  int owner(int interval) const { return owners_[static_cast<size_t>(interval)]; }
  // The panel (slice, interval) inside its owner's whole part.
  Matrix piece_of(const Matrix& part, int slice, int interval) const;
  // The same panel inside its owner's packed share of the slice.
  Matrix piece_in(char* share, int slice, int interval) const;
  size_t share_bytes(int owner, int slice) const;
  size_t largest_share() const;
  // Whether this rank's whole part lies in memory as one message of it would: it is one interval, dense in the storage order.
  bool is_one_message() const;

 private:
  size_t piece_bytes(int slice, int interval) const;
  Matrix own_;
  int dim_;
  const std::vector<int64_t>& offsets_;
  Storage storage_;
  Axis& axis_;
  const Slices& slices_;
  std::vector<int> owners_;
};

}  // namespace gingham
