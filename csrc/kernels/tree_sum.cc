#include "kernels/tree_sum.h"

#include <algorithm>
#include <vector>

#include "base/vectorise.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

// An operand of an addition: a term, or what an earlier one left in slot number `index`.
struct Operand {
  bool term;
  int index;
};
// slot = left + right.
struct Addition {
  int slot;
  Operand left, right;
};

// The additions of a tree in an order in which few slots are in use at a time: its depth.
class Plan {
 public:
  explicit Plan(std::span<const Term> terms) : terms_(terms) { add(0, static_cast<int>(terms.size()), 0); }
  const std::vector<Addition>& additions() const { return additions_; }
  int slots() const { return slots_; }

 private:
  Operand add(int first, int last, int slot) {
    slots_ = std::max(slots_, slot + 1);
    if (last - first == 1) return {true, first};
    const int middle = middle_of(term(first).begin, term(last - 1).end);
    int cut = first + 1;
    while (cut < last && term(cut).begin < middle) cut++;
    CHECK(ShapeError, cut < last && term(cut).begin == middle, "a term of the places ", term(cut - 1).begin, " to ", term(cut - 1).end,
          " is no branch of the tree that parts at ", middle);
    const Operand left = add(first, cut, slot), right = add(cut, last, slot + 1);
    additions_.push_back({slot, left, right});
    return {false, slot};
  }
  const Term& term(int index) const { return terms_[static_cast<size_t>(index)]; }

  std::span<const Term> terms_;
  std::vector<Addition> additions_;
  int slots_ = 0;
};

constexpr int64_t kTile = 1024;  // elements: a tree's slots stay in the first cache

template <class T>
VECTORISED void add_tiles(const T* left, const T* right, T* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) out[i] = left[i] + right[i];
}

// One row: rows[t] is term t's.
template <class T>
void sum_row(const Plan& plan, const std::vector<const T*>& rows, T* out, int64_t cols, std::vector<T>& room) {
  for (int64_t begin = 0; begin < cols; begin += kTile) {
    const int64_t n = std::min(kTile, cols - begin);
    const auto at = [&](const Operand& operand) -> const T* {
      return operand.term ? rows[static_cast<size_t>(operand.index)] + begin : room.data() + operand.index * kTile;
    };
    for (const Addition& each : plan.additions()) {
      const bool last = &each == &plan.additions().back();
      add_tiles(at(each.left), at(each.right), last ? out + begin : room.data() + each.slot * kTile, n);
    }
  }
}

void sum_in_tiles(const Plan& plan, std::span<const Term> terms, const Matrix& out) {
  const bool turn = out.col_stride != 1 && out.row_stride == 1;
  std::vector<Matrix> from;
  for (const Term& term : terms) from.push_back(turn ? term.sum.t() : term.sum);
  Matrix to = turn ? out.t() : out;
  if (to.flat() && std::all_of(from.begin(), from.end(), [](const Matrix& m) { return m.flat(); })) {
    for (Matrix& m : from) m = dense(m.data, 1, m.count(), m.dtype);
    to = dense(to.data, 1, to.count(), to.dtype);
  }
  const bool in_rows = to.col_stride == 1 && std::all_of(from.begin(), from.end(), [](const Matrix& m) { return m.col_stride == 1; });
  DISPATCH(to.dtype, T, {
    std::vector<T> room(static_cast<size_t>(plan.slots()) * kTile);
    std::vector<const T*> rows(from.size());
    for (int64_t i = 0; i < to.rows; i++)
      for (int64_t j = 0; j < (in_rows ? 1 : to.cols); j++) {  // element by element where some lie the other way
        for (size_t t = 0; t < from.size(); t++) rows[t] = static_cast<const T*>(from[t].data) + i * from[t].row_stride + j * from[t].col_stride;
        sum_row(plan, rows, static_cast<T*>(to.data) + i * to.row_stride + j * to.col_stride, in_rows ? to.cols : 1, room);
      }
  });
}

// Into 16 bits, a tile of fp32 at a time.
void sum_rounded(const Plan& plan, std::span<const Term> terms, const Matrix& out, const Stream& stream) {
  std::vector<float> room(static_cast<size_t>(std::min(kTile, out.cols)));
  std::vector<Term> tile(terms.begin(), terms.end());
  for (int64_t i = 0; i < out.rows; i++)
    for (int64_t begin = 0; begin < out.cols; begin += kTile) {
      const int64_t end = std::min(begin + kTile, out.cols);
      const auto part = [&](const Matrix& m) { return m.slice(0, i, i + 1).slice(1, begin, end); };
      for (size_t t = 0; t < terms.size(); t++) tile[t].sum = part(terms[t].sum);
      const Matrix sum = dense(room.data(), 1, end - begin, DType::f32);
      sum_in_tiles(plan, tile, sum);
      cast(sum, part(out), stream);
    }
}

void sum_in_pairs(const Plan& plan, std::span<const Term> terms, const Matrix& out, const Stream& stream) {
  std::vector<Matrix> slots(static_cast<size_t>(plan.slots()));
  const auto at = [&](const Operand& operand) -> const Matrix& {
    return operand.term ? terms[static_cast<size_t>(operand.index)].sum : slots[static_cast<size_t>(operand.index)];
  };
  const auto spare = [&](const Operand& operand) { return !operand.term || terms[static_cast<size_t>(operand.index)].spare; };
  for (const Addition& each : plan.additions()) {
    const Matrix left = at(each.left), right = at(each.right);
    if (&each == &plan.additions().back()) return accumulate_into(left, right, out, stream);
    const bool leftwards = spare(each.left);
    CHECK(ShapeError, leftwards || spare(each.right), "two terms of a sum on a GPU that must stay as they are");
    accumulate(leftwards ? right : left, leftwards ? left : right, stream);
    slots[static_cast<size_t>(each.slot)] = leftwards ? left : right;
  }
}

}  // namespace

void tree_sum(std::span<const Term> terms, const Matrix& out, const Stream& stream) {
  for (const Term& term : terms)
    CHECK(ShapeError, term.sum.rows == out.rows && term.sum.cols == out.cols && rounds_to(term.sum.dtype, out.dtype), "sum of [", term.sum.rows, ",",
          term.sum.cols, "] into [", out.rows, ",", out.cols, "]");
  if (terms.size() == 1) {
    if (terms[0].sum.data != out.data) cast(terms[0].sum, out, stream);
    return;
  }
  const Plan plan(terms);
  if (stream.device() == Device::cuda)
    sum_in_pairs(plan, terms, out, stream);
  else if (out.dtype == terms[0].sum.dtype)
    sum_in_tiles(plan, terms, out);
  else
    sum_rounded(plan, terms, out, stream);
}

}  // namespace gingham
