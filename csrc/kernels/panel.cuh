// Operands of mma.sync in shared memory: lines of 128 bytes whose 16-byte chunks are twisted, copied behind the threads' backs, and the fragments
// that ldmatrix makes of either order.
#pragma once
#include "kernels/element.cuh"

namespace gingham::cuda {

constexpr int kLineBytes = 128;

// `valid` of a chunk's elements exist; the others are zeros.
template <class T, bool aligned>
__device__ inline void copy_chunk(char* to, const T* from, int valid) {
  constexpr int size = static_cast<int>(sizeof(T)), count = 16 / size;
  if constexpr (aligned) {
    cp_async<16>(to, from, valid * size);
  } else if constexpr (size >= 4) {
#pragma unroll
    for (int e = 0; e < count; e++) cp_async<size>(to + e * size, e < valid ? from + e : from, e < valid ? size : 0);
  } else {
    Pack<T, count> chunk;
#pragma unroll
    for (int e = 0; e < count; e++) chunk.at[e] = e < valid ? from[e] : T{};
    shared_store(reinterpret_cast<uint4*>(to), bits_as<uint4>(chunk));
  }
}

// An operand's part of one stage: `lines` lines of `length` elements.
template <class T, bool along_k, int edge, int threads, bool aligned>
struct Panel {
  static constexpr int depth = kLineBytes / static_cast<int>(sizeof(T));  // of k
  static constexpr int lines = along_k ? edge : depth, length = along_k ? depth : edge;
  static constexpr int elements = 16 / static_cast<int>(sizeof(T)), chunks = length / elements;
  static constexpr int bytes = lines * length * static_cast<int>(sizeof(T));

  __device__ static int at(int line, int chunk) {
    // fp32 off K is read word by word, 4 lines of 8 elements at a time.
    const int twist = sizeof(T) == 4 && !along_k ? (line & 3) << 1 : line & 7;
    return (line * chunks + (chunk ^ twist)) * 16;
  }

  // From `from` on there are lines_left lines of length_left elements. A thread's chunks stand in one column, `step` lines apart.
  __device__ static void load(char* shared, const T* from, int ld, int lines_left, int length_left) {
    constexpr int step = threads / chunks;
    const int first = static_cast<int>(threadIdx.x) / chunks, chunk = static_cast<int>(threadIdx.x) % chunks;
    const int left = length_left - chunk * elements, valid = left <= 0 ? 0 : (left < elements ? left : elements);
    const T* line = from + static_cast<int64_t>(first) * ld + chunk * elements;
#pragma unroll
    for (int i = 0; i < lines / step; i++) {
      const bool exists = valid > 0 && first + i * step < lines_left;
      copy_chunk<T, aligned>(shared + at(first + i * step, chunk), exists ? line + static_cast<int64_t>(i * step) * ld : from, exists ? valid : 0);
    }
  }
};

// One 16 x 32-byte fragment of A: rows from `row` on, k from chunk `kc` of a line on.
template <class T, bool along_k, class P>
__device__ inline void load_a(uint32_t (&out)[4], const char* panel, int row, int kc, int lane) {
  if constexpr (along_k) {
    ldmatrix_x4(out, panel + P::at(row + (lane & 15), kc + (lane >> 4)));
  } else if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(out, panel + P::at(kc * P::elements + (lane & 7) + (lane >> 4) * 8, row / P::elements + ((lane >> 3) & 1)));
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int line = kc * P::elements + (lane & 3) + (e >> 1) * 4, element = row + (lane >> 2) + (e & 1) * 8;
      out[e] = shared_load(reinterpret_cast<const uint32_t*>(panel + P::at(line, element / 4)) + element % 4);
    }
  }
}

// Two fragments of B, 8 columns each: out[0..1] for the first, out[2..3] for the second.
template <class T, bool along_k, class P>
__device__ inline void load_b(uint32_t (&out)[4], const char* panel, int col, int kc, int lane) {
  if constexpr (along_k) {
    ldmatrix_x4(out, panel + P::at(col + (lane & 7) + (lane >> 4) * 8, kc + ((lane >> 3) & 1)));
  } else if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(out, panel + P::at(kc * P::elements + (lane & 15), col / P::elements + (lane >> 4)));
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int line = kc * P::elements + (lane & 3) + (e & 1) * 4, element = col + (lane >> 2) + (e >> 1) * 8;
      out[e] = shared_load(reinterpret_cast<const uint32_t*>(panel + P::at(line, element / 4)) + element % 4);
    }
  }
}

template <class T>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2)
    mma_m16n8k16(c, a, b0, b1, T{});
  else
    mma_m16n8k8_tf32(c, a, b0, b1);
}

template <class T>
__device__ inline void round_operands([[maybe_unused]] uint32_t (&fragment)[4]) {
  if constexpr (sizeof(T) == 4)
    for (uint32_t& word : fragment) word = to_tf32(word);
}

}  // namespace gingham::cuda
