// What the tests of the device kernels share: strided matrices with watched padding, float64 copies of them, and the table of errors.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/matrix.h"
#include "base/stream.h"

namespace gingham::tests {

class DeviceStream : public Stream {
 public:
  Device device() const override { return Device::cuda; }
  void* allocate(size_t bytes, Heap::Kind) const override;
  void free(void* p) const override;
};

// The host's twin, with workspace from malloc.
class HostStream : public DeviceStream {
 public:
  Device device() const override { return Device::cpu; }
};

struct Layout {
  bool column_major = false;
  int64_t pad = 0;     // elements between the end of a line and the next
  int64_t offset = 0;  // elements before the first
};

// Fresh memory of exactly the view's extent, so that AddressSanitizer sees the first byte outside; random values in [-1, 1] everywhere.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t rows, int64_t cols, DType dtype, Layout layout, std::mt19937& random);
  Buffer copy() const;
  const Matrix& view() const { return view_; }
  std::vector<double> values() const;  // row-major
  // Whether all that lies outside of the view still holds what the other one's does.
  bool same_padding(const Buffer& other) const;

 private:
  std::shared_ptr<char> memory_;
  size_t bytes_ = 0;
  Matrix view_;
};

double load(const Matrix& m, int64_t i, int64_t j);
void store(const Matrix& m, int64_t i, int64_t j, double value);

// Relative error in the Frobenius norm; infinite where a NaN stands.
double error_of(const std::vector<double>& got, const std::vector<double>& want);

// A line of the table: fails the run when error > bound. Lines of one kernel, dtype and shape are merged, the largest error kept.
void report(const std::string& kernel, const std::string& dtype, const std::string& shape, double error, double bound);
void expect(bool ok, const std::string& what);
std::string shape_of(std::initializer_list<int64_t> sizes);

// Runs body with cp.async landing late and early and under several seeds.
void for_every_timing(const std::function<void()>& body);
bool full();  // the full matrices, else the quick subset

struct Case {
  const char* name;
  void (*run)();
};
std::vector<Case>& cases();
struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

}  // namespace gingham::tests
