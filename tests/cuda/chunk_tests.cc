// The rule that deals the Hopper product's tiles to blocks (gemm_sm90_chunks.cuh): every tile once, whatever their number and that of the blocks.
#include "kernel_tests.h"
#include "kernels/gemm_sm90_chunks.cuh"

namespace gingham::tests {
namespace {

// What is wrong with the chunks of so many tiles; empty where nothing is.
std::string fault_of(int tiles, cuda::Chunking how) {
  const int blocks = cuda::blocks_of(tiles, how);
  std::vector<int> met(static_cast<size_t>(tiles), 0);
  int before = how.most, single = 0;
  for (int block = 0; block < blocks; block++) {
    const cuda::Chunk chunk = cuda::chunk_of(block, tiles, how);
    if (chunk.count < 1 || chunk.count > before) return concat("block ", block, " has ", chunk.count, " tiles, the one before it ", before);
    before = chunk.count;
    single += chunk.count == 1;
    for (int i = 0; i < chunk.count; i++) {
      const int tile = chunk.first + i * chunk.step;
      if (tile < 0 || tile >= tiles) return concat("block ", block, " has tile ", tile, " of ", tiles);
      if (met[static_cast<size_t>(tile)]++) return concat("tile ", tile, " twice");
    }
  }
  for (int tile = 0; tile < tiles; tile++)
    if (!met[static_cast<size_t>(tile)]) return concat("no block has tile ", tile);
  if (cuda::chunk_of(blocks, tiles, how).first != tiles) return "the block behind the last has a tile";
  if (single < std::min(tiles, how.wave)) return concat(single, " blocks of one tile, fewer than a wave");
  return "";
}

void every_tile_once() {
  for (const int wave : {1, 2, 3, 7, 66, 132})
    for (int most = 1; most <= 6; most++)
      for (int tiles = 1; tiles < (full() ? 16 * wave + 40 : 10 * wave + 9); tiles++) {
        const std::string fault = fault_of(tiles, {wave, most});
        if (!fault.empty()) return expect(false, concat("chunks of ", tiles, " tiles, waves of ", wave, ", at most ", most, ": ", fault));
      }
  expect(fault_of(200'000, {132, 4}).empty(), "chunks of 200000 tiles");
}

const Register all[] = {{"gemm chunks", every_tile_once}};

}  // namespace
}  // namespace gingham::tests
