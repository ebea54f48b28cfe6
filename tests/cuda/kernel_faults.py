"""Faults of the kernels. What only the inline PTX shows belongs to rung 4, what only lanes that run apart show to rung 3."""

from cuda.attention_faults import ATTENTION
from cuda.mutation import Mutation

TILE, DEVICE, STORE, PLAIN = "kernels/gemm_tile.cuh", "kernels/device.cuh", "kernels/gemm_store.cuh", "kernels/gemm_plain.cu"
CAST, SWEEP, SLABS, TAIL = "kernels/cast.cu", "kernels/sweep.cuh", "kernels/column_slabs.cuh", "kernels/tail.cuh"
ACCUMULATE, NORM, REDUCE = "kernels/accumulate.cu", "kernels/layer_norm.cu", "kernels/reduce.cuh"
LOSS, EMBED = "kernels/cross_entropy.cu", "kernels/embedding.cu"
ROW, WHOLE, KEPT = "kernels/norm_row.cuh", "layer_norm_whole", "kernels/layer_norm_whole.cu"
DROPOUT, INDICES = "kernels/dropout.cu", "kernels/indices.cu"
PANEL, PACKED = "kernels/panel.cuh", "kernels/packed_row.cuh"
SM90, SM90_STORE, WGMMA, CHUNKS = (
    f"kernels/{name}" for name in ("gemm_sm90.cu", "gemm_sm90_store.cuh", "wgmma.cuh", "gemm_sm90_chunks.cuh")
)


def gemm(name: str, file: str, old: str, new: str, *checks: str, rung: int = 4) -> Mutation:
    return Mutation(name, "gemm", file, old, new, rung, "gemm_bf16", checks or (("gemm",) if rung == 4 else ("gemm tiles",)))


def other(name: str, kind: str, unit: str, file: str, old: str, new: str, check: str = "") -> Mutation:
    return Mutation(name, kind, file, old, new, 4, unit, (check or unit,))


def embedding(name: str, old: str, new: str) -> Mutation:
    return other(f"embedding: {name}", "embedding", "embedding", EMBED, old, new)


def sm90(name: str, old: str, new: str, file: str = SM90, check: str = "sm90") -> Mutation:
    return Mutation(name, "sm90", file, old, new, 4, "gemm_sm90", (check,))


def boxes(name: str, old: str, new: str, file: str = SM90_STORE) -> Mutation:
    return sm90(name, old, new, file, "boxes")


MMA_B = '"r"(b0), "r"(b1));'
STORED = (
    "      store_halves<T, wide>(sum, bias, boxes, static_cast<int>(row), static_cast<int>(tile.col), static_cast<int>(p.n), room, lane);\n"
)
LOOP = "  for (int n = 0; n < N; n++) {"
BEFORE_F16 = "\n}\n\n__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F16)"

