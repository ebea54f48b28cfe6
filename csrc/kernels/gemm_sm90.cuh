// gemm on Hopper (sm_90a) for 16-bit operands: the tensor memory accelerator brings tiles, warpgroups multiply them from shared memory. It is
// off until sm90_checked has compared it with the kernels of gemm_tile.cuh on the device at hand. gemm.cu asks sm90_pieces
// before it chooses tiles.
#pragma once
#include <string>

#include "base/stream.h"

namespace gingham::cuda {

struct Operands;
struct Bf16;
struct F16;
template <class T>
struct Store;

constexpr int64_t kSm90Rows = 128;  // of a tile

// Whether the accelerator can read the operands: base and pitch multiples of 16 bytes, sizes below 2^31.
bool sm90_takes(const Operands& operands);
// Into how many pieces K is cut, to be summed apart where tiles are few and K is long; 0: not for this kernel, or it is off.
int64_t sm90_pieces(const Operands& operands, const Stream& stream);
void gemm_sm90(const Operands& operands, const Store<Bf16>& store, const Stream& stream);
void gemm_sm90(const Operands& operands, const Store<F16>& store, const Stream& stream);

// Once per process and device: compute capability 9.0, then products in every order of the operands and with cut tiles by both kernels,
// compared bit by bit (small whole numbers, whose sums are exact). Any difference, error or hang leaves it off, as does GINGHAM_SM90=0; a fault
// that ends the CUDA context throws DeviceError. Waits for the stream. While the stream is captured into a graph it answers false, and may be asked
// again.
bool sm90_checked(const Stream& stream);
// "on", or why it is off, for the calling thread's device.
std::string sm90_status();

}  // namespace gingham::cuda
