// The microbenchmark's cases: what each runs on one rank, its work, the bytes that docs/theory.md says it receives, and how its result is checked.
#pragma once
#include <string>

#include "ranks.h"

namespace gingham {

// How panels travel between ranks that share memory.
enum class Source { window, ring };

struct Options {
  std::string name = "matmul";
  std::array<int, 3> grid{2, 2, 1};   // pm, pn, pk
  int ranks = 0;                      // of a collective; a matmul has pm pn pk
  int64_t m = 512, k = 512, n = 512;  // a collective moves n elements a rank (all_reduce, broadcast, reduce) or n in all
  bool swapped = false;
  int slices = 1, rounds = 10, warmup = 2;
  Source source = Source::window;
  double latency = 0, bandwidth = 0;
  bool check = false;
  As as = As::processes;
  Device device = Device::cpu;
  Carrier carrier = Carrier::nccl;  // between GPUs; copy wants threads
  DType dtype = DType::f32;
  bool insists = false;  // GINGHAM_COPY_ENGINES, where it is set, must be heeded
  bool tf32 = false;
  bool narrow = false;                                     // C of gemm in the operands' 16-bit type
  bool add = false;                                        // C of gemm is added to
  bool early = false;                                      // W is gathered before the call (between GPUs, where it is cut)
  std::string library = "gingham";                         // cublaslt for gemm, nccl for collectives between GPUs: the yardsticks
  std::function<void(Job&)> before;                        // called before a round is queued
  std::function<void(Job&)> delay;                         // called before the W of an early gather is written
  std::function<void(Job&)> between;                       // called when an early gather has its place and is not yet queued
  std::function<void(Job&)> entered;                       // called when the rank has its GPU, before its axes
  std::function<void(Job&)> after;                         // called when a round has been queued, before it is waited for
  std::function<std::vector<Row>(const RankBody&)> start;  // runs the ranks; none: run_ranks, as `as` says
  bool fractions = false;  // data whose sums round, so that the bits of a result show their order; such a result is not checked
  std::function<void(int rank, const Matrix& result)> see;  // is shown each result on the host, after the last round
  int size() const { return ranks > 0 ? ranks : grid[0] * grid[1] * grid[2]; }
};

// One rank's measurement of a case.
struct Measured {
  double seconds = 0;  // median over the rounds, of the slowest rank
  double flops = 0;    // of all ranks
  double bytes = 0;    // received, summed over ranks, one round
  double formula = 0;  // the same by docs/theory.md section 4
  double messages = 0;
  double crossed = 0;                      // of bytes, what came from another host
  double wrong = 0;                        // elements that differ, summed; -1 not checked
  double algbw_bytes = 0, bus_factor = 0;  // nccl-tests' size and bus factor of a collective
  double workspace = 0;                    // largest high-water mark of a rank
};

void enter(Job& job, const Options& options);  // the rank's device, before its axes
// The same axis. Throws where its messages do not go by what was insisted on: figures would bear another's name.
std::unique_ptr<Axis> as_asked(std::unique_ptr<Axis> axis, const Options& options);
void settle(Job& job);  // waits for what the rank has queued

// Warms up, calls `warm` once, then times options.rounds of once() with prepare() before each; the median in seconds.
double median_of_rounds(const Options& options, const std::function<void()>& prepare, const std::function<void()>& once,
                        const std::function<void()>& warm);

// A case's rows (seconds, bytes, messages, wrong elements or -1, workspace, bytes from other hosts) put together.
Measured over_ranks(const std::vector<Row>& rows);

std::vector<Row> start(const Options& options, const RankBody& body);

Measured run_matmul(const Options& options);      // name: matmul | dx | dw | backward
Measured run_kernel(const Options& options);      // name: gemm (one rank's product) | kernels (each beside its CPU twin)
Row run_gemm(Job& job, const Options& options);   // the first of these, in a rank
Measured run_attention(const Options& options);   // forward and backward over a ring: m places, n heads of k numbers
Measured run_collective(const Options& options);  // name: all_gather | reduce_scatter | all_reduce | broadcast | reduce

}  // namespace gingham
