"""Faults of attention's kernels, for kernel_faults.py."""

from cuda.mutation import Mutation

FORWARD, BACKWARD, TILE = (f"kernels/attention_{name}.cuh" for name in ("forward", "backward", "tile"))
CHECKS = {"attention_bf16": "attention bfloat16", "attention_f32": "attention float32", "attention": "attention float32"}
STAGE_HAS_COME = "    block_barrier();  // this stage has come for all, and with two of them all are done with the other\n"
ALL_ARE_DONE = "      block_barrier();  // all are done with the only stage\n"
SLAB_WRITTEN = "    }\n    warp_barrier();\n#pragma unroll 1"
QUERY, NUMBERS = "const int64_t query = i + ", "load_numbers(reinterpret_cast<Sum*>("


def fault(name: str, file: str, old: str, new: str, rung: int = 3, unit: str = "attention_bf16") -> Mutation:
    return Mutation(f"attention: {name}", "attention", file, old, new, rung, unit, (CHECKS[unit] if rung == 3 else "attention",))


ATTENTION = [
    fault("dropped barrier before a stage is read", FORWARD, STAGE_HAS_COME, "\n"),
    fault("dropped barrier, in the interpreter", FORWARD, STAGE_HAS_COME, "\n", rung=4),
    fault("dropped barrier of the gradients", BACKWARD, STAGE_HAS_COME, "\n"),
    fault("the only stage is fetched while it is read", FORWARD, ALL_ARE_DONE, "\n", unit="attention_f32"),
    fault("a warp's slab is read too early", TILE, SLAB_WRITTEN, "    }\n#pragma unroll 1", unit="attention_f32"),
    fault("sums not scaled to a new top", FORWARD, "      sum[r] *= before;\n", ""),
    fault("results not scaled to a new top", FORWARD, "o[i / 2][2 * r + i % 2] *= before;", "(void)o;"),
    fault("what came before is not scaled", FORWARD, "Sum(0) : exp_of(before - from)", "Sum(0) : Sum(1)"),
    fault("a query does not see its own place", TILE, "diagonal + 1 : count;", "diagonal : count;"),
    fault("keys beyond the end", TILE, "left < S::other ? left : S::other;", "S::other;"),
    fault("keys before the diagonal", TILE, "of_keys && diagonal > 0 ? diagonal", "of_keys && diagonal > 0 ? diagonal - 1"),
    fault("a mask of other columns", TILE, "+ r * down + c * along;", "+ c * down + r * along;"),
    fault("dropout of another head", TILE, "p.a.all_heads + p.a.first_head + h;", "p.a.all_heads + p.a.first_head;"),
    fault("dropout of another place", TILE, QUERY + "(of_keys ? c : down)", QUERY + "(of_keys ? down : c)"),
    fault("dropout drawn, not scaled", FORWARD, "* static_cast<Sum>(p.draw.keep) : Sum(0);", ": Sum(0);"),
    fault("dk of one head of the group", BACKWARD, "lines = of_keys ? shared : 1;", "lines = 1;"),
    fault("keys of the first head for all", FORWARD, "const int narrow = line / ", "const int narrow = 0 * "),
    fault("a query that sees nothing", BACKWARD, "? static_cast<Sum>(INFINITY) : lse;", "? lse : lse;"),
    fault("dq without scale", BACKWARD, "[i % 4] *= static_cast<Sum>(p.a.scale);", "[i % 4] *= Sum(1);"),
    fault("lse and delta of a stage before", BACKWARD, NUMBERS + "stage + 2", NUMBERS + "ring + 2"),
    fault("pairs of scores swapped", TILE, "return static_cast<uint32_t>(a.bits) | ", "return static_cast<uint32_t>(b.bits) | ", rung=4),
    fault("delta of half a head", "kernels/attention.cu", "int lanes = 16; lanes > 0", "int lanes = 2; lanes > 0", unit="attention"),
]
