// Runs the device kernels in the host shim against float64 references.
//   kernel_tests [--full] [--seeds N] [--only SUBSTRING] [--not SUBSTRING]     prints one line per kernel, dtype and shape; exit 1 when one fails
#include "kernel_tests.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <sstream>

#include "kernels/cast.h"
#include "shim.h"

namespace gingham::tests {
namespace {

bool run_full = false;
int seeds = 1;
int failures = 0;
struct Line {
  double error, bound;
  int runs;
};
std::map<std::string, Line> table;

}  // namespace

void* DeviceStream::allocate(size_t bytes, Heap::Kind) const {
  void* p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  memset(p, 0xff, bytes);
  return p;
}

void DeviceStream::free(void* p) const { ::free(p); }

double load(const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = i * m.row_stride + j * m.col_stride;
  switch (m.dtype) {
    case DType::f32:
      return static_cast<const float*>(m.data)[at];
    case DType::f64:
      return static_cast<const double*>(m.data)[at];
    case DType::bf16:
      return widen_bf16(static_cast<const uint16_t*>(m.data)[at]);
    case DType::f16:
      return widen_f16(static_cast<const uint16_t*>(m.data)[at]);
    default:
      return static_cast<const unsigned char*>(m.data)[at * static_cast<int64_t>(size_of(m.dtype))];
  }
}

void store(const Matrix& m, int64_t i, int64_t j, double value) {
  const int64_t at = i * m.row_stride + j * m.col_stride;
  switch (m.dtype) {
    case DType::f32:
      static_cast<float*>(m.data)[at] = static_cast<float>(value);
      break;
    case DType::f64:
      static_cast<double*>(m.data)[at] = value;
      break;
    case DType::bf16:
      static_cast<uint16_t*>(m.data)[at] = narrow_bf16(static_cast<float>(value));
      break;
    case DType::f16:
      static_cast<uint16_t*>(m.data)[at] = narrow_f16(static_cast<float>(value));
      break;
    default:
      static_cast<unsigned char*>(m.data)[at * static_cast<int64_t>(size_of(m.dtype))] = static_cast<unsigned char>(127 * value);
  }
}

Buffer::Buffer(int64_t rows, int64_t cols, DType dtype, Layout layout, std::mt19937& random) {
  const int64_t lines = layout.column_major ? cols : rows, length = layout.column_major ? rows : cols, pitch = length + layout.pad;
  const int64_t count = layout.offset + (lines ? (lines - 1) * pitch + length : 0);
  bytes_ = static_cast<size_t>(count) * size_of(dtype);
  memory_ = std::shared_ptr<char>(static_cast<char*>(malloc(bytes_ ? bytes_ : 1)), ::free);  // 16-byte aligned
  view_ = {memory_.get() + static_cast<size_t>(layout.offset) * size_of(dtype), rows, cols, pitch, 1, dtype};
  if (layout.column_major) view_ = Matrix{view_.data, rows, cols, 1, pitch, dtype};
  const Matrix all = dense(memory_.get(), 1, count, dtype);
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (int64_t j = 0; j < count; j++) store(all, 0, j, uniform(random));
}

Buffer Buffer::copy() const {
  Buffer out = *this;
  out.memory_ = std::shared_ptr<char>(static_cast<char*>(malloc(bytes_ ? bytes_ : 1)), ::free);
  memcpy(out.memory_.get(), memory_.get(), bytes_);
  out.view_.data = out.memory_.get() + (static_cast<char*>(view_.data) - memory_.get());
  return out;
}

std::vector<double> Buffer::values() const {
  std::vector<double> out;
  for (int64_t i = 0; i < view_.rows; i++)
    for (int64_t j = 0; j < view_.cols; j++) out.push_back(load(view_, i, j));
  return out;
}

bool Buffer::same_padding(const Buffer& other) const {
  const size_t unit = size_of(view_.dtype);
  std::vector<char> inside(bytes_ / unit, 0);
  const int64_t first = (static_cast<char*>(view_.data) - memory_.get()) / static_cast<int64_t>(unit);
  for (int64_t i = 0; i < view_.rows; i++)
    for (int64_t j = 0; j < view_.cols; j++) inside[static_cast<size_t>(first + i * view_.row_stride + j * view_.col_stride)] = 1;
  for (size_t at = 0; at < inside.size(); at++)
    if (!inside[at] && memcmp(memory_.get() + at * unit, other.memory_.get() + at * unit, unit) != 0) return false;
  return true;
}

double error_of(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); i++) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  return got.size() == want.size() && std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

void report(const std::string& kernel, const std::string& dtype, const std::string& shape, double error, double bound) {
  char key[128];
  snprintf(key, sizeof key, "%-28s %-9s %-16s", kernel.c_str(), dtype.c_str(), shape.c_str());
  Line& line = table.try_emplace(key, Line{0, bound, 0}).first->second;
  line.error = std::max(line.error, error);
  line.bound = std::min(line.bound, bound);
  line.runs++;
}

void expect(bool ok, const std::string& what) {
  if (ok) return;
  failures++;
  printf("FAILED %s\n", what.c_str());
}

std::string shape_of(std::initializer_list<int64_t> sizes) {
  std::ostringstream out;
  for (int64_t size : sizes) out << (out.tellp() > 0 ? "x" : "") << size;
  return out.str();
}

void for_every_timing(const std::function<void()>& body) {
  for (int seed = 1; seed <= seeds; seed++)
    for (const bool early : {false, true}) {
      shim::set({static_cast<uint64_t>(seed), early});
      body();
    }
}

bool full() { return run_full; }

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

int run_all(const std::string& only, const std::string& not_these) {
  for (const Case& test : cases()) {
    const std::string name = test.name;
    if (name.find(only) == std::string::npos || (!not_these.empty() && name.find(not_these) != std::string::npos) ||
        (name.find("provoked") == 0 && only.empty()))
      continue;
    try {
      test.run();
    } catch (const std::exception& error) {
      expect(false, std::string(test.name) + ": " + error.what());
    }
  }
  printf("%-28s %-9s %-16s %5s %10s %10s\n", "kernel", "dtype", "shape", "runs", "error", "bound");
  for (const auto& [key, line] : table) {
    const bool ok = line.error <= line.bound;
    if (!ok) failures++;
    printf("%s %5d %10.2e %10.2e%s\n", key.c_str(), line.runs, line.error, line.bound, ok ? "" : "  FAILED");
  }
  for (const auto& [access, name] : {std::pair{shim::Access::load, "loads"},
                                     {shim::Access::store, "stores"},
                                     {shim::Access::copy, "cp.async"},
                                     {shim::Access::matrix, "ldmatrix"}}) {
    const shim::Conflicts c = shim::conflicts(access);
    if (c.phases)
      printf("bank conflicts of %-8s  %.3f-way on average, %d-way at worst, %llu phases\n", name,
             static_cast<double>(c.passes) / static_cast<double>(c.phases), c.worst, static_cast<unsigned long long>(c.phases));
  }
  printf("%s\n", failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}

}  // namespace gingham::tests

int main(int argc, char** argv) {
  std::string only, not_these;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    if (word == "--full") gingham::tests::run_full = true;
    if (word == "--seeds" && i + 1 < argc) gingham::tests::seeds = atoi(argv[++i]);
    if (word == "--only" && i + 1 < argc) only = argv[++i];
    if (word == "--not" && i + 1 < argc) not_these = argv[++i];
  }
  return gingham::tests::run_all(only, not_these);
}
