// A block computes tiles of C, 128 rows by 128 or 256 columns, one after the other (gemm_sm90_chunks.cuh says which). One thread of the first
// warpgroup (the producer) has the tensor memory accelerator bring panels of 64 k into a ring of stages; the two others multiply 64 rows each. Stage
// s has two barriers: full[s], one arrival and the panels' bytes, and empty[s], one arrival of each of the 8 consumer warps. A stage is released when
// the products of the next one have been issued, a tile's last one when its products are there.
// The ring does not end with a tile: the producer goes on with the next tile's panels while the last one is stored, and each consumer goes through
// the stages at its own pace, so that one multiplies while the other stores. The sums leave in boxes beside the stages (gemm_sm90_store.cuh).
//   panel along k       one box: lines of 128 bytes (64 k), swizzled by 128 bytes
//   panel across k      a box for each 64 rows of A or columns of B: 64 lines, one for each k, of 128 bytes
// Registers: 168 a thread at launch; the producer gives up all but 40, the consumers take 232 (128 of them sums).
#include <algorithm>

#include "kernels/gemm_sm90.cuh"

#ifndef GINGHAM_SHIM
#include "kernels/gemm_sm90_launch.cuh"
#include "kernels/gemm_sm90_store.cuh"

namespace gingham::cuda {
namespace {

constexpr int kHigh = kSm90Rows, kDepth = 64, kConsumers = 2, kThreads = 128 * (1 + kConsumers);

__host__ __device__ inline int64_t tiles_of(const Operands& p, int wide) { return (p.m + kHigh - 1) / kHigh * ((p.n + wide - 1) / wide); }

template <class T, int across>
struct Ring {
  static constexpr int wide = across, a_bytes = kHigh * kLine, b_bytes = wide * kLine, stage = a_bytes + b_bytes;
  static constexpr int stages = wide == 256 ? 4 : 6, room = kBoxes * kBoxBytes;
  // Behind the stages the warps' boxes, then the barriers.
  static constexpr int boxes = stages * stage, barriers = boxes + 4 * kConsumers * room, bytes = 1024 + barriers + stages * 16;
  static_assert(bytes <= 227 * 1024);
  // Slabs, 16 rows of floats a warp, the pitch 8 more than the tile is wide, lie in the stages.
  static_assert(4 * kConsumers * 16 * (wide + 8) * 4 <= stages * stage);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kBox = 64 * kLine;              // of 64 lines
constexpr int64_t kPatience = 2'000'000'000;  // cycles, in a check

// Waits for a phase; in a check no longer than until `deadline`, which a kernel that works never sees.
__device__ inline void await(uint32_t barrier, uint32_t parity, int* stuck, int64_t deadline) {
  while (!mbarrier_try_wait(barrier, parity))
    if (stuck && clock64() > deadline) {
      *stuck = 1;
      return;
    }
}

// A place in the ring, which goes on from tile to tile.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  template <int stages>
  __device__ void next() {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

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

#endif

// out: how the sums leave (gemm_sm90_store.cuh), by `boxes` or by `store`.
template <class T, bool a_along_k, bool b_along_k, int wide, int out>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, const __grid_constant__ Boxes boxes, Operands p,
                Store<T> store, Chunking chunking, int* stuck) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere it does nothing, which the check sees
  using R = Ring<T, wide>;
  const uint32_t memory = (shared_address(shared_memory()) + 1023) & ~1023u;  // the swizzle's pattern repeats every 1024 bytes
  const uint32_t full = memory + R::barriers, empty = full + 8 * R::stages;
  const int group = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
  const Chunk chunk = chunk_of(static_cast<int>(blockIdx.x), static_cast<int>(tiles_of(p, wide)), chunking);
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

  Turn turn;
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x != 0) return;
    for (int i = 0; i < chunk.count; i++) {
      const TileAt tile = tile_at(static_cast<uint32_t>(chunk.first + i * chunk.step), p.m, p.n, kHigh, wide);
      for (int step = 0; step < steps; step++) {
        const int s = turn.stage, k = static_cast<int>(k_begin) + step * kDepth;
        await(empty + 8 * s, turn.parity ^ 1, stuck, deadline);
        mbarrier_arrive_expect(full + 8 * s, R::stage);
        load_panel<a_along_k, kHigh>(memory + s * R::stage, &map_a, static_cast<int>(tile.row), k, full + 8 * s);
        load_panel<b_along_k, wide>(memory + s * R::stage + R::a_bytes, &map_b, static_cast<int>(tile.col), k, full + 8 * s);
        turn.next<R::stages>();
      }
    }
    return;
  }

