#include "kernels/dropout.h"

#include <algorithm>

#include "base/vectorise.h"
#include "kernels/cast.h"

namespace gingham {
namespace {

constexpr int kLanes = 64;  // counters drawn side by side, so that the rounds vectorise

VECTORISED void philox(uint64_t first, uint64_t call, uint32_t k0, uint32_t k1, int count, uint32_t (*out)[kLanes]) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < count; i++) {
    const uint64_t n = first + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(n);
    c1[i] = static_cast<uint32_t>(n >> 32);
    c2[i] = static_cast<uint32_t>(call);
    c3[i] = static_cast<uint32_t>(call >> 32);
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < count; i++) {
      const uint64_t a = uint64_t{0xD2511F53} * c0[i], b = uint64_t{0xCD9E8D57} * c2[i];
      const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(b);
      c3[i] = static_cast<uint32_t>(a);
      c0[i] = n0;
      c2[i] = n2;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  std::copy(c0, c0 + count, out[0]);
  std::copy(c1, c1 + count, out[1]);
  std::copy(c2, c2 + count, out[2]);
  std::copy(c3, c3 + count, out[3]);
}

// splitmix64: spreads (seed, name) over the key's 64 bits.
uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Elements [index, index + n) of the global tensor, contiguous here.
template <class T, class Scale>
void run(const T* x, T* y, uint64_t index, int64_t n, const DropoutKey& key, uint32_t k0, uint32_t k1, uint32_t threshold, Scale scale) {
  uint32_t words[4][kLanes];
  for (int64_t done = 0; done < n;) {
    const uint64_t begin = index + static_cast<uint64_t>(done);
    const uint64_t first = begin / 4;
    const int64_t skip = static_cast<int64_t>(begin % 4);
    const int64_t take = std::min<int64_t>(n - done, 4 * kLanes - skip);
    philox(first, key.call, k0, k1, static_cast<int>((skip + take + 3) / 4), words);
    for (int64_t j = 0; j < take; j++) {
      const int64_t at = skip + j;
      y[done + j] = words[at % 4][at / 4] >= threshold ? scale(x[done + j]) : T(0);
    }
    done += take;
  }
}

}  // namespace

DropoutDraw draw_of(const DropoutKey& key) {
  const uint64_t mixed = mix(mix(key.seed) ^ key.name);
  return {static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32), static_cast<uint32_t>(std::min(key.p * 4294967296.0, 4294967295.0)),
          key.p < 1 ? 1.0 / (1.0 - key.p) : 0.0};
}

DropoutRuns runs_of(const std::vector<int64_t>& local, const std::vector<int64_t>& global, const std::vector<int64_t>& offset) {
  DropoutRuns runs;
  const size_t d = local.size();
  int64_t count = 1, stride = 1;
  for (int64_t n : local) count *= n;
  if (count == 0) return runs;
  size_t inner = d;
  while (inner > 0) {
    inner--;
    runs.length *= local[inner];
    if (local[inner] != global[inner]) break;
  }
  runs.count = count / runs.length;
  if (d == 0) return runs;
  for (size_t i = inner + 1; i < d; i++) stride *= global[i];
  runs.first = offset[inner] * stride;
  int64_t weight = stride * global[inner];
  CHECK(ShapeError, inner <= DropoutRuns::kDims, "dropout over ", d, " dims, of which ", inner, " lie outside the run; at most ", DropoutRuns::kDims);
  for (size_t i = inner; i-- > 0;) {
    runs.local[runs.dims] = local[i];
    runs.offset[runs.dims] = offset[i];
    runs.weight[runs.dims++] = weight;
    weight *= global[i];
  }
  return runs;
}

void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, dropout(x, y, dtype, local, global, offset, key, stream));
  const DropoutRuns runs = runs_of(local, global, offset);
  const auto [k0, k1, threshold, keep] = draw_of(key);
  const float keep32 = static_cast<float>(keep);
  for (int64_t r = 0; r < runs.count; r++) {
    const int64_t at = r * runs.length;
    auto go = [&, k0 = k0, k1 = k1, threshold = threshold](auto* in, auto* out, auto scale) {
      run(in + at, out + at, runs.index(r), runs.length, key, k0, k1, threshold, scale);
    };
    switch (dtype) {
      case DType::f32:
        go(static_cast<const float*>(x), static_cast<float*>(y), [=](float v) { return v * keep32; });
        break;
      case DType::f64:
        go(static_cast<const double*>(x), static_cast<double*>(y), [keep = keep](double v) { return v * keep; });
        break;
      case DType::bf16:
        go(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), [=](uint16_t v) { return narrow_bf16(widen_bf16(v) * keep32); });
        break;
      case DType::f16:
        go(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), [=](uint16_t v) { return narrow_f16(widen_f16(v) * keep32); });
        break;
      default:
        throw ShapeError(concat("dropout of ", name_of(dtype)));
    }
  }
}

namespace {

template <class T>
void keep(T* factors, uint64_t index, int64_t n, const DropoutKey& key) {
  const DropoutDraw draw = draw_of(key);
  std::fill_n(factors, n, static_cast<T>(draw.keep));
  run(factors, factors, index, n, key, draw.k0, draw.k1, draw.threshold, [](T factor) { return factor; });
}

}  // namespace

void keep_run(float* factors, uint64_t index, int64_t n, const DropoutKey& key) { keep(factors, index, n, key); }
void keep_run(double* factors, uint64_t index, int64_t n, const DropoutKey& key) { keep(factors, index, n, key); }

}  // namespace gingham
