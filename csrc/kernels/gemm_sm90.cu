// A block computes a tile of C, 128 rows by 128 or 256 columns. One thread of the first warpgroup (the producer) has the tensor memory
// accelerator bring panels of 64 k into a ring of stages; the two others multiply 64 rows each. Stage s has two barriers: full[s], one arrival and
// the panels' bytes, and empty[s], one arrival of each of the 8 consumer warps. A stage is released when the products of the next one have been
// issued.
// The sums leave through the stages, when both consumers are done with them: results in 16 bits by the accelerator, in boxes of 16 rows of a
// warp and 64 columns, else through slabs in words of 16 bytes.
//   panel along k       one box: lines of 128 bytes (64 k), swizzled by 128 bytes
//   panel across k      a box for each 64 rows of A or columns of B: 64 lines, one for each k, of 128 bytes
// Registers: 168 a thread at launch; the producer gives up all but 40, the consumers take 232 (128 of them sums).
#include "kernels/gemm_sm90.cuh"

#ifndef GINGHAM_SHIM
#include "kernels/gemm_sm90_launch.cuh"
#include "kernels/gemm_store.cuh"
#include "kernels/wgmma.cuh"

namespace gingham::cuda {
namespace {

constexpr int kHigh = 128, kDepth = 64, kLine = 128, kConsumers = 2, kThreads = 128 * (1 + kConsumers);

template <class T, int across>
struct Ring {
  static constexpr int wide = across, a_bytes = kHigh * kLine, b_bytes = wide * kLine, stage = a_bytes + b_bytes;
  static constexpr int stages = wide == 256 ? 4 : 6;
  static constexpr int bytes = 1024 + stages * (stage + 16);
  // At the end each warp has a slab of 16 rows of floats in them, the pitch 8 more than the tile is wide; or boxes.
  static_assert(4 * kConsumers * 16 * (wide + 8) * 4 <= stages * stage);
};

constexpr int kRows = 16;  // of a box that is stored

// Where a result in 16 bits goes that leaves in boxes.
struct Boxes {
  CUtensorMap z, y;
  const void* bias = nullptr;  // a row
  bool has_z = false, has_y = false;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kBox = 64 * kLine;  // of 64 lines
constexpr int kBoxBytes = kRows * kLine;
constexpr int64_t kPatience = 2'000'000'000;  // cycles, in a check

// Waits for a phase; in a check no longer than until `deadline`, which a kernel that works never sees.
__device__ inline void await(uint32_t barrier, uint32_t parity, int* stuck, int64_t deadline) {
  while (!mbarrier_try_wait(barrier, parity))
    if (stuck && clock64() > deadline) {
      *stuck = 1;
      return;
    }
}

template <bool along_k, int edge>
__device__ inline void load_panel(uint32_t shared, const CUtensorMap* map, int line, int k, uint32_t barrier) {
  if constexpr (along_k) {
    tma_load(shared, map, k, line, barrier);
  } else {
    for (int box = 0; box < edge / 64; box++) tma_load(shared + box * kBox, map, line + box * 64, k, barrier);
  }
}

// Of k16 step `step`: along k 32 bytes further in the same lines, across k 16 lines on.
template <bool along_k>
__device__ inline uint64_t descriptor_of(uint32_t panel, int step) {
  return along_k ? matrix_descriptor(panel + step * 32, 16, 8 * kLine) : matrix_descriptor(panel + step * 16 * kLine, kBox, 8 * kLine);
}

// The sums of a warp, 16 rows, through a slab of shared memory, so that they are stored in words of 16 bytes (as in gemm_tile.cuh).
template <class T, int wide>
__device__ inline void store_slab(const float (&sum)[wide / 2], const Store<T>& store, int64_t row, int64_t col, int64_t m, int64_t n, float* slab,
                                  int lane) {
  constexpr int pitch = wide + 8, width = 16 / static_cast<int>(sizeof(T)), groups = wide / width;
#pragma unroll
  for (int j = 0; j < wide / 8; j++) {
    float* at = slab + (lane >> 2) * pitch + j * 8 + (lane & 3) * 2;
    shared_store(reinterpret_cast<float2*>(at), make_float2(sum[4 * j], sum[4 * j + 1]));
    shared_store(reinterpret_cast<float2*>(at + 8 * pitch), make_float2(sum[4 * j + 2], sum[4 * j + 3]));
  }
  warp_barrier();
#pragma unroll 1
  for (int index = lane; index < 16 * groups; index += 32) {
    const int r = index / groups, q = index % groups;
    if (row + r >= m || col + q * width >= n) continue;
    const float4* from = reinterpret_cast<const float4*>(slab + r * pitch + q * width);
    // Lanes 4..7 of 8 read their halves in the other order: 8 lanes, 8 groups of banks.
    const int half = (lane >> 2) & 1;
    const uint4 one = bits_as<uint4>(shared_load(from + half)), two = bits_as<uint4>(shared_load(from + 1 - half));
    Words<16 * (width / 4)> words;
    words.at[0] = half ? two : one;
    words.at[1] = half ? one : two;
    store.template put_row<width>(row + r, col + q * width, n, bits_as<Pack<float, width>>(words));
  }
}

// The bias of a tile's columns, in a warp: lane l has 64 t + 2 l and the next in word t, zero beyond column n.
template <int wide>
__device__ inline void load_bias(uint32_t (&pairs)[wide / 64], const void* bias, int col, int n, int lane) {
  const auto* row = static_cast<const uint16_t*>(bias);
  const bool whole = reinterpret_cast<uintptr_t>(bias) % 4 == 0;
#pragma unroll
  for (int t = 0; t < wide / 64; t++) {
    const int c = col + 64 * t + 2 * lane;
    pairs[t] = 0;
    if (bias && whole && c + 1 < n)
      pairs[t] = *reinterpret_cast<const uint32_t*>(row + c);
    else if (bias && c < n)
      pairs[t] = row[c] | static_cast<uint32_t>(c + 1 < n ? row[c + 1] : 0) << 16;
  }
}

// A box of a warp's sums, plus bias, to shared memory: lines of 128 bytes, swizzled. In stmatrix lane l gives row l % 16 of the columns 8 (l / 16)
// of each 16.
template <class T, int wide, Epilogue kind>
__device__ inline void fill_box(const float (&sum)[wide / 2], uint32_t bias, int box, uint32_t room, int lane) {
  const int r = lane & 15;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {  // two neighbours of row l / 4, or of the row 8 below
      const auto shift = widened(bits_as<Pack<T, 2>>(shuffle_from(bias, (j + i / 2) * 4 + (lane & 3))));
      const int at = 4 * (8 * box + j) + 2 * i;
      float first = sum[at] + shift.at[0], second = sum[at + 1] + shift.at[1];
      if constexpr (kind != Epilogue::none) {
        first = activate<float>(kind, first);
        second = activate<float>(kind, second);
      }
      words[i] = narrow_pair(first, second, T{});
    }
    stmatrix_x4(room + r * kLine + (((j + (lane >> 4)) ^ (r & 7)) << 4), words);
  }
}

// 16 rows of results through a warp's boxes. Those must have been read before they are filled again.
template <class T, int wide, Epilogue kind>
__device__ inline void store_boxes(const float (&sum)[wide / 2], const uint32_t (&bias)[wide / 64], const CUtensorMap* map, int row, int col, int n,
                                   uint32_t room, int lane) {
#pragma unroll
  for (int box = 0; box < wide / 64; box++) {
    if (col + box * 64 >= n) break;
    fill_box<T, wide, kind>(sum, bias[box], box, room + box * kBoxBytes, lane);
    fence_for_tma();
    warp_barrier();
    if (lane == 0) tma_store(map, room + box * kBoxBytes, col + box * 64, row);
  }
  if (lane == 0) tma_stores_commit();
}

// Z = sums + bias, Y = gelu of the same.
template <class T, int wide>
__device__ inline void store_boxes(const float (&sum)[wide / 2], const uint32_t (&bias)[wide / 64], const Boxes& boxes, int row, int col, int n,
                                   uint32_t room, int lane) {
  if (boxes.has_z) store_boxes<T, wide, Epilogue::none>(sum, bias, &boxes.z, row, col, n, room, lane);
  if (boxes.has_y) {
    if (lane == 0) tma_stores_read();
    warp_barrier();
    store_boxes<T, wide, Epilogue::gelu>(sum, bias, &boxes.y, row, col, n, room, lane);
  }
  if (lane == 0) tma_stores_read();  // a block's memory must last until then
}

#endif

// boxed: the results leave by `boxes`, nothing by `store`.
template <class T, bool a_along_k, bool b_along_k, int wide, bool boxed>
__global__ void __launch_bounds__(kThreads, 1) sm90_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                                                           const __grid_constant__ Boxes boxes, Operands p, Store<T> store, int* stuck) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere it does nothing, which the check sees
  using R = Ring<T, wide>;
  const uint32_t memory = (shared_address(shared_memory()) + 1023) & ~1023u;  // the swizzle's pattern repeats every 1024 bytes
  const uint32_t full = memory + R::stages * R::stage, empty = full + 8 * R::stages;
  const int group = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
  const TileAt tile = tile_at(p.m, p.n, kHigh, wide);
  const int64_t k_begin = blockIdx.z * p.piece, k_end = k_begin + p.piece < p.k ? k_begin + p.piece : p.k;
  const int steps = static_cast<int>((k_end - k_begin + kDepth - 1) / kDepth);
  const int64_t deadline = stuck ? clock64() + kPatience : 0;
  if (threadIdx.x == 0) {
    tma_prefetch(&map_a);
    tma_prefetch(&map_b);
    for (int s = 0; s < R::stages; s++) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 4 * kConsumers);
    }
    mbarrier_fence_init();
  }
  block_barrier();

  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x != 0) return;
    for (int step = 0; step < steps; step++) {
      const int s = step % R::stages, k = static_cast<int>(k_begin) + step * kDepth;
      await(empty + 8 * s, (step / R::stages & 1) ^ 1, stuck, deadline);
      mbarrier_arrive_expect(full + 8 * s, R::stage);
      load_panel<a_along_k, kHigh>(memory + s * R::stage, &map_a, static_cast<int>(tile.row), k, full + 8 * s);
      load_panel<b_along_k, wide>(memory + s * R::stage + R::a_bytes, &map_b, static_cast<int>(tile.col), k, full + 8 * s);
    }
    return;
  }

  take_registers<232>();
  const int consumer = group - 1;
  float sum[wide / 2] = {};
  for (int step = 0; step < steps; step++) {
    const int s = step % R::stages;
    const uint32_t a = memory + s * R::stage + consumer * 64 * kLine, b = memory + s * R::stage + R::a_bytes;
    await(full + 8 * s, step / R::stages & 1, stuck, deadline);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; i++) wgmma<!a_along_k, !b_along_k>(sum, descriptor_of<a_along_k>(a, i), descriptor_of<b_along_k>(b, i), T{});
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 && lane == 0) mbarrier_arrive(empty + 8 * ((step - 1) % R::stages));
  }
  uint32_t bias[wide / 64];  // on its way while the last products are made
  if constexpr (boxed) load_bias<wide>(bias, boxes.bias, static_cast<int>(tile.col), static_cast<int>(p.n), lane);
  wgmma_wait<0>();
  asm volatile("bar.sync 1, %0;" ::"n"(128 * kConsumers) : "memory");  // both are done with the stages, which become slabs or boxes
  const int64_t row = tile.row + consumer * 64 + warp * 16;
  if constexpr (boxed) {
    const uint32_t room = memory + (consumer * 4 + warp) * (wide / 64) * kBoxBytes;
    store_boxes<T, wide>(sum, bias, boxes, static_cast<int>(row), static_cast<int>(tile.col), static_cast<int>(p.n), room, lane);
  } else {
    char* stages = shared_memory() + (memory - shared_address(shared_memory()));
    float* slab = reinterpret_cast<float*>(stages) + (consumer * 4 + warp) * 16 * (wide + 8);
    store_slab<T, wide>(sum, store, row, tile.col, p.m, p.n, slab, lane);
  }
