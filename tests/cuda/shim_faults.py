"""Faults put into copies of the kernels, each of which the shim's tests must find: the tests of the tests."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cuda import nvcc, shim_build


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # below csrc/kernels
    old: str
    new: str
    source: str  # the .cu that is compiled again
    only: str = "gemm"  # the tests that must fail


MUTATIONS = [
    Mutation(
        "no barrier before a stage is read", "gemm_tile.cuh", "    block_barrier();  // this stage", "    // this stage", "gemm_bf16.cu"
    ),
    Mutation(
        "waits for one group too few",
        "gemm_tile.cuh",
        "cp_async_wait<Shape::stages - 2>",
        "cp_async_wait<Shape::stages - 1>",
        "gemm_bf16.cu",
    ),
    Mutation("no commit of a stage", "gemm_tile.cuh", "    cp_async_commit();  // empty ones too", "    // empty ones too", "gemm_bf16.cu"),
    Mutation("one stage too few", "gemm_tile.cuh", "fetch(step + Shape::stages - 1);", "fetch(step + Shape::stages);", "gemm_bf16.cu"),
    Mutation(
        "no barrier before the sums are stored",
        "gemm_tile.cuh",
        "  cp_async_wait<0>();\n  block_barrier();\n",
        "  cp_async_wait<0>();\n",
        "gemm_bf16.cu",
    ),
    Mutation("no barrier within the stores", "gemm_tile.cuh", "    warp_barrier();\n#pragma unroll 1", "#pragma unroll 1", "gemm_bf16.cu"),
    Mutation("no twist", "panel.cuh", ": line & 7;", ": 0;", "gemm_bf16.cu", "gemm tiles"),
    Mutation(
        "no .trans for A",
        "panel.cuh",
        "ldmatrix_x4_trans(out, panel + P::at(kc * P::elements + (lane & 7)",
        "ldmatrix_x4(out, panel + P::at(kc * P::elements + (lane & 7)",
        "gemm_bf16.cu",
    ),
    Mutation(
        "fragments of B swapped",
        "gemm_tile.cuh",
        "fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]",
        "fb[j / 2][j % 2 * 2 + 1], fb[j / 2][j % 2 * 2]",
        "gemm_bf16.cu",
    ),
    Mutation("lines past the end are read", "panel.cuh", "valid > 0 && first + i * step < lines_left", "valid > 0", "gemm_bf16.cu"),
    Mutation(
        "elements past the end are read", "panel.cuh", "left <= 0 ? 0 : (left < elements ? left : elements)", "elements", "gemm_bf16.cu"
    ),
    Mutation("rows past the end are stored", "gemm_tile.cuh", "if (at_row < m) store", "store", "gemm_bf16.cu"),
    Mutation("columns past the end are stored", "gemm_store.cuh", "if (j + k < n) put<1>", "put<1>", "gemm_bf16.cu"),
    Mutation("operands not rounded to tf32", "panel.cuh", "word = to_tf32(word)", "word = word + 0", "gemm_tf32.cu"),
    Mutation(
        "one buffer, not two",
        "gemm_plain.cu",
        "memory + step % 2 * Plain<T>::stage;\n      const int",
        "memory;\n      const int",
        "gemm_plain.cu",
    ),
    Mutation(
        "shared memory is not asked for",
        "launch.cuh",
        "  if (shared_bytes > kSharedWithoutAsking)\n",
        "  if (shared_bytes > 1024 * 1024)\n",
        "gemm_bf16.cu",
    ),
    Mutation("a slab's strands are not awaited", "column_slabs.cuh", "  block_barrier();\n", "", "accumulate.cu", "column_sums"),
    Mutation("a tile is turned before it is whole", "cast.cu", "  block_barrier();\n", "", "cast.cu", "cast"),
    Mutation(
        "sums overwritten while read",
        "reduce.cuh",
        "  block_barrier();  // what was joined last time has been read\n",
        "",
        "layer_norm.cu",
        "layer_norm",
    ),
    Mutation(
        "a counter off by one",
        "dropout.cu",
        "philox(counter + static_cast<uint64_t>(first + more)",
        "philox(counter + 1 + static_cast<uint64_t>(first + more)",
        "dropout.cu",
        "dropout",
    ),
]


def found(mutation: Mutation, folder: Path) -> str:
    """What the tests said of the mutant: the first line that fails; "" when they let it pass."""
    program = shim_build.build("address")
    objects = program.parent
    copy = folder / "csrc"
    shutil.copytree(nvcc.CSRC, copy)
    target = copy / "kernels" / mutation.file
    text = target.read_text()
    assert text.count(mutation.old) >= 1, f"{mutation.name}: {mutation.file} has changed"
    target.write_text(text.replace(mutation.old, mutation.new, 1))
    tools = nvcc.toolkit()
    assert tools is not None
    flags = [
        *shim_build.BASE.split(),
        *shim_build.SANITIZERS["address"],
        f"-I{nvcc.ROOT}/tests/cuda/shim",
        f"-I{copy}",
        "-isystem",
        str(tools.include),
    ]
    mutant = folder / "mutant.o"
    source = copy / "kernels" / mutation.source
    subprocess.run(
        ["g++", "-x", "c++", *flags, "-Wno-unused", "-Wno-error", "-c", str(source), "-o", str(mutant)], check=True, capture_output=True
    )
    others = [str(path) for path in objects.glob("*.o") if path.name != f"csrc_kernels_{mutation.source}.o"]
    linked = folder / "kernel_tests"
    subprocess.run(
        ["g++", *shim_build.SANITIZERS["address"], str(mutant), *others, "-o", str(linked), "-ldl", "-lpthread", "-lrt"], check=True
    )
    environment = os.environ | shim_build.ENVIRONMENT
    done = subprocess.run([str(linked), "--only", mutation.only], capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "FAILED" in line or "ERROR" in line or "runtime error" in line]
    return lines[0] if lines else f"exit {done.returncode}"
