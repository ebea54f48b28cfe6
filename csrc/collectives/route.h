// How the ranks of one axis reach each other where they are on several hosts: what a rank has for another host goes there once, to one of
// its ranks, which hands it on; and of a sum each branch of the tree (kernels/tree_sum.h) that lies on one host leaves it once, summed.
// Who hands on and who sums follows from the places alone, and is spread evenly over the ranks of a host. One host is the simple case: every
// rank sends to every other.
#pragma once
#include <vector>

#include "transport/axis.h"

namespace gingham {

class Route {
 public:
  // A branch of the tree whose ranks are all on one host, and the branch above it not: the places [begin, end).
  struct Branch {
    int begin, end;
  };

  explicit Route(const Axis& axis);
  const std::vector<int>& here() const { return members_[own_]; }          // the places on this host, in axis order
  const std::vector<int>& elsewhere() const { return elsewhere_; }         // those on others, the next host's first: one order for all of a host
  const std::vector<std::vector<int>>& hosts() const { return members_; }  // the places on each host
  bool is_here(int place) const { return host_of_[static_cast<size_t>(place)] == own_; }
  // The rank of a host that takes what `place`, on another one, has for it.
  int taker(const std::vector<int>& host, int place) const;

  const std::vector<Branch>& branches() const { return branches_; }  // in axis order
  const Branch& own_branch() const { return branches_[branch_]; }
  // The rank of a branch that sums what its ranks have for `owner`, on another host.
  int summer(const Branch& branch, int owner) const;

 private:
  void add_branches(int begin, int end);

  std::vector<size_t> host_of_, index_of_;  // of each place: its host, and the how manieth it is there
  std::vector<std::vector<int>> members_;
  std::vector<int> elsewhere_;
  std::vector<Branch> branches_;
  size_t own_ = 0, branch_ = 0;
};

}  // namespace gingham