#endif
}

// Whether the accelerator can move a matrix of `lines`, `pitch` elements of 16 bits from line to line.
bool movable_by_box(const void* data, int64_t length, int64_t lines, int64_t pitch) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && length < INT32_MAX && lines < INT32_MAX &&
         (lines == 1 || (pitch >= length && pitch % 8 == 0));
}

bool readable(const void* data, bool along_k, int64_t pitch, int64_t edge, int64_t k) {
  return along_k ? movable_by_box(data, k, edge, pitch) : movable_by_box(data, edge, k, pitch);
}

// Whether nothing but Z and Y = gelu(Z) is stored, in whole lines.
template <class T>
bool in_boxes(const Operands& p, const Store<T>& store) {
  const TailViews<T>& tail = store.tail;
  const auto fits = [&](const View<T>& view) {
    return !view.data || ((view.col_stride == 1 || p.n == 1) && movable_by_box(view.data, p.n, p.m, view.row_stride));
  };
  return !store.c.data && !tail.residual.data && !tail.slope_at.data && (tail.z.data || tail.y.data) && fits(tail.z) && fits(tail.y) &&
         (!tail.y.data || tail.kind == Epilogue::gelu) && (!tail.bias.data || (tail.bias.row_stride == 0 && (tail.bias.col_stride == 1 || p.n == 1)));
}

