#include "kernels/gemm_tile.cuh"

namespace gingham::cuda {

void gemm_bf16(const Operands& operands, const Store<Bf16>& store, TileSize size, const Stream& stream) {
  run_tiles<Bf16, LargeTile16, SmallTile>(operands, store, size, stream);
}

}  // namespace gingham::cuda