  take_registers<232>();
  const int consumer = group - 1;
  Room room{memory + R::boxes + (consumer * 4 + warp) * R::room};
#pragma unroll 1
  for (int i = 0; i < chunk.count; i++) {
    float sum[wide / 2] = {};
    int last = 0;
    for (int step = 0; step < steps; step++) {
      const int s = turn.stage;
      const uint32_t a = memory + s * R::stage + consumer * 64 * kLine, b = memory + s * R::stage + R::a_bytes;
      await(full + 8 * s, turn.parity, stuck, deadline);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kDepth / 16; j++) wgmma<!a_along_k, !b_along_k>(sum, descriptor_of<a_along_k>(a, j), descriptor_of<b_along_k>(b, j), T{});
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0 && lane == 0) mbarrier_arrive(empty + 8 * last);
      last = s;
      turn.next<R::stages>();
    }
    const TileAt tile = tile_at(static_cast<uint32_t>(chunk.first + i * chunk.step), p.m, p.n, kHigh, wide);
    const int64_t row = tile.row + consumer * 64 + warp * 16;
    uint32_t bias[wide / 64];  // on its way while the last products are made
    if constexpr (out == kHalves) load_bias<wide>(bias, boxes.bias, static_cast<int>(tile.col), static_cast<int>(p.n), lane);
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(empty + 8 * last);
    if constexpr (out == kHalves) {
      store_halves<T, wide>(sum, bias, boxes, static_cast<int>(row), static_cast<int>(tile.col), static_cast<int>(p.n), room, lane);
    } else if constexpr (out == kSums) {
      const int line = static_cast<int>(row) + static_cast<int>(blockIdx.z) * boxes.piece_rows;
      store_sums<wide>(sum, boxes, line, static_cast<int>(tile.col), static_cast<int>(p.n), room, lane);
    } else {
      asm volatile("bar.sync 1, %0;" ::"n"(128 * kConsumers) : "memory");  // both are done with the stages, which become slabs
      char* stages = shared_memory() + (memory - shared_address(shared_memory()));
      float* slab = reinterpret_cast<float*>(stages) + (consumer * 4 + warp) * 16 * (wide + 8);
      store_slab<T, wide>(sum, store, row, tile.col, p.m, p.n, slab, lane);
      break;
    }
  }
  if (out != kSlabs && lane == 0) tma_stores_read<0>();  // a block's memory must last until then
#endif
}

// Whether the accelerator can move a matrix of `lines`, `pitch` elements of `size` bytes from line to line.
bool movable_by_box(const void* data, int64_t length, int64_t lines, int64_t pitch, int64_t size = 2) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && length < INT32_MAX && lines < INT32_MAX &&
         (lines == 1 || (pitch >= length && pitch * size % 16 == 0));
}

bool readable(const void* data, bool along_k, int64_t pitch, int64_t edge, int64_t k) {
  return along_k ? movable_by_box(data, k, edge, pitch) : movable_by_box(data, edge, k, pitch);
}

template <class V>
bool fits(const View<V>& view, const Operands& p) {
  return (view.col_stride == 1 || p.n == 1) && movable_by_box(view.data, p.n, p.m, view.row_stride, sizeof(V));
}

// Whether pieces of K are summed into matrices whole tiles apart: a box puts zeros behind the last row of one.
template <class T>
bool pieces_fit(const Operands& p, const Store<T>& store) {
  return p.piece >= p.k || store.piece_stride % (kHigh * store.c.row_stride) == 0;
}

// Whether nothing but Z and Y = gelu(Z) is stored, in whole lines; or nothing but C.
template <class T>
int way_out(const Operands& p, const Store<T>& store) {
  const TailViews<T>& tail = store.tail;
  if (tail.residual.data || tail.slope_at.data) return kSlabs;
  if (store.c.data) return store.keep && !tail.z.data && !tail.y.data && pieces_fit(p, store) && fits(store.c, p) ? kSums : kSlabs;
  const bool known =
      (!tail.y.data || tail.kind == Epilogue::gelu) && (!tail.bias.data || (tail.bias.row_stride == 0 && (tail.bias.col_stride == 1 || p.n == 1)));
  return (tail.z.data || tail.y.data) && known && (!tail.z.data || fits(tail.z, p)) && (!tail.y.data || fits(tail.y, p)) ? kHalves : kSlabs;
}