// A matrix of `lines` whose elements lie side by side, `pitch` from line to line, in boxes of 64 elements of `box` lines.
CUtensorMap map_of(EncodeTiled encode, DType dtype, const void* data, int64_t length, int64_t lines, int64_t pitch, int box) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(length), static_cast<cuuint64_t>(lines)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(2 * (lines > 1 ? pitch : ceil_div(length, 8) * 8))};
  const cuuint32_t boxes[2] = {64, static_cast<cuuint32_t>(box)}, every[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = encode(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                 const_cast<void*>(data), sizes, strides, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(DeviceError, result == CUDA_SUCCESS, "cuTensorMapEncodeTiled of ", lines, " lines of ", length, ", pitch ", pitch, ": error ",
        static_cast<int>(result));
  return map;
}

// An operand: lines of 64 elements from one side or the other; box: lines a box.
CUtensorMap map_of(EncodeTiled encode, DType dtype, const void* data, bool along_k, int64_t pitch, int64_t edge, int64_t k, int box) {
  return along_k ? map_of(encode, dtype, data, k, edge, pitch, box) : map_of(encode, dtype, data, edge, k, pitch, 64);
}

template <class T, bool a_along_k, bool b_along_k, int wide>
void run_wide(const Operands& p, const Store<T>& store, DType dtype, int* stuck, const Stream& stream) {
  const EncodeTiled encode = encode_tiled();
  CHECK(DeviceError, encode, "the driver has no cuTensorMapEncodeTiled");
  const CUtensorMap a = map_of(encode, dtype, p.a, a_along_k, p.lda, p.m, p.k, kHigh);
  const CUtensorMap b = map_of(encode, dtype, p.b, b_along_k, p.ldb, p.n, p.k, wide);
  const dim3 grid(blocks(ceil_div(p.m, kHigh) * ceil_div(p.n, wide)), 1, blocks(ceil_div(p.k, p.piece)));
  const size_t bytes = Ring<T, wide>::bytes;
  Boxes boxes{};
  if (!in_boxes(p, store))
    return launch(stream, sm90_kernel<T, a_along_k, b_along_k, wide, false>, grid, kThreads, bytes, a, b, boxes, p, store, stuck);
  const TailViews<T>& tail = store.tail;
  boxes.bias = tail.bias.data;
  boxes.has_z = tail.z.data;
  boxes.has_y = tail.y.data;
  if (boxes.has_z) boxes.z = map_of(encode, dtype, tail.z.data, p.n, p.m, tail.z.row_stride, kRows);
  if (boxes.has_y) boxes.y = map_of(encode, dtype, tail.y.data, p.n, p.m, tail.y.row_stride, kRows);
  launch(stream, sm90_kernel<T, a_along_k, b_along_k, wide, true>, grid, kThreads, bytes, a, b, boxes, p, store, stuck);
}

template <class T, bool a_along_k, bool b_along_k>
void run_order(const Operands& p, const Store<T>& store, DType dtype, int wide, int* stuck, const Stream& stream) {
  if (wide == 256)
    run_wide<T, a_along_k, b_along_k, 256>(p, store, dtype, stuck, stream);
  else
    run_wide<T, a_along_k, b_along_k, 128>(p, store, dtype, stuck, stream);
}

template <class T>
void run(const Operands& p, const Store<T>& store, DType dtype, int wide, int* stuck, const Stream& stream) {
  if (p.a_along_k && p.b_along_k) return run_order<T, true, true>(p, store, dtype, wide, stuck, stream);
  if (p.a_along_k) return run_order<T, true, false>(p, store, dtype, wide, stuck, stream);
  if (p.b_along_k) return run_order<T, false, true>(p, store, dtype, wide, stuck, stream);
  run_order<T, false, false>(p, store, dtype, wide, stuck, stream);
}

// Wide tiles where they occupy at least half of the multiprocessors.
int width_of(const Operands& p) { return ceil_div(p.m, kHigh) * ceil_div(p.n, 256) * ceil_div(p.k, p.piece) >= kMultiprocessors / 2 ? 256 : 128; }

}  // namespace

