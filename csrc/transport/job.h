// One rank's membership in a job: the shared segment, the control block, this rank's heap, and the axes made from them.
//   [ control | boards: kMaxAxes x size | channels: kMaxAxes x size x size x kLanes | heap of rank 0 | heap of rank 1 | .. ]
// Ranks are processes (each opens rank 0's memfd by path) or threads of one process (they share the Segment object).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "base/stream.h"
#include "transport/control.h"
#include "transport/device.h"
#include "transport/transport.h"

namespace gingham {

constexpr int kMaxAxes = 16;

class Job {
 public:
  // path "": creates the segment (rank 0). Otherwise opens rank 0's.
  Job(int rank, int size, const std::string& path, double timeout);
  Job(int rank, int size, std::shared_ptr<Segment> segment, double timeout);
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  static std::shared_ptr<Segment> make_segment(int size);

  void attach(const std::string& version) { control_->attach(version); }
  // From here on this rank computes on a GPU: its streams, memory and axes are that GPU's. Call after attach(), before axis().
  void use_gpu(int ordinal, Carrier carrier);
  Gpu* gpu() const { return gpu_.get(); }
  void close();
  // In a process forked from this rank, from its first moment on: see transport/fork.h.
  void orphan();
  bool orphaned() const { return control_->orphaned(); }
  Segment& segment() { return *segment_; }
  // index: the axis' number, the same on every rank; members: global ranks in axis order. bandwidth or latency > 0: behind a link.
  std::unique_ptr<Transport> axis(int index, const std::vector<int>& members, double latency, double bandwidth);

  int rank() const { return control_->rank(); }
  int size() const { return control_->size(); }
  Control& control() { return *control_; }
  Heap& heap() { return *heap_; }
  const Stream& host_stream() const { return *stream_; }  // the CPU's, on a GPU job too
  const Stream& stream() const { return gpu_ ? gpu_->stream() : *stream_; }
  Heap::Usage usage() const { return gpu_ ? gpu_->usage() : heap_->usage(); }
  void reset_peak();
  std::string path() const { return segment_->path(); }

 private:
  std::shared_ptr<Segment> segment_;
  std::unique_ptr<Control> control_;
  std::unique_ptr<Heap> heap_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Gpu> gpu_;
  double timeout_;
};

}  // namespace gingham
