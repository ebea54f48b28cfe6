#include "kernels/gemm_tile.cuh"

namespace gingham::cuda {

void gemm_f16(const Operands& operands, const Store<F16>& store, TileSize size, const Stream& stream) {
  run_tiles<F16, LargeTile16, SmallTile>(operands, store, size, stream);
}

}  // namespace gingham::cuda
