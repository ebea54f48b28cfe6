// microbench: the core measured without Python or torch. It starts its own ranks and prints a table in the manner of nccl-tests.
//   microbench matmul --grid 2,2,1 --sizes 512,1024 --check        microbench all_reduce --ranks 4 --sizes 1048576
//   microbench overlap --sizes 1024                                communication behind a link as slow as the computation, S = 1, 2, 4, 8
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "cases.h"
#include "kernels/blas.h"

namespace gingham {
namespace {

const char* kUsage =
    "usage: microbench CASE [options]\n"
    "\n"
    "Starts its own ranks, measures one case and prints a table in the manner of nccl-tests.\n"
    "\n"
    "cases:\n"
    "  matmul, dx, dw, backward      a product on a grid, the gradients of its operands, and both in one step\n"
    "  all_gather, reduce_scatter, all_reduce, broadcast, reduce\n"
    "  all                           each of the above\n"
    "  overlap                       a product behind a link as slow as itself, in 1, 2, 4 and 8 slices\n"
    "  attention                     causal, both ways, over a zigzag ring: --shape TIME,WIDTH,HEADS (--sizes: 8 heads of 64)\n"
    "  gemm                          one rank's product\n"
    "  kernels                       each GPU kernel beside its CPU twin\n"
    "\n"
    "options:\n"
    "  --grid PM,PN,PK               ranks of a product (default 2,2,1)\n"
    "  --ranks P                     ranks of a collective (default: as many as the grid has)\n"
    "  --sizes N,..                  n x n x n products, or n elements of a collective (default 512)\n"
    "  --shape M,K,N                 one product of that shape instead\n"
    "  --dtype TYPE                  float32 | float64 | bfloat16 | float16 (default float32)\n"
    "  --slices S                    slices of a step (default 1)\n"
    "  --swapped                     n and k trade places\n"
    "  --source SOURCE               window | ring (default window; ring on GPUs)\n"
    "  --as AS                       ranks are processes | threads (default processes)\n"
    "  --transport T                 shm | link, as slow as --latency and --bandwidth say | nccl | copy (GPUs; copy wants --as threads)\n"
    "  --latency SECONDS             of a message on the link (default 0)\n"
    "  --bandwidth BYTES             a second on the link (default 1e9 with --transport link)\n"
    "  --device DEVICE               cpu | cuda (default cpu)\n"
    "  --library LIBRARY             gingham | cublaslt (gemm) | nccl (collectives): whose is measured (default gingham)\n"
    "  --tf32                        float32 products on tensor cores\n"
    "  --narrow                      gemm: C in the operands' 16-bit type, rounded once (default: its fp32 sums)\n"
    "  --add                         gemm: C += A B\n"
    "  --rounds R                    timed rounds, of which the median counts (default 10)\n"
    "  --check                       compare with exact integer results, gemm with the host's product; status 1 on a difference\n"
    "  --help                        this text\n"
    "\n"
    "GINGHAM_BLAS names the BLAS: a path, for instance torch/lib/libtorch_cpu.so, or plain.\n";

const std::vector<std::string> kCases{"matmul",    "dx",     "dw",  "backward", "all_gather", "reduce_scatter", "all_reduce",
                                      "broadcast", "reduce", "all", "overlap",  "gemm",       "kernels",        "attention"};

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

constexpr int64_t kMost = 1 << 30;

// The numbers of an option, `count` of them (0: any), each from 1 to `most`.
std::vector<int64_t> numbers(const std::string& flag, const std::string& text, size_t count, int64_t most = INT64_MAX) {
  std::vector<int64_t> out;
  std::stringstream in(text + ",");
  bool good = true;
  for (std::string item; std::getline(in, item, ',');) {
    good = good && !item.empty() && item.size() < 19 && item.find_first_not_of("0123456789") == std::string::npos;
    out.push_back(atoll(item.c_str()));
    good = good && out.back() >= 1 && out.back() <= most;
  }
  const std::string limits = concat("of at least 1", most < INT64_MAX ? concat(" and at most ", most) : std::string());
  const std::string expected = count == 0   ? concat("numbers ", limits, " such as 512,1024")
                               : count == 1 ? concat("a whole number ", limits)
                                            : concat("numbers ", limits, ", three such as 2,2,1");
  CHECK(Error, good && (count == 0 || out.size() == count), flag, " '", text, "': expected ", expected);
  return out;
}

int number(const std::string& flag, const std::string& text) { return static_cast<int>(numbers(flag, text, 1, kMost)[0]); }

double real(const std::string& flag, const std::string& text, bool zero) {
  char* end = nullptr;
  const double value = strtod(text.c_str(), &end);
  CHECK(Error, !text.empty() && *end == '\0' && std::isfinite(value) && (zero ? value >= 0 : value > 0), flag, " '", text, "': expected a number ",
        zero ? "of at least 0" : "above 0");
  return value;
}

std::string one_of(const std::string& flag, const std::string& text, const std::vector<std::string>& words) {
  CHECK(Error, std::find(words.begin(), words.end(), text) != words.end(), flag, " '", text, "': expected one of ", joined(words));
  return text;
}

struct Command {
  Options options;
  std::vector<int64_t> sizes{512};
  bool shaped = false;
};

// An option of numbers; whether it is one.
bool take_number(Command& c, const std::string& flag, const std::string& value) {
  Options& o = c.options;
  if (flag == "--grid") {
    const std::vector<int64_t> parts = numbers(flag, value, 3, kMost);
    o.grid = {static_cast<int>(parts[0]), static_cast<int>(parts[1]), static_cast<int>(parts[2])};
  } else if (flag == "--sizes") {
    c.sizes = numbers(flag, value, 0);
  } else if (flag == "--shape") {
    const std::vector<int64_t> parts = numbers(flag, value, 3);
    o.m = parts[0], o.k = parts[1], o.n = parts[2];
    c.shaped = true;
  } else if (flag == "--ranks") {
    o.ranks = number(flag, value);
  } else if (flag == "--slices") {
    o.slices = number(flag, value);
  } else if (flag == "--rounds") {
    o.rounds = number(flag, value);
  } else if (flag == "--latency") {
    o.latency = real(flag, value, true);
  } else if (flag == "--bandwidth") {
    o.bandwidth = real(flag, value, false);
  } else {
    return false;
  }
  return true;
}

// An option of words; whether it is one.
bool take_word(Options& o, const std::string& flag, const std::string& value) {
  if (flag == "--source") {
    o.source = one_of(flag, value, {"window", "ring"}) == "ring" ? Source::ring : Source::window;
  } else if (flag == "--transport") {
    one_of(flag, value, {"shm", "link", "nccl", "copy"});
    if (value == "link" && o.bandwidth == 0) o.bandwidth = 1e9;
    o.carrier = value == "copy" ? Carrier::copy : Carrier::nccl;
  } else if (flag == "--device") {
    o.device = one_of(flag, value, {"cpu", "cuda"}) == "cuda" ? Device::cuda : Device::cpu;
    if (o.device == Device::cuda) o.source = Source::ring;
  } else if (flag == "--as") {
    o.as = one_of(flag, value, {"processes", "threads"}) == "threads" ? As::threads : As::processes;
  } else if (flag == "--dtype") {
    one_of(flag, value, {"float32", "float64", "bfloat16", "float16"});
    o.dtype = value == "float64" ? DType::f64 : value == "bfloat16" ? DType::bf16 : value == "float16" ? DType::f16 : DType::f32;
  } else if (flag == "--library") {
    o.library = one_of(flag, value, {"gingham", "cublaslt", "nccl"});
  } else {
    return false;
  }
  return true;
}

Command parse(int argc, char** argv) {
  Command c;
  Options& o = c.options;
  o.name = argc > 1 ? argv[1] : "";
  CHECK(Error, std::find(kCases.begin(), kCases.end(), o.name) != kCases.end(), "case '", o.name, "': expected one of ", joined(kCases),
        "; see --help");
  for (int i = 2; i < argc; i++) {
    const std::string flag = argv[i];
    if (flag == "--check") {
      o.check = true;
    } else if (flag == "--swapped") {
      o.swapped = true;
    } else if (flag == "--tf32") {
      o.tf32 = true;
    } else if (flag == "--narrow") {
      o.narrow = true;
    } else if (flag == "--add") {
      o.add = true;
    } else {
      const std::string value = i + 1 < argc ? argv[i + 1] : "";
      CHECK(Error, take_number(c, flag, value) || take_word(o, flag, value), "unknown option ", flag, "; see --help");
      i++;
    }
  }
  return c;
}

bool is_matmul(const std::string& name) { return name == "matmul" || name == "dx" || name == "dw" || name == "backward"; }

// Collectives that add: gingham's take the accumulators, into which 16-bit operands are summed.
bool adds_parts(const std::string& name) { return name == "reduce_scatter" || name == "all_reduce" || name == "reduce"; }

bool is_kernel(const std::string& name) { return name == "gemm" || name == "kernels"; }

void header() {
  printf("# %-14s %6s %18s %7s %6s %6s | %10s %9s %9s %9s | %13s %13s %8s %6s %10s\n", "case", "ranks", "size", "source", "link", "slices", "time us",
         "GFLOP/s", "algbw GB/s", "busbw GB/s", "bytes recv", "formula", "messages", "#wrong", "workspace");
}

Measured measure(const Options& o) {
  if (is_matmul(o.name)) return run_matmul(o);
  if (is_kernel(o.name)) return run_kernel(o);
  return o.name == "attention" ? run_attention(o) : run_collective(o);
}

// A product of one rank says whose it is and the type of C.
std::string title(const Options& o) {
  const DType out = o.narrow ? o.dtype : accumulator(o.dtype);
  const char* type = out == DType::f64 ? "f64" : out == DType::f32 ? "f32" : out == DType::bf16 ? "bf16" : "f16";
  return o.name == "gemm" ? concat(o.library == "cublaslt" ? "cublaslt" : "gemm", o.add ? "+>" : ">", type) : o.name;
}

// Returns whether everything checked was right and every byte as the formula says.
bool report(const Options& o) {
  const Measured m = measure(o);
  char size[64], wrong[32];
  if (is_matmul(o.name) || o.name == "gemm" || o.name == "attention")
    snprintf(size, sizeof(size), "%lldx%lldx%lld", static_cast<long long>(o.m), static_cast<long long>(o.k), static_cast<long long>(o.n));
  else
    snprintf(size, sizeof(size), "%lld", static_cast<long long>(o.n));
  if (m.wrong < 0)
    snprintf(wrong, sizeof(wrong), "N/A");
  else
    snprintf(wrong, sizeof(wrong), "%lld", static_cast<long long>(m.wrong));
  const double algbw = m.algbw_bytes / m.seconds * 1e-9;
  printf("  %-14s %6d %18s %7s %6s %6d | %10.1f %9.2f %9.3f %9.3f | %13.0f %13.0f %8.0f %6s %10.0f\n", title(o).c_str(), o.size(), size,
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
  for (int i = 1; i < argc; i++)
    if (std::string(argv[i]) == "--help" || std::string(argv[i]) == "-h") {
      fputs(kUsage, stdout);
      return 0;
    }
  Command command = parse(argc, argv);
  command.options.insists = true;
  const std::vector<std::string> all{"matmul", "dx", "dw", "backward", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"};
  std::vector<std::string> names{command.options.name};
  if (names[0] == "all") names = all;
  if (size_of(command.options.dtype) == 2) {
    std::erase_if(names, adds_parts);
    CHECK(Error, !names.empty(), command.options.name, " with dtype ", name_of(command.options.dtype),
          ", expected float32 or float64: sums of 16-bit operands travel in float32");
  }
  printf("# gingham microbench; BLAS: %s; ranks as %s\n", blas().from.c_str(), command.options.as == As::threads ? "threads" : "processes");
  bool good = true;
  if (command.options.name == "all" && names.size() < all.size())
    printf("# reduce_scatter, all_reduce and reduce are left out: sums of %s travel in float32\n", name_of(command.options.dtype));
  if (names[0] != "overlap") header();
  for (const std::string& name : names)
    for (int64_t n : command.shaped ? std::vector<int64_t>{0} : command.sizes) {
      Options o = command.options;
      o.name = name;
      if (!command.shaped) o.m = o.k = o.n = n;
      if (name == "attention") {
        o.source = Source::ring;
        if (!command.shaped) o.k = 64, o.n = 8;
      }
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