bool sm90_takes(const Operands& p) {
  return p.m > 0 && p.n > 0 && p.k > 0 && readable(p.a, p.a_along_k, p.lda, p.m, p.k) && readable(p.b, p.b_along_k, p.ldb, p.n, p.k) &&
         (p.piece % kDepth == 0 || p.piece >= p.k);
}

// With fewer tiles than a third of the multiprocessors the kernels of gemm_tile.cuh do better: their tiles are smaller, and K may be cut.
bool sm90_enabled(const Operands& p, const Stream& stream) {
  return ceil_div(p.m, kHigh) * ceil_div(p.n, 128) >= kMultiprocessors / 3 && p.k >= kDepth && sm90_takes(p) && sm90_checked(stream);
}

void run_sm90(const Operands& p, const Store<Bf16>& store, int wide, int* stuck, const Stream& stream) {
  run(p, store, DType::bf16, wide, stuck, stream);
}
void run_sm90(const Operands& p, const Store<F16>& store, int wide, int* stuck, const Stream& stream) {
  run(p, store, DType::f16, wide, stuck, stream);
}
void gemm_sm90(const Operands& p, const Store<Bf16>& store, const Stream& stream) { run_sm90(p, store, width_of(p), nullptr, stream); }
void gemm_sm90(const Operands& p, const Store<F16>& store, const Stream& stream) { run_sm90(p, store, width_of(p), nullptr, stream); }

}  // namespace gingham::cuda

#else

namespace gingham::cuda {

bool sm90_takes(const Operands&) { return false; }
bool sm90_enabled(const Operands&, const Stream&) { return false; }
void gemm_sm90(const Operands&, const Store<Bf16>&, const Stream&) { throw DeviceError("sm_90a products are not available in the host shim"); }
void gemm_sm90(const Operands&, const Store<F16>&, const Stream&) { throw DeviceError("sm_90a products are not available in the host shim"); }

}  // namespace gingham::cuda
#endif
