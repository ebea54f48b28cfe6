#include "kernels/gemm_tile.cuh"

namespace gingham::cuda {

void gemm_tf32(const Operands& operands, const Store<float>& store, TileSize size, const Stream& stream) {
  run_tiles<float, LargeTile32, SmallTile>(operands, store, size, stream);
}

}  // namespace gingham::cuda
