// One rank's membership in a job: the shared segment, the control block, this rank's heap, and the programs and axes made from them.
//   [ control | heap of the host's first rank | of its second | .. ]   a program's state lies in the heap of its first rank on the host:
//   [ its block and records | of each axis: notices, channels ]
// Ranks are processes (each opens the memfd of the host's first rank by path) or threads of one process (they share the Segment object).
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/stream.h"
#include "control/program.h"
#include "transport/axis.h"
#include "transport/device.h"
#include "transport/hosts.h"

namespace gingham {

class Job {
 public:
  // locals: the ranks on this host (none given: all). path "": creates their segment (the first of them), with `heap` bytes of address
  // space for each (0: as much as memory can be had). Otherwise opens the first one's, whose nonce() it must hold.
  Job(int rank, int size, const std::string& path, double timeout, size_t heap = 0, std::vector<int> locals = {}, uint64_t nonce = 0);
  Job(int rank, int size, std::shared_ptr<Segment> segment, double timeout, std::vector<int> locals = {});
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  static std::shared_ptr<Segment> make_segment(int size, size_t heap = 0);

  void attach(const std::string& version, const std::vector<int>& pids = {}) { control_->attach(version, pids); }
  // Collective over the members; lines: of each axis that will be made, how many ranks its lines have. See Program.
  std::shared_ptr<Program> program(uint64_t id, std::vector<int> members, const std::vector<int>& lines, double timeout);
  // From here on its programs may have ranks on other hosts.
  void span(std::unique_ptr<Hosts> hosts);
  uint64_t nonce() const;
  std::string told(uint64_t program);  // what this host's ranks say of themselves to others; 0: of no program
  void end_call(Program& program);     // on the way out of a call of the binding
  // From here on this rank computes on a GPU: its streams, memory and axes are that GPU's. Call after attach(), before axis().
  void use_gpu(int ordinal, Carrier carrier);
  Gpu* gpu() const { return gpu_.get(); }
  void close();
  // In a process forked from this rank, from its first moment on: see transport/fork.h.
  void orphan();
  bool orphaned() const { return control_->orphaned(); }
  Segment& segment() { return *segment_; }
  // index: the axis' number in its program, the same on every rank; members: ranks of the program in axis order. windowed: through the
  // window where the ranks share memory, else along the ring. bandwidth or latency > 0: behind a link.
  std::unique_ptr<Axis> axis(Program& program, int index, const std::vector<int>& members, bool windowed = true, double latency = 0,
                             double bandwidth = 0);

  int rank() const { return control_->rank(); }
  int size() const { return control_->size(); }
  Control& control() { return *control_; }
  Heap& heap() { return *heap_; }
  const Stream& host_stream() const { return *stream_; }  // the CPU's, on a GPU job too
  const Stream& stream() const { return gpu_ ? gpu_->stream() : *stream_; }
  Heap::Usage usage() const { return gpu_ ? gpu_->usage() : heap_->usage(); }
  void reset_peak();
  std::string path() const { return segment_->path(); }
  size_t heap_bytes() const { return heap_bytes_; }
  // An allocation of this rank failed: tells the ranks of the program that called for it.
  void out_of_memory(const std::string& message);

 private:
  void reset(Program& program);
  std::shared_ptr<Segment> segment_;
  std::unique_ptr<Hosts> hosts_;
  std::unique_ptr<Control> control_;
  std::unique_ptr<Heap> heap_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Gpu> gpu_;
  size_t heap_bytes_;
  std::mutex programs_lock_;
  std::vector<std::weak_ptr<Program>> programs_;
};

// While in scope, what this thread allocates is for a call of the program.
class Calling {
 public:
  explicit Calling(Program* program) : before_(current) { current = program; }
  ~Calling() { current = before_; }
  Calling(const Calling&) = delete;
  Calling& operator=(const Calling&) = delete;

 private:
  friend class Job;
  static thread_local Program* current;
  Program* before_;
};

}  // namespace gingham
