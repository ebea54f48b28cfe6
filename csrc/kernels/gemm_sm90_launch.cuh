// What gemm_sm90.cu and its check share.
#pragma once
#include <cuda.h>  // types alone; libcuda is not linked

#include "kernels/gemm_sm90_chunks.cuh"
#include "kernels/gemm_store.cuh"

namespace gingham::cuda {

// The driver's function that describes a tensor to the tensor memory accelerator, found at run time; null where there is none.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
EncodeTiled encode_tiled();

// Tiles are 128 or 256 columns wide.
struct Tiling {
  int wide;
  Chunking chunking;
};

// With `stuck` (device memory), waits end after a second or so, and *stuck becomes 1.
void run_sm90(const Operands& operands, const Store<Bf16>& store, Tiling tiling, int* stuck, const Stream& stream);
void run_sm90(const Operands& operands, const Store<F16>& store, Tiling tiling, int* stuck, const Stream& stream);

}  // namespace gingham::cuda