FAULTS = [
    gemm("dropped barrier of the main loop", TILE, "    block_barrier();  // this stage", "    // this stage"),
    gemm("wait for one group too few", TILE, "cp_async_wait<Shape::stages - 2>();", "cp_async_wait<Shape::stages - 1>();"),
    gemm("missing commit", TILE, "    cp_async_commit();  // empty ones too: the wait below counts groups\n", ""),
    gemm(
        "swizzle of the store, not of the load",
        PANEL,
        "(shared + at(first + i * step, chunk),",
        "(shared + ((first + i * step) * chunks + chunk) * 16,",
    ),
    gemm("missing bounds check of lines", PANEL, "valid > 0 && first + i * step < lines_left;", "valid > 0;"),
    gemm("missing bounds check along lines", PANEL, "const int left = length_left - chunk * elements,", "const int left = elements,"),
    gemm(
        "dropped barrier before the slabs",
        TILE,
        "  cp_async_wait<0>();\n  block_barrier();\n  store_sums",
        "  cp_async_wait<0>();\n  store_sums",
    ),
    gemm("wrong fragment of B", TILE, "fb[j / 2][j % 2 * 2], fb", "fb[j / 2][0], fb"),
    gemm("rows of the sums swapped", TILE, "(at + 8 * pitch), make_float2(sum[i][j][2]", "(at + 4 * pitch), make_float2(sum[i][j][2]"),
    gemm(
        "swapped operands of mma",
        DEVICE,
        MMA_B + BEFORE_F16,
        MMA_B.replace("b0", "b2").replace("b1", "b0").replace("b2", "b1") + BEFORE_F16,
    ),
    gemm("missing .trans of ldmatrix", DEVICE, "ldmatrix.sync.aligned.m8n8.x4.trans.shared", "ldmatrix.sync.aligned.m8n8.x4.shared"),
    gemm("copies without zero fill", DEVICE, "[%0], [%1], 16, %2;", "[%0], [%1], 16;"),
    gemm(
        "wrong group count in the PTX", DEVICE, '"cp.async.wait_group %0;" ::"n"(pending)', '"cp.async.wait_group %0;" ::"n"(pending + 1)'
    ),
    gemm("beta ignored", STORE, "      if (add) {", "      if (false) {"),
    gemm("pieces of K on top of each other", STORE, "out.data += blockIdx.z * piece_stride;", "out.data += 0;", "pieces"),
    gemm("last column stored twice as wide", STORE, "if (aligned && j + W <= n) {", "if (aligned && j < n) {", "narrow"),
    gemm("warps of a slab do not wait", TILE, "    warp_barrier();\n#pragma unroll 1", "#pragma unroll 1", rung=3),
    gemm("shim: wait for one group too few", TILE, "cp_async_wait<Shape::stages - 2>();", "cp_async_wait<Shape::stages - 1>();", rung=3),
    other(
        "plain: dropped barrier", "gemm", "gemm_plain", PLAIN, "cp_async_wait<0>();\n    block_barrier();", "cp_async_wait<0>();", "plain"
    ),
    other(
        "plain: k beyond the end", "gemm", "gemm_plain", PLAIN, "e + e_on < edge_left && k + k_on < k_left", "e + e_on < edge_left", "plain"
    ),
    sm90("bytes not announced", "mbarrier_arrive_expect(full + 8 * s, R::stage);", "mbarrier_arrive(full + 8 * s);"),
    sm90("too few bytes announced", "mbarrier_arrive_expect(full + 8 * s, R::stage);", "mbarrier_arrive_expect(full + 8 * s, R::a_bytes);"),
    sm90("wrong parity of an empty stage", "turn.parity ^ 1, stuck", "turn.parity, stuck"),
    sm90("wrong parity of a full stage", "await(full + 8 * s, turn.parity,", "await(full + 8 * s, turn.parity ^ 1,"),
    sm90("no wait for a full stage", "      await(full + 8 * s, turn.parity, stuck, deadline);\n", ""),
    sm90("no wait for an empty stage", "        await(empty + 8 * s, turn.parity ^ 1, stuck, deadline);\n", ""),
    sm90("products waited for too late", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    sm90("no wait for the last products", "    wgmma_wait<0>();\n", ""),
    sm90("missing commit of products", "    wgmma_commit();\n", ""),
    sm90("missing wgmma.fence", "    wgmma_fence();\n", ""),
    sm90(
        "stage released while it is read",
        "if (step > 0 && lane == 0) mbarrier_arrive(empty + 8 * last);",
        "if (step + 1 < steps && lane == 0) mbarrier_arrive(empty + 8 * s);",
    ),
    sm90("one warp does not release its stages", "if (step > 0 && lane == 0)", "if (step > 0 && lane == 0 && warp)"),
    sm90(
        "wrong descriptor stride",
        "matrix_descriptor(panel + step * 32, 16, 8 * kLine)",
        "matrix_descriptor(panel + step * 32, 16, 4 * kLine)",
    ),
    sm90("wrong leading offset across k", "step * 16 * kLine, kBox, 8 * kLine)", "step * 16 * kLine, kBox / 2, 8 * kLine)"),
    sm90("wrong step along k", "matrix_descriptor(panel + step * 32,", "matrix_descriptor(panel + step * 16,"),
    sm90("swizzle of the descriptor", "uint64_t{1} << 62", "uint64_t{2} << 62", WGMMA),
    sm90("wrong trans bit of A", "wgmma<!a_along_k, !b_along_k>", "wgmma<a_along_k, !b_along_k>"),
    sm90("box without its second half", "box < edge / 64; box++", "box < edge / 128; box++"),
    sm90(
        "slabs before all are done with the stages",
        'asm volatile("bar.sync 1, %0;" ::"n"(128 * kConsumers) : "memory");',
        "(void)kConsumers;",
        check="slabs",
    ),
    sm90("rows of the second consumer", "tile.row + consumer * 64 + warp * 16", "tile.row + warp * 16"),
    sm90(
        "fewer arrivals than warps that release",
        "mbarrier_init(empty + 8 * s, 4 * kConsumers);",
        "mbarrier_init(empty + 8 * s, 4 * kConsumers - 1);",
    ),
    sm90("f16 tiles of 256 read as bf16", "m64n256k16.f32.f16.f16", "m64n256k16.f32.bf16.bf16", WGMMA),
    sm90(
        "shared memory is not asked for",
        "if (shared_bytes > kSharedWithoutAsking) ask_for_shared",
        "if (shared_bytes > 1024 * 1024) ask_for_shared",
        "kernels/launch.cuh",
    ),
    boxes("boxes filled before they have been read", "tma_stores_read<kBoxes - 1>();", "tma_stores_read<kBoxes>();"),
    sm90("the same, of sums", "tma_stores_read<kBoxes - 1>();", "tma_stores_read<kBoxes>();", SM90_STORE),
    boxes("boxes of a tile in one group", "    tma_stores_commit();\n", "    if (box + 1 == wide / columns) tma_stores_commit();\n"),
    boxes("both boxes are one", "turn = (turn + 1) % kBoxes;", "turn = 0;"),
    boxes("a block ends before its boxes have been read", "tma_stores_read<0>();  // a block", "(void)kBoxes;  // a block", SM90),
    sm90("parity not carried over tiles by the consumers", "    int last = 0;\n", "    int last = 0;\n    turn = Turn();\n"),
    sm90(
        "parity not carried over tiles by the producer",
        "chunk.count; i++) {\n      const",
        "chunk.count; i++, turn = Turn()) {\n      const",
    ),
    sm90("a tile's last stage is not released", "    if (lane == 0) mbarrier_arrive(empty + 8 * last);\n", ""),
    sm90("one warpgroup does not release a tile's last stage", "    if (lane == 0) mbarrier", "    if (lane == 0 && consumer) mbarrier"),
    sm90(
        "a tile's last stage is released while it is read",
        "    wgmma_wait<0>();\n    if (lane == 0) mbarrier_arrive(empty + 8 * last);\n",
        "    if (lane == 0) mbarrier_arrive(empty + 8 * last);\n    wgmma_wait<0>();\n",
        check="overlap",
    ),
    sm90("boxes lie in the stages", "boxes = stages * stage, barriers = boxes +", "boxes = 0, barriers = stages * stage +"),
    sm90("warpgroups share their boxes", "memory + R::boxes + (consumer * 4 + warp) * R::room", "memory + R::boxes + warp * R::room"),
    sm90("a tile that no block has", "first += waves * count * how.wave;", "first += waves * count * how.wave + waves;", CHUNKS),
    sm90("a tile that two blocks have", "first += waves * count * how.wave;", "first += waves * how.wave;", CHUNKS),
    sm90("tiles of a chunk side by side", "block % how.wave, count, how.wave}", "block % how.wave, count, 1}", CHUNKS),
    sm90("blocks of slabs with several tiles", "if (out == kSlabs) chunking.most = 1;", "", check="slabs"),
    sm90(
        "warpgroups wait for each other before they store",
        "    if (lane == 0) mbarrier_arrive(empty + 8 * last);\n",
        '    if (lane == 0) mbarrier_arrive(empty + 8 * last);\n    asm volatile("bar.sync 2, 256;" ::: "memory");\n',
        check="overlap",
    ),
    sm90(
        "a tile's last stage is kept while it is stored",
        "    if (lane == 0) mbarrier_arrive(empty + 8 * last);\n    if constexpr (out == kHalves) {\n" + STORED,
        "    if constexpr (out == kHalves) {\n"
        + STORED
        + "    }\n    if (lane == 0) mbarrier_arrive(empty + 8 * last);\n    if constexpr (out == kHalves) {\n",
        check="overlap",
    ),
    boxes("boxes in another swizzle", "^ (r & 7)) << 4)", "^ (r & 3)) << 4)"),
    boxes("bias of the columns before", "(j + i / 2) * 4 + (lane & 3)", "j * 4 + (lane & 3)"),
    boxes("bias of another word", "const int c = col + 64 * t + 2 * lane;", "const int c = col + 64 * t + lane;"),
    boxes("bias left out", "boxes.bias = tail.bias.data;", "boxes.bias = nullptr;", SM90),
    boxes("neighbours change places", "narrow_pair(first, second, T{})", "narrow_pair(second, first, T{})"),
    boxes("sums rounded to zero", "cvt.rn.bf16x2.f32 %0, %1, %2;", "cvt.rz.bf16x2.f32 %0, %1, %2;", WGMMA),
    boxes("the last box of a tile is not stored", "if (col + box * columns >= n) break;", "if (col + box * columns + columns >= n) break;"),
    boxes("Y where Z belongs", "boxes.z = map_of(encode, dtype, tail.z.data", "boxes.z = map_of(encode, dtype, tail.y.data", SM90),
    boxes("Z's lines as long as Y's", "p.n, p.m, tail.z.row_stride, kBoxRows", "p.n, p.m, p.n, kBoxRows", SM90),
    sm90("sums are stored where they are added", "boxes.add = store.add;", "boxes.add = false;"),
    sm90("sums are added where they are stored", "boxes.add = store.add;", "boxes.add = true;"),
    sm90("halves of odd rows change places", "2 * (j ^ (odd ? 2 : 0))", "2 * j", SM90_STORE),
    sm90("rows 8 below are put over the first", "(r + 8 * below) * kLine", "r * kLine", SM90_STORE),
    sm90(
        "columns of the next box",
        "tma_add(map, at, col + box * columns, row)",
        "tma_add(map, at, col + 2 * box * columns, row)",
        SM90_STORE,
    ),
    sm90("pieces of K on top of each other in boxes", "static_cast<int>(apart);", "0;", check="sm90_pieces"),
    sm90("boxes put zeros over the next piece", "% (kHigh * store.c.row_stride) == 0", "% store.c.row_stride == 0", check="sm90_pieces"),
    sm90("stages not aligned to the swizzle", "+ 1023) & ~1023u;", "+ 127) & ~127u;"),
    other("transpose: dropped barrier", "cast", "cast", CAST, "  block_barrier();\n", ""),
    other("transpose: another pitch", "cast", "cast", CAST, "shared_load(tile + k * kPitch<To> + x)", "shared_load(tile + k * kTile + x)"),
    other("cast: rounds to zero", "cast", "cast", DEVICE, "cvt.rn.bf16.f32 %0, %1;", "cvt.rz.bf16.f32 %0, %1;"),
    other("cast: end of a row left out", "cast", "cast", SWEEP, "rest < cols; rest++", "rest < cols - 1; rest++"),
    other("column sums: dropped barrier", "sums", "accumulate", SLABS, "  block_barrier();\n", "", "column_sums"),
    other("ring step loses what arrives", "accumulate", "accumulate", ACCUMULATE, "narrow(x.at[k] + y.at[k],", "narrow(x.at[k],"),
    other("dropout: the next counter", "dropout", "dropout", DROPOUT, "counter = index / 4;", "counter = index / 4 + 1;"),
    other("dropout: a pack's second counter is its first", "dropout", "dropout", DROPOUT, "first + p * step + c)", "first + p * step)"),
    other("epilogue: residual multiplied", "epilogue", "epilogue", TAIL, "] += widen(more.at[k]);", "] *= widen(more.at[k]);"),
    other("layer norm: eps ignored", "norm", "layer_norm", ROW, "* n.share + n.eps)", "* n.share)"),
    other("layer norm: sums read too early", "norm", "layer_norm", REDUCE, "  block_barrier();\n  for (int n = 0; n < N; n++) {", LOOP),
    other("layer norm: sums written too early", "norm", "layer_norm", REDUCE, "  block_barrier();  // what was joined last", "  // what"),
    other("layer norm: M2 of one rank only", "norm", "layer_norm", NORM, "*into.to(i, 1) += *other.to(i, 1) + d", "*into.to(i, 1) += d"),
    other(
        "layer norm, whole: the first pack again",
        "norm",
        WHOLE,
        KEPT,
        "return (static_cast<int64_t>(threadIdx.x) + p *",
        "return (threadIdx.x + 0 *",
    ),
    other("layer norm, whole: squares about zero", "norm", WHOLE, KEPT, "d = v - high;", "d = v;"),
    other("layer norm, whole: too long a row", "norm", WHOLE, KEPT, "if (warps * 32 > kHeldThreads) return false;", ""),
    other(
        "layer norm, whole: a slab's rows not awaited", "norm", WHOLE, KEPT, "    block_barrier();\n    return {dy, x", "    return {dy, x"
    ),
    other("softmax: lanes of a warp left out", "loss", "cross_entropy", REDUCE, "int mask = 16; mask > 0", "int mask = 8; mask > 0"),
    other("softmax: target of the group's first", "loss", "cross_entropy", LOSS, "at = target - j;", "at = target;"),
    other("softmax: head of a row taken for its tail", "loss", "cross_entropy", PACKED, "s < row.head ? s : s + inside", "s + inside"),
    other("softmax: sums about another maximum", "loss", "cross_entropy", LOSS, "sum *= exp_below<T>(top - high);", "sum *= 1;"),
    Mutation(
        "softmax: the class behind the last has a loss",
        "loss",
        LOSS,
        "id >= targets.vocabulary) ?",
        "id > targets.vocabulary) ?",
        3,
        "cross_entropy",
        ("cross_entropy, odd",),
    ),
    other("embedding: ids below the table", "embedding", "embedding", EMBED, "id >= 0 && id < rows ?", "id < rows ?"),
    embedding("a piece takes the next one's first position", "runs.count ? kPiece : static", "runs.count ? kPiece + 1 : static"),
    embedding("a lost part of a run", "parts.template store<W>(piece, j, sum);", "parts.template store<W>(piece, j, {});"),
    embedding(
        "a run's part stored over its row",
        "          if (entered)",
        "          if (false)",
    ),
    embedding(
        "a run's end not seen in its piece", "if (p + 1 < length && ids[p + 1] == ids[p]) continue;", "if (p + 1 < length) continue;"
    ),
    embedding("parts behind the first four", "      if (!there[kTogether - 1]) break;", "      break;"),
    embedding("every piece joins what follows", "    if (before > 0 && runs.id(before - 1) == id) return;\n", "    (void)before;\n"),
    embedding("the skipped id is summed", " && id != places.skipped;", ";"),
    other("indices: those behind the first 1024", "indices", "indices", INDICES, "i < count; i +=", "i < count && i < kThreads; i +="),
    *ATTENTION,
]
