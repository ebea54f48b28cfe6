// microbench: the core measured without Python or torch. It starts its own ranks and prints a table in the manner of nccl-tests.
//   microbench matmul --grid 2,2,1 --sizes 512,1024 --check        microbench all_reduce --ranks 4 --sizes 1048576
//   microbench overlap --sizes 1024                                communication behind a link as slow as the computation, S = 1, 2, 4, 8
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <sstream>

#include "cases.h"
#include "kernels/blas.h"

namespace gingham {
namespace {

const char* kUsage =
    "microbench CASE [options]\n"
    "  CASE            matmul | dx | dw | backward | all_gather | reduce_scatter | all_reduce | broadcast | reduce | all | overlap |\n"
    "                  gemm (one rank) | kernels (each beside its CPU twin)\n"
    "  --grid a,b,c    pm, pn, pk of a matmul (2,2,1)       --ranks P       ranks of a collective (4)\n"
    "  --sizes n,..    n x n x n products or n elements     --shape m,k,n   one product of that shape\n"
    "  --source s      window | ring                        --slices S      slices a step (1)\n"
    "  --transport t   shm | link (--latency s --bandwidth bytes/s)         --swapped       n and k trade places\n"
    "  --device d      cpu | cuda (its --transport: nccl, or copy with --as threads: one GPU is enough)\n"
    "  --library l     gingham | cublaslt (gemm) | nccl (its own collectives)  --tf32          fp32 products on tensor cores\n"
    "  --as a          processes | threads                  --dtype d       float32 | float64 | bfloat16 | float16\n"
    "  --rounds R      timed rounds, median (10)            --check         compare with exact integer results; exit 1 on a difference\n"
    "BLAS: GINGHAM_BLAS=path, for instance torch/lib/libtorch_cpu.so; or plain\n";

std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> out;
  std::stringstream in(text);
  for (std::string item; std::getline(in, item, ',');) out.push_back(atoll(item.c_str()));
  return out;
}

struct Command {
  Options options;
  std::vector<int64_t> sizes{512};
  bool shaped = false;
};

Command parse(int argc, char** argv) {
  Command c;
  Options& o = c.options;
  if (argc > 1) o.name = argv[1];
  for (int i = 2; i < argc; i++) {
    const std::string flag = argv[i];
    if (flag == "--check") {
      o.check = true;
      continue;
    }
    if (flag == "--swapped" || flag == "--tf32") {
      (flag == "--swapped" ? o.swapped : o.tf32) = true;
      continue;
    }
    CHECK(Error, i + 1 < argc, "option ", flag, " wants a value\n", kUsage);
    const std::string value = argv[++i];
    const std::vector<int64_t> list = numbers(value);
    if (flag == "--grid" && list.size() == 3)
      o.grid = {static_cast<int>(list[0]), static_cast<int>(list[1]), static_cast<int>(list[2])};
    else if (flag == "--ranks")
      o.ranks = atoi(value.c_str());
    else if (flag == "--sizes")
      c.sizes = list;
    else if (flag == "--shape" && list.size() == 3) {
      o.m = list[0];
      o.k = list[1];
      o.n = list[2];
      c.shaped = true;
    } else if (flag == "--source")
      o.source = value == "ring" ? Source::ring : Source::window;
    else if (flag == "--slices")
      o.slices = atoi(value.c_str());
    else if (flag == "--transport") {
      if (value == "link" && o.bandwidth == 0) o.bandwidth = 1e9;
      o.carrier = value == "copy" ? Carrier::copy : Carrier::nccl;
    } else if (flag == "--device") {
      o.device = value == "cuda" ? Device::cuda : Device::cpu;
      if (o.device == Device::cuda) o.source = Source::ring;
    } else if (flag == "--latency")
      o.latency = atof(value.c_str());
    else if (flag == "--bandwidth")
      o.bandwidth = atof(value.c_str());
    else if (flag == "--as")
      o.as = value == "threads" ? As::threads : As::processes;
    else if (flag == "--dtype")
      o.dtype = value == "float64" ? DType::f64 : value == "bfloat16" ? DType::bf16 : value == "float16" ? DType::f16 : DType::f32;
    else if (flag == "--library")
      o.library = value;
    else if (flag == "--rounds")
      o.rounds = atoi(value.c_str());
    else
      throw Error(concat("unknown option ", flag, " ", value, "\n", kUsage));
  }
  return c;
}

bool is_matmul(const std::string& name) { return name == "matmul" || name == "dx" || name == "dw" || name == "backward"; }

bool is_kernel(const std::string& name) { return name == "gemm" || name == "kernels"; }

void header() {
  printf("# %-14s %6s %18s %7s %6s %6s | %10s %9s %9s %9s | %13s %13s %8s %6s %10s\n", "case", "ranks", "size", "source", "link", "slices", "time us",
         "GFLOP/s", "algbw GB/s", "busbw GB/s", "bytes recv", "formula", "messages", "#wrong", "workspace");
}

// Returns whether everything checked was right and every byte as the formula says.
bool report(const Options& o) {
  const Measured m = is_matmul(o.name) ? run_matmul(o) : is_kernel(o.name) ? run_kernel(o) : run_collective(o);
  char size[64], wrong[32];
  if (is_matmul(o.name) || o.name == "gemm")
    snprintf(size, sizeof(size), "%lldx%lldx%lld", static_cast<long long>(o.m), static_cast<long long>(o.k), static_cast<long long>(o.n));
  else
    snprintf(size, sizeof(size), "%lld", static_cast<long long>(o.n));
  if (m.wrong < 0)
    snprintf(wrong, sizeof(wrong), "N/A");
  else
    snprintf(wrong, sizeof(wrong), "%lld", static_cast<long long>(m.wrong));
  const double algbw = m.algbw_bytes / m.seconds * 1e-9;
  printf("  %-14s %6d %18s %7s %6s %6d | %10.1f %9.2f %9.3f %9.3f | %13.0f %13.0f %8.0f %6s %10.0f\n", o.name.c_str(), o.size(), size,
         o.source == Source::ring ? "ring" : "window", o.bandwidth > 0 || o.latency > 0 ? "yes" : "no", o.slices, m.seconds * 1e6,
         m.flops / m.seconds * 1e-9, algbw, algbw * m.bus_factor, m.bytes, m.formula, m.messages, wrong, m.workspace);
  fflush(stdout);
  return m.wrong <= 0 && (m.bytes == m.formula || o.library != "gingham");  // a yardstick's bytes are not counted
}

// 2 ranks, X gathered over n: the link is set so that moving X takes as long as multiplying, and slices hide one behind the other. Every
// ratio is the median of interleaved pairs (without the link, with it), since the machine's speed drifts.
bool overlap(Options o) {
  constexpr int kPairs = 7;
  o.name = "matmul";
  o.grid = {1, 2, 1};
  o.rounds = 5;
  Options bare = o;
  bare.slices = 1;
  const double compute = run_matmul(bare).seconds;
  const double bytes = static_cast<double>(o.m) * static_cast<double>(o.k) / 2 * static_cast<double>(size_of(o.dtype));
  o.bandwidth = bytes / compute;
  printf("# overlap: computation %.1f us, link %.3f GB/s so that communication takes the same; limit at S slices: 1 + 1/S\n", compute * 1e6,
         o.bandwidth * 1e-9);
  printf("# %8s %7s %10s %22s\n", "slices", "source", "time us", "time / max(comp, comm)");
  bool good = true;
  for (Source source : {Source::window, Source::ring})
    for (int slices : {1, 2, 4, 8}) {
      o.slices = slices;
      o.source = source;
      std::vector<double> ratios, times;
      for (int i = 0; i < kPairs; i++) {
        const double base = run_matmul(bare).seconds;
        times.push_back(run_matmul(o).seconds);
        ratios.push_back(times.back() / std::max(compute, base));
      }
      std::sort(ratios.begin(), ratios.end());
      std::sort(times.begin(), times.end());
      const double ratio = ratios[kPairs / 2];
      printf("  %8d %7s %10.1f %22.3f\n", slices, source == Source::ring ? "ring" : "window", times[kPairs / 2] * 1e6, ratio);
      fflush(stdout);
      good = good && (slices != 1 || ratio >= 1.8) && (slices != 8 || ratio <= 1.25);
    }
  printf("# S = 1 >= 1.8 (the link is real) and S = 8 <= 1.25: %s\n", good ? "yes" : "no");
  return true;
}

int main_of(int argc, char** argv) {
  if (argc < 2 || std::string(argv[1]) == "--help") {
    fputs(kUsage, stdout);
    return argc < 2 ? 2 : 0;
  }
  Command command = parse(argc, argv);
  const std::vector<std::string> all{"matmul", "dx", "dw", "backward", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"};
  std::vector<std::string> names{command.options.name};
  if (names[0] == "all") names = all;
  CHECK(Error, names[0] == "overlap" || is_kernel(names[0]) || std::find(all.begin(), all.end(), names[0]) != all.end(), "unknown case ", names[0],
        "\n", kUsage);
  printf("# gingham microbench; BLAS: %s; ranks as %s\n", blas().from.c_str(), command.options.as == As::threads ? "threads" : "processes");
  bool good = true;
  if (names[0] != "overlap") header();
  for (const std::string& name : names)
    for (int64_t n : command.shaped ? std::vector<int64_t>{0} : command.sizes) {
      Options o = command.options;
      o.name = name;
      if (!command.shaped) o.m = o.k = o.n = n;
      if (is_matmul(name) || is_kernel(name))
        o.ranks = is_kernel(name) ? 1 : 0;
      else if (name != "overlap" && o.ranks == 0)
        o.ranks = o.grid[0] * o.grid[1] * o.grid[2];
      good = (name == "overlap" ? overlap(o) : report(o)) && good;
    }
  return good ? 0 : 1;
}

}  // namespace
}  // namespace gingham

int main(int argc, char** argv) {
  try {
    return gingham::main_of(argc, argv);
  } catch (const std::exception& error) {
    fprintf(stderr, "microbench: %s\n", error.what());
    return 2;
  }
}
