// Memory: the heap with lengths that vary, what is left of the host's, an allocation that fails on one rank, products of pieces.
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <fstream>

#include "base/memory.h"
#include "collectives/all_gather.h"
#include "collectives/reduce_scatter.h"
#include "core_tests.h"
#include "kernels/blas.h"
#include "kernels/gemm.h"

namespace gingham {
namespace {

uint32_t next(uint32_t& state) { return (state = state * 1664525 + 1013904223) >> 8; }

void heap_of_varying_lengths_is_bounded() {
  run_ranks(1, As::threads, [](Job& job, Program&) -> Row {
    std::vector<std::pair<char*, size_t>> live;
    uint32_t state = 7;
    size_t held = 0, most = 0;
    for (int step = 0; step < 30000; step++) {
      const size_t bytes = 1 + next(state) % (size_t{1} << (10 + next(state) % 11));
      live.push_back({static_cast<char*>(job.heap().allocate(bytes, Heap::Kind::tensor)), bytes});
      memset(live.back().first, step % 251, bytes);
      held += bytes;
      most = std::max(most, held);
      while (held > (size_t{6} << 20)) {
        std::swap(live[next(state) % live.size()], live.back());
        for (size_t i = 1; i < live.back().second; i += 509) EXPECT(live.back().first[i] == live.back().first[0]);
        held -= live.back().second;
        job.heap().free(live.back().first);
        live.pop_back();
      }
    }
    EXPECT(job.heap().usage().reserved <= 3 * most);
    return {};
  });
}

void heap_gives_back_and_takes_again() {
  run_ranks(1, As::threads, [](Job& job, Program&) -> Row {
    Heap& heap = job.heap();
    std::vector<char*> blocks;
    const size_t bytes = size_t{3} << 20;
    for (int i = 0; i < 16; i++) {
      blocks.push_back(static_cast<char*>(heap.allocate(bytes, Heap::Kind::tensor)));
      memset(blocks.back(), i, bytes);
    }
    for (int i = 0; i < 16; i++)
      if (i % 4) heap.free(blocks[static_cast<size_t>(i)]);
    const size_t before = heap.usage().reserved;
    heap.trim(size_t{4} << 20);
    const size_t after = heap.usage().reserved;
    EXPECT(before >= 16 * bytes && after <= 4 * bytes + (size_t{6} << 20) && after >= 4 * bytes);
    heap.trim(0);
    for (int i = 0; i < 16; i++) {
      char* block = blocks[static_cast<size_t>(i)];
      if (i % 4) {
        block = static_cast<char*>(heap.allocate(bytes, Heap::Kind::tensor));
        memset(block, 100 + i, bytes);
        blocks[static_cast<size_t>(i)] = block;
      }
    }
    for (int i = 0; i < 16; i++) EXPECT(blocks[static_cast<size_t>(i)][bytes - 1] == (i % 4 ? 100 + i : i));
    EXPECT(heap.usage().reserved <= before + (size_t{4} << 20));
    return {};
  });
}

void write(const std::string& path, const std::string& text) {
  for (size_t at = path.find('/', 1); at != std::string::npos; at = path.find('/', at + 1)) mkdir(path.substr(0, at).c_str(), 0700);
  std::ofstream(path) << text;
}

void the_least_of_host_and_cgroups_is_left() {
  char folder[] = "/tmp/gingham-memory-XXXXXX";
  const std::string root = mkdtemp(folder);
  write(root + "/proc/meminfo", "MemTotal: 4000 kB\nMemAvailable:    3000 kB\n");
  EXPECT(memory_left(root).bytes == 3000 * 1024 && memory_left(root).whose == "the host");
  // version 2: a limit above the process's own group counts too
  write(root + "/proc/self/cgroup", "0::/job/part\n");
  write(root + "/proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n");
  const std::string two = root + "/sys/fs/cgroup/job/";
  write(two + "part/memory.max", "max\n");
  write(two + "part/memory.current", "5000\n");
  write(two + "memory.max", "1000000\n");
  write(two + "memory.current", "900000\n");
  write(two + "memory.stat", "anon 100000\nfile 300000\ninactive_file 150000\nactive_file 50000\n");
  EXPECT(memory_left(root).bytes == 300000 && has(memory_left(root).whose, "/sys/fs/cgroup/job"));
  // version 1, in a container: the folder mounted is the group itself
  write(root + "/proc/self/cgroup", "4:cpu,memory:/docker/abc\n1:name=systemd:/\n");
  write(root + "/proc/self/mountinfo", "31 20 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
  write(root + "/sys/fs/cgroup/memory/memory.limit_in_bytes", "700000\n");
  write(root + "/sys/fs/cgroup/memory/memory.usage_in_bytes", "600000\n");
  write(root + "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file 20000\ntotal_active_file 30000\n");
  EXPECT(memory_left(root).bytes == 150000);
  EXPECT(system(("rm -r " + root).c_str()) == 0);
}

// One exchange of all ranks: gathers, then sums; both over memory of the heap.
void exchange(Job& job, Program& program, Axis& axis, int64_t n) {
  const int size = job.size();
  program.begin(named("exchange", n));
  struct End {
    Job& job;
    Program& program;
    ~End() { job.end_call(program); }
  } end{job, program};
  const size_t bytes = static_cast<size_t>(n) * sizeof(float);
  const Scratch room(job.stream(), bytes * static_cast<size_t>(size)), own(job.stream(), bytes), sum(job.stream(), bytes);
  for (int64_t i = 0; i < n; i++) reinterpret_cast<float*>(own.data())[i] = static_cast<float>(i + job.rank());
  Shares shares{dense(room.data(), 1, n * size, DType::f32), 1, {0}};
  for (int r = 0; r < size; r++) shares.cuts.push_back(n * (r + 1));
  const std::vector<Matrix> parts = shares.all();
  const Matrix mine = dense(own.data(), 1, n, DType::f32), total = dense(sum.data(), 1, n, DType::f32);
  all_gather(axis, mine, parts, job.stream());
  for (int r = 0; r < size; r++) EXPECT(static_cast<float*>(parts[static_cast<size_t>(r)].data)[n - 1] == static_cast<float>(n - 1 + r));
  reduce_scatter(axis, shares, total, job.stream());
  for (int64_t i = 0; i < n; i += 97) EXPECT(static_cast<float*>(total.data)[i] == static_cast<float>(size * (i + job.rank())));
}

void an_allocation_that_fails_ends_the_call_on_all() {
  for (const bool windowed : {true, false}) {
    std::vector<std::vector<int>> failed(4);
    const auto errors = errors_of(4, [&](Job& job, Program& program) -> Row {
      auto axis = job.axis(program, 0, everyone(4), windowed);
      std::vector<int>& mine = failed[static_cast<size_t>(job.rank())];
      uint32_t state = 3;
      for (int call = 0; call < 120; call++) {
        const int64_t n = 1 + next(state) % 3000;
        const int who = static_cast<int>(next(state) % 4), which = static_cast<int>(next(state) % (windowed ? 3 : 5));
        if (call % 3 == 1 && job.rank() == who) job.heap().fail_after(which);
        try {
          exchange(job, program, *axis, n);
        } catch (const PeerOutOfMemory& error) {
          EXPECT(error.rank == who && has(error.what(), concat("rank ", who, ": the shared heap").c_str()) && has(error.what(), "bytes"));
          mine.push_back(call);
        } catch (const OutOfMemory&) {
          EXPECT(job.rank() == who);
          mine.push_back(call);
        }
      }
      return {};
    });
    for (const std::string& error : errors) CHECK(Failure, error.empty(), error);
    EXPECT(failed[0].size() == 40);
    for (const auto& calls : failed) EXPECT(calls == failed[0]);
  }
}

void an_allocation_between_calls_is_told_at_the_next() {
  const auto errors = errors_of(3, [&](Job& job, Program& program) -> Row {
    auto axis = job.axis(program, 0, everyone(3));
    for (int round = 0; round < 5; round++) {
      exchange(job, program, *axis, 100);
      bool raised = false;
      if (job.rank() == 1) {
        job.heap().fail_after(0);
        try {
          job.heap().allocate(100, Heap::Kind::tensor);
        } catch (const OutOfMemory&) {
          raised = true;
        }
      } else {
        try {
          exchange(job, program, *axis, 200);
        } catch (const PeerOutOfMemory& error) {
          raised = error.rank == 1;
        }
      }
      EXPECT(raised);
      exchange(job, program, *axis, 300);
    }
    return {};
  });
  for (const std::string& error : errors) CHECK(Failure, error.empty(), error);
}

// BLAS counts in 32 bits: sizes and strides beyond are pieces. Here it is told to count to 7.
void products_of_pieces_are_exact() {
  const int64_t most = blas_most;
  run_ranks(1, As::threads, [](Job& job, Program&) -> Row {
    uint32_t state = 5;
    for (int64_t limit : {int64_t{1}, int64_t{7}}) {
      blas_most = limit;
      for (int round = 0; round < 200; round++) {
        int64_t size[3];
        for (int64_t& s : size) s = 1 + next(state) % 20;
        const auto [m, k, n] = size;
        const auto made = [&](std::vector<float>& memory, int64_t rows, int64_t cols) {
          memory.resize(static_cast<size_t>(rows * cols));
          for (float& v : memory) v = static_cast<float>(next(state) % 9) - 4;
          return next(state) % 2 ? dense(memory.data(), rows, cols, DType::f32) : dense(memory.data(), cols, rows, DType::f32).t();
        };
        std::vector<float> va, vb, vc;
        const Matrix a = made(va, m, k), b = made(vb, k, n), c = made(vc, m, n);
        const bool add = next(state) % 2;
        const auto at = [](const Matrix& x, int64_t i, int64_t j) -> float& {
          return static_cast<float*>(x.data)[i * x.row_stride + j * x.col_stride];
        };
        std::vector<float> expected;
        for (int64_t i = 0; i < m; i++)
          for (int64_t j = 0; j < n; j++) {
            float sum = add ? at(c, i, j) : 0;
            for (int64_t p = 0; p < k; p++) sum += at(a, i, p) * at(b, p, j);
            expected.push_back(sum);
          }
        gemm(a, b, c, add, job.stream());
        for (int64_t i = 0; i < m; i++)
          for (int64_t j = 0; j < n; j++) EXPECT(at(c, i, j) == expected[static_cast<size_t>(i * n + j)]);
      }
    }
    return {};
  });
  blas_most = most;
}

}  // namespace

std::vector<Test> memory_tests() {
  return {{"heap of varying lengths is bounded", heap_of_varying_lengths_is_bounded},
          {"heap gives back and takes again", heap_gives_back_and_takes_again},
          {"the least of host and cgroups is left", the_least_of_host_and_cgroups_is_left},
          {"an allocation that fails ends the call on all", an_allocation_that_fails_ends_the_call_on_all},
          {"an allocation between calls is told at the next", an_allocation_between_calls_is_told_at_the_next},
          {"A23 products of pieces are exact", products_of_pieces_are_exact}};
}

}  // namespace gingham
