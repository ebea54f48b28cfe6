// The start-up check of the sm_90a products against those of gemm_tile.cuh.
#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>

#include "kernels/gemm_sm90.cuh"

#ifndef GINGHAM_SHIM
#include "kernels/gemm_sm90_launch.cuh"

namespace gingham::cuda {
namespace {

// Whole numbers from -4 to 4.
template <class T>
__global__ void fill_kernel(T* to, int count, uint32_t seed) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= static_cast<uint32_t>(count)) return;
  uint32_t x = (i + seed) * 0x9E3779B9u;
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  narrow(static_cast<float>((x >> 16) % 9) - 4.0f, to[i]);
}

template <class V>
__global__ void compare_kernel(const V* a, const V* b, int count, int* differ) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count && !(a[i] == b[i])) *differ = 1;
}

constexpr int kRows = 136, kCols = 456, kDeep = 392;   // tiles cut on every side; more steps than stages, and no multiple
constexpr int kPiece = 256, kPieceSize = 256 * kCols;  // of K, and of the sums of a piece: whole tiles of rows
constexpr int kBlock = 256;

template <class T>
void fill(T* to, int count, uint32_t seed, const Stream& stream) {
  launch(stream, fill_kernel<T>, dim3(static_cast<unsigned>(ceil_div(count, kBlock))), kBlock, 0, to, count, seed);
}

void reference(const Operands& p, const Store<Bf16>& store, const Stream& stream) { gemm_bf16(p, store, TileSize::small, stream); }
void reference(const Operands& p, const Store<F16>& store, const Stream& stream) { gemm_f16(p, store, TileSize::small, stream); }

Operands operands_of(const void* a, const void* b, bool a_along_k, bool b_along_k) {
  Operands p{};
  p.a = a;
  p.b = b;
  p.a_along_k = a_along_k;
  p.b_along_k = b_along_k;
  p.lda = a_along_k ? kDeep : kRows;
  p.ldb = b_along_k ? kDeep : kCols;
  p.aligned = true;
  p.m = kRows;
  p.n = kCols;
  p.k = p.piece = kDeep;
  return p;
}

template <class T>
Store<T> adding_to(float* c) {
  Store<T> store;
  store.c = View<float>(dense(c, kRows, kCols, DType::f32));
  store.add = store.aligned = true;
  return store;
}

// Two pieces of K, one behind the other.
template <class T>
Store<T> pieces_in(float* c) {
  Store<T> store = adding_to<T>(c);
  store.add = false;
  store.piece_stride = kPieceSize;
  return store;
}

// Sums through slabs: with a result in 16 bits beside the sums.
template <class T>
Store<T> adding_with(float* c, T* z) {
  Store<T> store = adding_to<T>(c);
  store.tail.z = View<T>(dense(z, kRows, kCols, std::is_same_v<T, Bf16> ? DType::bf16 : DType::f16));
  return store;
}

// Results in 16 bits alone, which take another way out.
template <class T>
Store<T> rounding_to(T* z, const T* bias) {
  constexpr DType dtype = std::is_same_v<T, Bf16> ? DType::bf16 : DType::f16;
  Store<T> store;
  store.keep = false;
  store.aligned = true;
  store.tail.z = View<T>(dense(z, kRows, kCols, dtype));
  store.tail.bias = View<T>(repeated(dense(const_cast<T*>(bias), 1, kCols, dtype), kRows));
  return store;
}

template <class V>
void demand_equal(const V* one, const V* two, int* flags, const Stream& stream) {
  constexpr int count = kRows * kCols;
  launch(stream, compare_kernel<V>, dim3(static_cast<unsigned>(ceil_div(count, kBlock))), kBlock, 0, one, two, count, flags);
}

