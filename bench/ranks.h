// Starts ranks for the microbenchmark and the core's tests: threads of this process (what the sanitizers watch) or forked processes.
// Every rank gets a Job and the program of all ranks, and returns a row of numbers; the rows come back in rank order.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "transport/job.h"

namespace gingham {

using Row = std::vector<double>;
using RankBody = std::function<Row(Job&, Program&)>;

enum class As { threads, processes };

// A matrix where the rank computes (view) and, on a GPU, its twin on the host that is filled and looked at; elsewhere they are one.
class Room {
 public:
  Room(Job& job, int64_t rows, int64_t cols, DType dtype, bool turned = false);  // turned: stored column by column
  const Matrix& view() const { return view_; }
  const Matrix& host() const { return host_; }
  void upload();
  void download() const;

 private:
  Job& job_;
  Scratch host_room_, room_;
  Matrix host_, view_;
};

// Throws Error with the first failing rank's message. A row holds at most 64 numbers.
std::vector<Row> run_ranks(int size, As as, const RankBody& body, double timeout = 60);

}  // namespace gingham