CUtensorMapDataType type_of(DType dtype) {
  return dtype == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// A matrix of `lines` whose elements lie side by side, `pitch` from line to line, in boxes of 128 bytes of `box` lines.
CUtensorMap map_of(EncodeTiled encode, DType dtype, const void* data, int64_t length, int64_t lines, int64_t pitch, int box) {
  const int64_t size = static_cast<int64_t>(size_of(dtype));
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(length), static_cast<cuuint64_t>(lines)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(lines > 1 ? size * pitch : ceil_div(size * length, 16) * 16)};
  const cuuint32_t boxes[2] = {static_cast<cuuint32_t>(kLine / size), static_cast<cuuint32_t>(box)}, every[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = encode(&map, type_of(dtype), 2, const_cast<void*>(data), sizes, strides, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(DeviceError, result == CUDA_SUCCESS, "cuTensorMapEncodeTiled of ", lines, " lines of ", length, ", pitch ", pitch, ": error ",
        static_cast<int>(result));
  return map;
}

// An operand: lines of 64 elements from one side or the other; box: lines a box.
CUtensorMap map_of(EncodeTiled encode, DType dtype, const void* data, bool along_k, int64_t pitch, int64_t edge, int64_t k, int box) {
  return along_k ? map_of(encode, dtype, data, k, edge, pitch, box) : map_of(encode, dtype, data, edge, k, pitch, 64);
}

template <class T>
Boxes boxes_of(EncodeTiled encode, const Operands& p, const Store<T>& store, DType dtype, int out) {
  Boxes boxes{};
  if (out == kSums) {
    const int64_t pieces = ceil_div(p.k, p.piece), apart = pieces > 1 ? store.piece_stride / store.c.row_stride : 0;
    boxes.z = map_of(encode, DType::f32, store.c.data, p.n, (pieces - 1) * apart + p.m, store.c.row_stride, kBoxRows);
    boxes.piece_rows = static_cast<int>(apart);
    boxes.add = store.add;
  }
  if (out != kHalves) return boxes;
  const TailViews<T>& tail = store.tail;
  boxes.bias = tail.bias.data;
  boxes.has_z = tail.z.data;
  boxes.has_y = tail.y.data;
  if (boxes.has_z) boxes.z = map_of(encode, dtype, tail.z.data, p.n, p.m, tail.z.row_stride, kBoxRows);
  if (boxes.has_y) boxes.y = map_of(encode, dtype, tail.y.data, p.n, p.m, tail.y.row_stride, kBoxRows);
  return boxes;
}

template <class T, bool a_along_k, bool b_along_k, int wide>
void run_wide(const Operands& p, const Store<T>& store, DType dtype, Chunking chunking, int* stuck, const Stream& stream) {
  const EncodeTiled encode = encode_tiled();
  CHECK(DeviceError, encode, "the driver has no cuTensorMapEncodeTiled");
  const CUtensorMap a = map_of(encode, dtype, p.a, a_along_k, p.lda, p.m, p.k, kHigh);
  const CUtensorMap b = map_of(encode, dtype, p.b, b_along_k, p.ldb, p.n, p.k, wide);
  const int out = way_out(p, store);
  if (out == kSlabs) chunking.most = 1;  // slabs lie in the stages
  const dim3 grid(blocks(blocks_of(static_cast<int>(blocks(tiles_of(p, wide))), chunking)), 1, blocks(ceil_div(p.k, p.piece)));
  const size_t bytes = Ring<T, wide>::bytes;
  const Boxes boxes = boxes_of(encode, p, store, dtype, out);
  const auto run = [&](auto kernel) { launch(stream, kernel, grid, kThreads, bytes, a, b, boxes, p, store, chunking, stuck); };
  if (out == kHalves) return run(sm90_kernel<T, a_along_k, b_along_k, wide, kHalves>);
  if (out == kSums) return run(sm90_kernel<T, a_along_k, b_along_k, wide, kSums>);
  run(sm90_kernel<T, a_along_k, b_along_k, wide, kSlabs>);
}

template <class T, bool a_along_k, bool b_along_k>
void run_order(const Operands& p, const Store<T>& store, DType dtype, Tiling tiling, int* stuck, const Stream& stream) {
  if (tiling.wide == 256)
    run_wide<T, a_along_k, b_along_k, 256>(p, store, dtype, tiling.chunking, stuck, stream);
  else
    run_wide<T, a_along_k, b_along_k, 128>(p, store, dtype, tiling.chunking, stuck, stream);
}

template <class T>
void run(const Operands& p, const Store<T>& store, DType dtype, Tiling tiling, int* stuck, const Stream& stream) {
  if (p.a_along_k && p.b_along_k) return run_order<T, true, true>(p, store, dtype, tiling, stuck, stream);
  if (p.a_along_k) return run_order<T, true, false>(p, store, dtype, tiling, stuck, stream);
  if (p.b_along_k) return run_order<T, false, true>(p, store, dtype, tiling, stuck, stream);
  run_order<T, false, false>(p, store, dtype, tiling, stuck, stream);
}

// More steps of K than that are long enough beside a tile's store; and a block should end soon, since messages wait for its multiprocessor.
constexpr int64_t kStepsOfBlock = 64, kMostTiles = 4;

// Wide tiles where they occupy at least half of the multiprocessors.
Tiling tiling_of(const Operands& p) {
  const int wide = tiles_of(p, 256) * ceil_div(p.k, p.piece) >= kMultiprocessors / 2 ? 256 : 128;
  const int64_t fit = kStepsOfBlock / ceil_div(std::min(p.k, p.piece), kDepth);
  return {wide, {kMultiprocessors, static_cast<int>(std::clamp<int64_t>(fit, 1, kMostTiles))}};
}

}  // namespace

bool sm90_takes(const Operands& p) {
  return p.m > 0 && p.n > 0 && p.k > 0 && readable(p.a, p.a_along_k, p.lda, p.m, p.k) && readable(p.b, p.b_along_k, p.ldb, p.n, p.k) &&
         (p.piece % kDepth == 0 || p.piece >= p.k);
}

// Pieces pay from three on: their sums are written and read again, and two are no faster than tiles of half the width. With fewer blocks than a third
// of the multiprocessors the kernels of gemm_tile.cuh do better, whose tiles are smaller.
int64_t sm90_pieces(const Operands& p, const Stream& stream) {
  constexpr int64_t least = 3, least_piece = 1024, most = 16;
  if (p.k < kDepth || !sm90_takes(p)) return 0;
  const int64_t tiles = tiles_of(p, 256), pieces = std::min({kMultiprocessors / tiles, p.k / least_piece, most});
  const int64_t blocks = pieces >= least ? tiles * pieces : tiles_of(p, 128);
  if (blocks < kMultiprocessors / 3 || !sm90_checked(stream)) return 0;
  return pieces >= least ? pieces : 1;
}

void run_sm90(const Operands& p, const Store<Bf16>& store, Tiling tiling, int* stuck, const Stream& stream) {
  run(p, store, DType::bf16, tiling, stuck, stream);
}
void run_sm90(const Operands& p, const Store<F16>& store, Tiling tiling, int* stuck, const Stream& stream) {
  run(p, store, DType::f16, tiling, stuck, stream);
}
void gemm_sm90(const Operands& p, const Store<Bf16>& store, const Stream& stream) { run_sm90(p, store, tiling_of(p), nullptr, stream); }
void gemm_sm90(const Operands& p, const Store<F16>& store, const Stream& stream) { run_sm90(p, store, tiling_of(p), nullptr, stream); }

}  // namespace gingham::cuda

#else

namespace gingham::cuda {

bool sm90_takes(const Operands&) { return false; }
int64_t sm90_pieces(const Operands&, const Stream&) { return 0; }
void gemm_sm90(const Operands&, const Store<Bf16>&, const Stream&) { throw DeviceError("sm_90a products are not available in the host shim"); }
void gemm_sm90(const Operands&, const Store<F16>&, const Stream&) { throw DeviceError("sm_90a products are not available in the host shim"); }

}  // namespace gingham::cuda
#endif
