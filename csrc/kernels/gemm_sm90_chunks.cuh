// Which tiles a block of a Hopper product computes: a function of its number alone, shared by the host (the grid) and the kernel.
//
// Blocks come in waves. Those of the first waves take several tiles each, so that a tile is stored while the next one is multiplied; the later a
// wave, the fewer, and the last one or two waves are of one tile. Nothing says on which multiprocessor a block runs: the hardware starts the next one
// wherever one has ended, so that multiprocessors which come late, or belong to messages for a while, get their share and no more. A counter in
// memory would do the same, but two launches of one graph, or of two streams, must not share it. docs/hopper_model.py says what it is worth.
#pragma once
#include "kernels/device.cuh"

namespace gingham::cuda {

struct Chunking {
  int wave;  // blocks a wave
  int most;  // tiles a block
};

// Tiles first, first + step, ..: neighbours of those that the wave's other blocks compute at the time.
struct Chunk {
  int first, count, step;
};

// A wave of c tiles a block is taken while c - 1 waves of single tiles stay behind it. A number beyond the last block's gives a tile as far beyond
// the last one.
__host__ __device__ inline Chunk chunk_of(int block, int tiles, Chunking how) {
  int first = 0;
  for (int count = how.most; count > 1; count--) {
    const int left = tiles - first - (count - 1) * how.wave, waves = left > 0 ? left / (count * how.wave) : 0;
    if (block < waves * how.wave) return {first + block / how.wave * count * how.wave + block % how.wave, count, how.wave};
    block -= waves * how.wave;
    first += waves * count * how.wave;
  }
  return {first + block, 1, 1};
}

inline int blocks_of(int tiles, Chunking how) { return 2 * tiles - chunk_of(tiles, tiles, how).first; }

}  // namespace gingham::cuda
