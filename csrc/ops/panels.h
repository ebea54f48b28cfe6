// How the keys and values of an attention, and their gradients, pass the ranks of an axis: hop h brings this rank the panels of the rank h
// places before it.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "base/stream.h"
#include "kernels/attention.h"
#include "transport/axis.h"

namespace gingham {

// Rows of k and v, or of their gradients.
struct Pair {
  Matrix k, v;
  Pair rows(int64_t begin, int64_t end) const { return {k.slice(0, begin, end), v.slice(0, begin, end)}; }
  Pair of(const Run& run) const { return rows(run.row, run.row + run.count); }
  size_t bytes() const { return k.bytes() + v.bytes(); }
};

// What is posted or sent of a call.
struct PanelCall {
  Axis& axis;
  const Stream& stream;
  std::vector<int64_t> lengths;                                      // of every rank's panels
  std::function<std::vector<Run>(int reader, int owner)> looked_at;  // of a rank's panels, the runs that another one uses
  std::vector<Run> of(int hop) const { return looked_at(axis.rank(), axis.next(-hop)); }
  int64_t length(int hop) const { return lengths[static_cast<size_t>(axis.next(-hop))]; }
};

class Panels {
 public:
  virtual ~Panels() = default;
  virtual void begin() {}        // after the post
  virtual Pair at(int hop) = 0;  // hop 1, 2, .. in order; the panels of the hop before are done with
  virtual void pump() {}         // forwards what has arrived
  virtual void end() {}
};
// panel: the place of k among the posted panels, v comes next.
std::unique_ptr<Panels> window_panels(const PanelCall& call, int panel);
std::unique_ptr<Panels> ring_panels(const PanelCall& call, const Pair& own);

class Sums {
 public:
  virtual ~Sums() = default;
  virtual void expect(int) {}                          // (hop) its product is being made
  virtual void add(int hop, const Pair& product) = 0;  // to the sums of the rank `hop` places before; hops 1, 2, .. in order
  virtual void take(const Pair& own) = 0;              // adds the sums that came home
};
// room: posted as panels `panel` and the next, of this rank's length.
std::unique_ptr<Sums> window_sums(const PanelCall& call, const Pair& room, int panel);
std::unique_ptr<Sums> ring_sums(const PanelCall& call, const Pair& like);

}  // namespace gingham
