#include "ops/grid.h"

#include <algorithm>

namespace gingham {

void Slices::add(const std::vector<int64_t>& offsets) {
  cuts.insert(cuts.end(), offsets.begin(), offsets.end());
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
}

Slices::Piece Slices::piece(int slice, int interval) const {
  const size_t t = static_cast<size_t>(interval);
  const int64_t length = cuts[t + 1] - cuts[t];
  return {cuts[t] + length * slice / slices, cuts[t] + length * (slice + 1) / slices};
}

int Slices::owner(int interval, const std::vector<int64_t>& offsets) const {
  const int64_t begin = cuts[static_cast<size_t>(interval)];
  return static_cast<int>(std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin()) - 1;
}

Cut::Cut(const Matrix& own, int dim, const std::vector<int64_t>& offsets, Storage storage, Axis& axis, const Slices& slices)
    : own_(own), dim_(dim), offsets_(offsets), storage_(storage), axis_(axis), slices_(slices) {
  for (int t = 0; t < slices.intervals(); t++) owners_.push_back(slices.owner(t, offsets));
}

Matrix Cut::piece_of(const Matrix& part, int slice, int interval) const {
  const auto piece = slices_.piece(slice, interval);
  const int64_t origin = offsets_[static_cast<size_t>(owner(interval))];
  return part.slice(dim_, piece.begin - origin, piece.end - origin);
}

size_t Cut::piece_bytes(int slice, int interval) const {
  const auto piece = slices_.piece(slice, interval);
  return static_cast<size_t>((piece.end - piece.begin) * own_.size(1 - dim_)) * size_of(own_.dtype);
}

Matrix Cut::piece_in(char* share, int slice, int interval) const {
  for (int t = 0; t < interval; t++)
    if (owner(t) == owner(interval)) share += piece_bytes(slice, t);
  const auto piece = slices_.piece(slice, interval);
  const int64_t length = piece.end - piece.begin;
  const int64_t rows = dim_ == 0 ? length : own_.rows, cols = dim_ == 0 ? own_.cols : length;
  return dense(share, rows, cols, own_.dtype, storage_);
}

size_t Cut::share_bytes(int owner, int slice) const {
  size_t bytes = 0;
  for (int t = 0; t < slices_.intervals(); t++)
    if (this->owner(t) == owner) bytes += piece_bytes(slice, t);
  return bytes;
}

bool Cut::is_one_message() const {
  const bool dense = storage_ == Storage::column_major ? own_.t().flat() : own_.flat();
  return dense && std::count(owners_.begin(), owners_.end(), axis_.rank()) == 1;
}

size_t Cut::largest_share() const {
  size_t bytes = 0;
  for (int s = 0; s < slices_.slices; s++)
    for (int rank = 0; rank < axis_.size(); rank++) bytes = std::max(bytes, share_bytes(rank, s));
  return bytes;
}

}  // namespace gingham
