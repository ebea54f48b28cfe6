// Starts ranks for the microbenchmark and the core's tests: threads of this process (what the sanitizers watch) or forked processes.
// Every rank gets a Job and returns a row of numbers; the rows come back in rank order.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "transport/job.h"

namespace gingham {

using Row = std::vector<double>;
using RankBody = std::function<Row(Job&)>;

enum class As { threads, processes };

// Throws Error with the first failing rank's message. A row holds at most 64 numbers.
std::vector<Row> run_ranks(int size, As as, const RankBody& body, double timeout = 60);

}  // namespace gingham
