#include "collectives/route.h"

#include <algorithm>

#include "kernels/tree_sum.h"

namespace gingham {

Route::Route(const Axis& axis) {
  std::vector<int> numbers;  // of the axis' hosts, as the job counts, in the order in which they come
  for (int place = 0; place < axis.size(); place++) {
    const size_t host = static_cast<size_t>(std::find(numbers.begin(), numbers.end(), axis.host(place)) - numbers.begin());
    if (host == numbers.size()) {
      numbers.push_back(axis.host(place));
      members_.emplace_back();
    }
    host_of_.push_back(host);
    index_of_.push_back(members_[host].size());
    members_[host].push_back(place);
  }
  own_ = host_of_[static_cast<size_t>(axis.rank())];
  for (size_t hop = 1; hop < members_.size(); hop++) {
    const std::vector<int>& theirs = members_[(own_ + hop) % members_.size()];
    elsewhere_.insert(elsewhere_.end(), theirs.begin(), theirs.end());
  }
  add_branches(0, axis.size());
  while (branches_[branch_].end <= axis.rank()) branch_++;
}

void Route::add_branches(int begin, int end) {
  const auto first = host_of_.begin() + begin;
  if (std::all_of(first, host_of_.begin() + end, [first](size_t host) { return host == *first; })) {
    branches_.push_back({begin, end});
    return;
  }
  const int middle = middle_of(begin, end);
  add_branches(begin, middle);
  add_branches(middle, end);
}

int Route::taker(const std::vector<int>& host, int place) const { return host[index_of_[static_cast<size_t>(place)] % host.size()]; }

int Route::summer(const Branch& branch, int owner) const {
  return branch.begin + static_cast<int>(index_of_[static_cast<size_t>(owner)] % static_cast<size_t>(branch.end - branch.begin));
}

}  // namespace gingham
