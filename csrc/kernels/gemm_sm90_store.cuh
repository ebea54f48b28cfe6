// How the sums of a Hopper product leave their registers: in boxes by the tensor memory accelerator, or through slabs of shared memory in words of
// 16 bytes. A warp has 16 rows; wgmma.cuh says which sums a lane holds.
//   halves   16-bit results, 64 columns a box: Z with bias, and Y = gelu(Z)
//   sums     C, or C += in fp32, 32 columns a box; the addition is made where C lies, so that it is not fetched
//   slabs    what else a tail asks for, and C whose lines the accelerator cannot take
// Boxes are memory of each warp's own, so that a warp waits for nobody when it stores; slabs lie in the stages, when both consumers are done with
// them: blocks that have slabs compute one tile.
#pragma once
#include "kernels/gemm_store.cuh"
#include "kernels/wgmma.cuh"

namespace gingham::cuda {

constexpr int kLine = 128;    // bytes, of shared memory as the accelerator moves it
constexpr int kBoxRows = 16;  // of a box that is stored
constexpr int kBoxBytes = kBoxRows * kLine;
constexpr int kBoxes = 2;  // a warp

// Template arguments, hence numbers.
constexpr int kSlabs = 0, kHalves = 1, kSums = 2;

// Where a result goes that leaves in boxes.
struct Boxes {
  CUtensorMap z, y;            // z: of C as well
  const void* bias = nullptr;  // a row
  bool has_z = false, has_y = false;
  bool add = false;    // to what C holds
  int piece_rows = 0;  // from a piece of K's matrix to the next one's
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

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

// A box of a warp's sums to shared memory: lines of 32 columns, swizzled. Odd rows put the halves of a line down in the other order, so that the 16
// lanes of a store lie in different banks.
template <int wide>
__device__ inline void fill_box_of_sums(const float (&sum)[wide / 2], int box, uint32_t room, int lane) {
  const int r = lane >> 2;
  const bool odd = r & 1;
#pragma unroll
  for (int below = 0; below < 2; below++)  // rows r and r + 8
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int here = 4 * (4 * box + j) + 2 * below, across = 4 * (4 * box + (j ^ 2)) + 2 * below;
      const float first = odd ? sum[across] : sum[here], second = odd ? sum[across + 1] : sum[here + 1];
      const int word = (2 * (j ^ (odd ? 2 : 0)) + (lane & 3) / 2) ^ r;
      shared_store_pair(room + (r + 8 * below) * kLine + (word << 4) + (lane & 1) * 8, first, second);
    }
}

// A warp's boxes, filled in turns.
struct Room {
  uint32_t at;
  int turn = 0;

  // The next one, when the accelerator has read what was in it.
  __device__ uint32_t next(int lane) {
    if (lane == 0) tma_stores_read<kBoxes - 1>();
    warp_barrier();
    const uint32_t box = at + turn * kBoxBytes;
    turn = (turn + 1) % kBoxes;
    return box;
  }
};

// 16 rows of a tile from (row, col) on, `wide` columns in boxes of `columns`: fill(box, address) puts one down. With `add` it is added to what the
// map's matrix holds.
template <int wide, int columns, class Fill>
__device__ inline void store_boxes(const CUtensorMap* map, bool add, int row, int col, int n, Room& room, int lane, const Fill& fill) {
#pragma unroll
  for (int box = 0; box < wide / columns; box++) {
    if (col + box * columns >= n) break;
    const uint32_t at = room.next(lane);
    fill(box, at);
    fence_for_tma();
    warp_barrier();
    if (lane != 0) continue;
    if (add)
      tma_add(map, at, col + box * columns, row);
    else
      tma_store(map, at, col + box * columns, row);
    tma_stores_commit();
  }
}

// Z = sums + bias, Y = gelu of the same.
template <class T, int wide>
__device__ inline void store_halves(const float (&sum)[wide / 2], const uint32_t (&bias)[wide / 64], const Boxes& boxes, int row, int col, int n,
                                    Room& room, int lane) {
  const auto plain = [&](int box, uint32_t at) { fill_box<T, wide, Epilogue::none>(sum, bias[box], box, at, lane); };
  const auto curved = [&](int box, uint32_t at) { fill_box<T, wide, Epilogue::gelu>(sum, bias[box], box, at, lane); };
  if (boxes.has_z) store_boxes<wide, 64>(&boxes.z, false, row, col, n, room, lane, plain);
  if (boxes.has_y) store_boxes<wide, 64>(&boxes.y, false, row, col, n, room, lane, curved);
}

// C = sums, or C += sums.
template <int wide>
__device__ inline void store_sums(const float (&sum)[wide / 2], const Boxes& boxes, int row, int col, int n, Room& room, int lane) {
  store_boxes<wide, 32>(&boxes.z, boxes.add, row, col, n, room, lane, [&](int box, uint32_t at) { fill_box_of_sums<wide>(sum, box, at, lane); });
}

#endif

}  // namespace gingham::cuda