// Device memory: flags[0] becomes 1 where the results differ, flags[1] where a wait had no end.
template <class T>
void compare(int* flags, const Stream& stream) {
  constexpr int count = kRows * kCols;
  const Scratch room_a(stream, sizeof(T) * kRows * kDeep), room_b(stream, sizeof(T) * kDeep * kCols), room_c(stream, 4 * sizeof(float) * kPieceSize),
      room_z(stream, sizeof(T) * count);
  T *a = reinterpret_cast<T*>(room_a.data()), *b = reinterpret_cast<T*>(room_b.data());
  float *one = reinterpret_cast<float*>(room_c.data()), *two = one + 2 * kPieceSize;
  fill(a, kRows * kDeep, 1, stream);
  fill(b, kDeep * kCols, 2, stream);
  for (int order = 0; order < 4; order++)
    for (const int wide : {128, 256}) {
      const Operands p = operands_of(a, b, order & 1, order & 2);
      const Tiling tiling{wide, {1, 4}};  // blocks of 4, 2, 1 and 1 tiles, 128 columns wide, or of 2, 1 and 1
      CHECK(DeviceError, sm90_takes(p), "the allocator's memory is not aligned to 16 bytes");
      fill(one, count, 3, stream);
      fill(two, count, 3, stream);
      run_sm90(p, adding_to<T>(one), tiling, flags + 1, stream);
      reference(p, adding_to<T>(two), stream);
      demand_equal(one, two, flags, stream);
      run_sm90(p, adding_with<T>(one, reinterpret_cast<T*>(room_z.data())), tiling, flags + 1, stream);
      reference(p, adding_to<T>(two), stream);
      demand_equal(one, two, flags, stream);
      Operands cut = p;
      cut.piece = kPiece;
      run_sm90(cut, pieces_in<T>(one), tiling, flags + 1, stream);
      reference(cut, pieces_in<T>(two), stream);
      for (const int at : {0, kPieceSize}) demand_equal(one + at, two + at, flags, stream);
      T *first = reinterpret_cast<T*>(one), *second = reinterpret_cast<T*>(two);
      run_sm90(p, rounding_to<T>(first, a), tiling, flags + 1, stream);
      reference(p, rounding_to<T>(second, a), stream);
      demand_equal(reinterpret_cast<const uint16_t*>(first), reinterpret_cast<const uint16_t*>(second), flags, stream);
    }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Empty where all is well.
std::string examine(int device, const Stream& stream) {
  const char* wish = getenv("GINGHAM_SM90");
  if (wish && strcmp(wish, "0") == 0) return "GINGHAM_SM90=0";
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device), minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return concat("the device has compute capability ", major, ".", minor, ", not 9.0");
  if (!encode_tiled()) return "the driver has no cuTensorMapEncodeTiled";
  const Scratch room(stream, 2 * sizeof(int));
  int* flags = reinterpret_cast<int*>(room.data());
  int found[2] = {0, 0};
  CUDA_CHECK(cudaMemsetAsync(flags, 0, sizeof found, native(stream)));
  compare<Bf16>(flags, stream);
  compare<F16>(flags, stream);
  CUDA_CHECK(cudaMemcpyAsync(found, flags, sizeof found, cudaMemcpyDeviceToHost, native(stream)));
  CUDA_CHECK(cudaStreamSynchronize(native(stream)));
  if (found[1]) return "a wait of the check had no end";
  if (found[0]) return "its results differ from those of the sm_80 kernels";
  return "";
}

struct Verdict {
  bool on = false;
  std::string why = "not checked yet: it is when the first product needs it";
};

std::mutex mutex;
std::map<int, Verdict>& verdicts() {
  static std::map<int, Verdict> found;
  return found;
}

int current_device() {
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

// After an error of the check. One that CUDA still reports when it has been read is the context's end: every later call of the process would
// fail with it, far from here.
void demand_a_live_context(int device, const Stream& stream, const std::string& why) {
  cudaGetLastError();
  const cudaError_t fault = cudaStreamSynchronize(native(stream));
  if (fault == cudaSuccess) return;
  throw DeviceError(concat("GPU ", device, ": the start-up check of the sm_90a products ended in a fault (", cudaGetErrorName(fault), ": ",
                           cudaGetErrorString(fault), "; first seen as: ", why,
                           "), expected right or wrong results; this process has lost the GPU: start again with GINGHAM_SM90=0, which leaves these "
                           "kernels off"));
}

}  // namespace

EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

bool sm90_checked(const Stream& stream) {
  const std::lock_guard lock(mutex);
  const int device = current_device();
  const auto known = verdicts().find(device);
  if (known != verdicts().end()) return known->second.on;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(native(stream), &status));
  if (status != cudaStreamCaptureStatusNone) return false;
  Verdict verdict;
  try {
    verdict.why = examine(device, stream);
    verdict.on = verdict.why.empty();
    if (verdict.on) verdict.why = "on";
  } catch (const std::exception& error) {
    verdict.why = error.what();
    demand_a_live_context(device, stream, verdict.why);
  }
  return (verdicts()[device] = verdict).on;
}

std::string sm90_status() {
  const std::lock_guard lock(mutex);
  const auto known = verdicts().find(current_device());
  if (known != verdicts().end()) return known->second.on ? "on" : "off: " + known->second.why;
  return "off: " + Verdict{}.why;
}

}  // namespace gingham::cuda

#else

namespace gingham::cuda {

bool sm90_checked(const Stream&) { return false; }
std::string sm90_status() { return "off: not available in the host shim"; }

}  // namespace gingham::cuda
#endif
