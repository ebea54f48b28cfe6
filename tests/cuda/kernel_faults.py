"""Faults of the kernels. What only the inline PTX shows belongs to rung 4, what only lanes that run apart show to rung 3."""

from cuda.mutation import Mutation

TILE, DEVICE, STORE, PLAIN = "kernels/gemm_tile.cuh", "kernels/device.cuh", "kernels/gemm_store.cuh", "kernels/gemm_plain.cu"
SM90, WGMMA = "kernels/gemm_sm90.cu", "kernels/wgmma.cuh"


def gemm(name: str, file: str, old: str, new: str, *checks: str, rung: int = 4) -> Mutation:
    return Mutation(name, "gemm", file, old, new, rung, "gemm_bf16", checks or (("gemm",) if rung == 4 else ("gemm tiles",)))


def sm90(name: str, old: str, new: str, file: str = SM90) -> Mutation:
    return Mutation(name, "sm90", file, old, new, 4, "gemm_sm90", ("sm90",))


MAIN_LOOP = "    cp_async_wait<Shape::stages - 2>();\n    block_barrier();  // this stage has come for all, and all are done with the one fetched into next\n"

FAULTS = [
    gemm("dropped barrier of the main loop", TILE, MAIN_LOOP, MAIN_LOOP.split("\n")[0] + "\n"),
    gemm("wait for one group too few", TILE, "cp_async_wait<Shape::stages - 2>();", "cp_async_wait<Shape::stages - 1>();"),
    gemm("missing commit", TILE, "    cp_async_commit();  // empty ones too: the wait below counts groups\n", ""),
    gemm("swizzle of the store, not of the load", TILE, "(shared + at(first + i * step, chunk),", "(shared + ((first + i * step) * chunks + chunk) * 16,"),
    gemm("missing bounds check of lines", TILE, "valid > 0 && first + i * step < lines_left;", "valid > 0;"),
    gemm("missing bounds check along lines", TILE, "const int left = length_left - chunk * elements,", "const int left = elements,"),
    gemm("dropped barrier before the slabs", TILE, "  cp_async_wait<0>();\n  block_barrier();\n  store_sums", "  cp_async_wait<0>();\n  store_sums"),
    gemm("wrong fragment of B", TILE, "fb[j / 2][j % 2 * 2], fb", "fb[j / 2][0], fb"),
    gemm("rows of the sums swapped", TILE, "(at + 8 * pitch), make_float2(sum[i][j][2]", "(at + 4 * pitch), make_float2(sum[i][j][2]"),
    gemm("swapped operands of mma", DEVICE, '"r"(a[3]), "r"(b0), "r"(b1));\n}\n\n__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16)',
         '"r"(a[3]), "r"(b1), "r"(b0));\n}\n\n__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16)'),
    gemm("missing .trans of ldmatrix", DEVICE, "ldmatrix.sync.aligned.m8n8.x4.trans.shared", "ldmatrix.sync.aligned.m8n8.x4.shared"),
    gemm("copies without zero fill", DEVICE, "[%0], [%1], 16, %2;", "[%0], [%1], 16;"),
    gemm("wrong group count in the PTX", DEVICE, '"cp.async.wait_group %0;" ::"n"(pending)', '"cp.async.wait_group %0;" ::"n"(pending + 1)'),
    gemm("beta ignored", STORE, "      if (add) {", "      if (false) {"),
    gemm("pieces of K on top of each other", STORE, "out.data += blockIdx.z * piece_stride;", "out.data += 0;", "pieces"),
    gemm("last column stored twice as wide", STORE, "if (aligned && j + W <= n) {", "if (aligned && j < n) {", "narrow"),
    gemm("warps of a slab do not wait", TILE, "    warp_barrier();\n#pragma unroll 1", "#pragma unroll 1", rung=3),
    gemm("shim: wait for one group too few", TILE, "cp_async_wait<Shape::stages - 2>();", "cp_async_wait<Shape::stages - 1>();", rung=3),
    Mutation("plain: dropped barrier", "gemm", PLAIN, "    cp_async_wait<0>();\n    block_barrier();\n", "    cp_async_wait<0>();\n", 4, "gemm_plain", ("plain",)),
    Mutation("plain: k beyond the end", "gemm", PLAIN, "e < edge_left && k < k_left", "e < edge_left", 4, "gemm_plain", ("plain",)),
    sm90("bytes not announced", "mbarrier_arrive_expect(full + 8 * s, R::stage);", "mbarrier_arrive(full + 8 * s);"),
    sm90("too few bytes announced", "mbarrier_arrive_expect(full + 8 * s, R::stage);", "mbarrier_arrive_expect(full + 8 * s, R::a_bytes);"),
    sm90("wrong parity of an empty stage", "(step / R::stages & 1) ^ 1", "step / R::stages & 1"),
    sm90("wrong parity of a full stage", "await(full + 8 * s, step / R::stages & 1,", "await(full + 8 * s, step & 1,"),
    sm90("no wait for a full stage", "    await(full + 8 * s, step / R::stages & 1, stuck, deadline);\n", ""),
    sm90("no wait for an empty stage", "      await(empty + 8 * s, (step / R::stages & 1) ^ 1, stuck, deadline);\n", ""),
    sm90("products waited for too late", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    sm90("no wait for the last products", "  wgmma_wait<0>();\n", ""),
    sm90("missing commit of products", "    wgmma_commit();\n", ""),
    sm90("missing wgmma.fence", "    wgmma_fence();\n", ""),
    sm90("stage released while it is read", "mbarrier_arrive(empty + 8 * ((step - 1) % R::stages))", "mbarrier_arrive(empty + 8 * (step % R::stages))"),
    sm90("one warp does not release its stages", "if (step > 0 && lane == 0)", "if (step > 0 && lane == 0 && warp)"),
    sm90("wrong descriptor stride", "matrix_descriptor(panel + step * 32, 16, 8 * kLine)", "matrix_descriptor(panel + step * 32, 16, 4 * kLine)"),
    sm90("wrong leading offset across k", "step * 16 * kLine, kBox, 8 * kLine)", "step * 16 * kLine, kBox / 2, 8 * kLine)"),
    sm90("wrong step along k", "matrix_descriptor(panel + step * 32,", "matrix_descriptor(panel + step * 16,"),
    sm90("swizzle of the descriptor", "uint64_t{1} << 62", "uint64_t{2} << 62", WGMMA),
    sm90("wrong trans bit of A", "wgmma<!a_along_k, !b_along_k>", "wgmma<a_along_k, !b_along_k>"),
    sm90("box without its second half", "box < edge / 64; box++", "box < edge / 128; box++"),
    sm90("slabs before all are done with the stages", '  asm volatile("bar.sync 1, %0;" ::"n"(128 * kConsumers) : "memory");', "  (void)kConsumers;"),
    sm90("rows of the second consumer", "tile.row + consumer * 64 + warp * 16", "tile.row + warp * 16"),
    sm90("stages not aligned to the swizzle", "+ 1023) & ~1023u;", "+ 127) & ~127u;"),
    Mutation("transpose: dropped barrier", "cast", "kernels/cast.cu", "  block_barrier();\n", "", 4, "cast", ("cast",)),
    Mutation("transpose: another pitch", "cast", "kernels/cast.cu", "shared_load(tile + k * kPitch<To> + x)", "shared_load(tile + k * kTile + x)", 4, "cast", ("cast",)),
    Mutation("cast: rounds to zero", "cast", DEVICE, "cvt.rn.bf16.f32 %0, %1;", "cvt.rz.bf16.f32 %0, %1;", 4, "cast", ("cast",)),
    Mutation("cast: end of a row left out", "cast", "kernels/sweep.cuh", "rest < cols; rest++", "rest < cols - 1; rest++", 4, "cast", ("cast",)),
    Mutation("column sums: dropped barrier", "sums", "kernels/column_slabs.cuh", "  block_barrier();\n", "", 4, "accumulate", ("column_sums",)),
    Mutation("ring step loses what arrives", "accumulate", "kernels/accumulate.cu", "sum.at[k] = x.at[k] + y.at[k];", "sum.at[k] = x.at[k];", 4, "accumulate", ("accumulate",)),
    Mutation("dropout: counter of the next element", "dropout", "kernels/dropout.cu", "philox(index / 4 + static_cast<uint64_t>(q)", "philox(index / 4 + 1 + static_cast<uint64_t>(q)", 4, "dropout", ("dropout",)),
    Mutation("epilogue: residual before the activation", "epilogue", "kernels/tail.cuh", "sum.at[k] += widen(more.at[k]);", "sum.at[k] *= widen(more.at[k]);", 4, "epilogue", ("epilogue",)),
]  # fmt: skip
