"""What nvcc made of the kernels: registers, stack, tensor-core and 16-byte instructions of every instance, pinned in sass_budget.json.

PYTHONPATH=tests python -m cuda.sass --write     measures again, writes the pins and the table of docs/cuda_kernels.md
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from cuda import nvcc

BUDGET = Path(__file__).with_name("sass_budget.json")
DOCS = nvcc.ROOT / "docs" / "cuda_kernels.md"
BEGIN, END = "<!-- sass table: begin -->", "<!-- sass table: end -->"

# What is counted in an instance's code: name -> the opcodes it stands for.
COUNTS = {
    "HMMA": r"HMMA\.",
    "HGMMA": r"HGMMA\.",
    "LDGSTS": r"LDGSTS\.",
    "UTMALDG": r"UTMALDG",
    "UTMASTG": r"UTMASTG",
    "UTMAREDG": r"UTMAREDG",
    "LDSM": r"LDSM\.",
    "LDG.128": r"LDG\.\S*128",
    "STG.128": r"STG\.\S*128",
    "LDS.128": r"LDS\.\S*128",
    "STS.128": r"STS\.\S*128",
}
# registers, shared memory and threads of a multiprocessor; a block takes 1 KiB of shared memory more than it asked for
LIMITS = {"sm_80": {"shared": 164 * 1024, "threads": 2048}, "sm_90a": {"shared": 228 * 1024, "threads": 2048}}
# The table's rows: one dtype of those that differ in nothing else, vector widths and aligned tiles.
SHOWN = re.compile(
    r"tile_kernel<(Bf16|float), .*true>$|sm90_kernel<Bf16|plain_kernel|dropout_kernel<(Bf16|float)>"
    r"|sweep_kernel<8, (Copy<float, Bf16>|Copy<Bf16, float>|(Apply|Gradient|AddPieces|SumPiece)<Bf16>)>"
    r"|sweep_kernel<4, (Sum<float>|JoinParts<float>|Copy<uint, uint>)>|sweep_kernel<8, Gather<ushort>>|transpose_kernel<uint, uint>"
    r"|attention_(forward|backward)_kernel<(Bf16|float), |delta_kernel<8, Bf16>"
    r"|slab_kernel<8, (Column<Bf16>|WeightSums<Bf16, (true|false)>)>"
    r"|(statistics|layer_norm|pieces|backward|whole|whole_backward)_kernel<8, Bf16>"
    r"|parts_kernel<Bf16, |gradient_kernel<Bf16>|find_kernel"
)
Row = dict[str, Any]


@functools.cache
def cuobjdump() -> Path | None:
    """From the wheel nvidia-cuda-cuobjdump, else the path's."""
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/cuobjdump"))
    found = wheels[-1] if wheels else shutil.which("cuobjdump")
    return Path(found) if found else None


def readable(symbols: list[str]) -> dict[str, str]:
    """Demangled, without namespaces and parameters: tile_kernel<Bf16, true, ...>."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = {}
    for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|gingham::cuda::|gingham::|^void ", "", name)
        depth, end = 0, len(short)
        for at, mark in enumerate(short):
            depth += {"<": 1, ">": -1}.get(mark, 0)
            if mark == "(" and depth == 0:
                end = at
                break
        names[symbol] = short[:end].replace("> >", ">>").replace("unsigned ", "u")
    return names


def measure(source: Path, arch: str) -> dict[str, Row]:
    """Of every instance in the source; kept beside the cubin."""
    cubin, report = nvcc.compile_cubin(source, arch)
    kept = cubin.with_suffix(f".{hashlib.sha256(repr(COUNTS).encode()).hexdigest()[:8]}.json")
    if not kept.exists():
        kept.write_text(json.dumps(disassemble(cubin, report)))
    rows: dict[str, Row] = json.loads(kept.read_text())
    return rows


def disassemble(cubin: Path, report: str) -> dict[str, Row]:
    tool = cuobjdump()
    assert tool is not None
    sass = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL))
    spills = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(rf"Compiling entry function '(\S+)'.*?{spills}.*?Used (\d+) registers", report, re.DOTALL)
    names = readable([entry[0] for entry in found])
    rows = {}
    for symbol, stack, stores, loads, registers in found:
        row: Row = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code[symbol], re.MULTILINE)
        for name, pattern in COUNTS.items():
            row[name] = sum(1 for opcode in opcodes if re.match(pattern, opcode))
        rows[names[symbol]] = row
    return rows


def tile_of(name: str) -> list[int] | None:
    found = re.search(r"Tile<([\d, ]+)>", name)
    return [int(word) for word in found[1].split(",")] if found else None


def block_of(name: str) -> tuple[int, int] | None:
    """Threads and bytes of shared memory that the launch asks for; None for a kernel that this file does not know."""
    tile = tile_of(name)
    if name.startswith("tile_kernel") and tile:
        m, n, warp_m, warp_n, stages, _ = tile
        return 32 * (m // warp_m) * (n // warp_n), stages * (m + n) * 128
    if name.startswith("plain_kernel"):
        element = 8 if "double" in name else 4
        return 256, 2 * 2 * 16 * (2 * 16 * 16 // element + 16 // element) * element
    attention = re.match(r"attention_(forward|backward)_kernel<(\w+), (\d+)(?:, (true|false))?>", name)
    if attention:
        return attention_block(attention[2], int(attention[3]), attention[1] == "backward", attention[4] == "true")
    wide = re.match(r"slab_kernel<(\d+),", name)
    if wide:
        room = 3 * 256 * (8 if "double" in name else 4) if "WeightSums" in name else 0
        return 256, 8 * 8 * 32 * int(wide[1]) + room
    return None if name.startswith("sm90_kernel") else (256, 0)


def attention_block(element: str, width: int, backward: bool, of_keys: bool) -> tuple[int, int]:
    """Threads and shared memory without a mask, after ForwardShape and BackwardShape of csrc/kernels."""
    size = {"Bf16": 2, "F16": 2, "float": 4, "double": 8}[element]
    tensor, wide = size == 2, max(size, 4)
    warps, stages = (2, 1) if width * size >= 1024 else (4, 2)
    pitch = width * size + (0 if tensor else 16)
    if backward:
        most = (64 if size == 8 else 128) if of_keys else width
        other = (16 if size == 8 else 64 if width * size <= 128 else 32) // (2 if of_keys and width >= most else 1)
    else:
        other = 16 if size == 8 else 64 if tensor and width <= 128 else 32
    stage = 2 * other * pitch + (2 * other * wide if backward else 0)
    slabs = 0 if tensor else warps * 16 * (other + 4) * size
    return 32 * warps, (2 if backward else 1) * 16 * warps * pitch + stages * stage + slabs


def occupancy(name: str, registers: int, arch: str) -> int | None:
    """Resident threads of a multiprocessor in percent."""
    block = block_of(name)
    if block is None:
        return None
    threads, shared = block
    limits = LIMITS[arch]
    per_warp = (registers * 32 + 255) // 256 * 256
    by_registers = 65536 // per_warp // (threads // 32)
    by_shared = limits["shared"] // (shared + 1024)
    return 100 * min(by_registers, by_shared, 32, limits["threads"] // threads) * threads // limits["threads"]


def measure_all(architectures: tuple[str, ...] = nvcc.ARCHITECTURES) -> dict[str, Any]:
    tools = nvcc.toolkit()
    assert tools is not None
    nvcc.compile_kernels(architectures)
    out: dict[str, Any] = {"nvcc": tools.version}
    for arch in architectures:
        out[arch] = {}
        for source in nvcc.kernels():
            for name, row in sorted(measure(source, arch).items()):
                out[arch][name] = row | {"source": source.name}
    return out


def budget() -> dict[str, Any]:
    pinned: dict[str, Any] = json.loads(BUDGET.read_text())
    return pinned


def table(pinned: dict[str, Any]) -> str:
    """The instances that do the work: vector widths and aligned tiles; the fallbacks for odd views are in sass_budget.json."""
    lines = [
        f"nvcc {pinned['nvcc']}; registers and resident threads (of 2048) for sm_80 / sm_90a, instructions for sm_90a.",
        "No instance has a stack or a spill.",
        "",
        "| kernel | registers | occupancy | HMMA (HGMMA) | LDGSTS (UTMALDG) | LDSM | 16-byte LDG / STG / LDS / STS |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, new in pinned["sm_90a"].items():
        old = pinned["sm_80"].get(name)
        if old is None or not SHOWN.match(name):
            continue
        occupied = [occupancy(name, row["registers"], arch) for row, arch in ((old, "sm_80"), (new, "sm_90a"))]
        resident = " / ".join("-" if percent is None else f"{percent} %" for percent in occupied)
        wide = " / ".join(str(new[key]) for key in ("LDG.128", "STG.128", "LDS.128", "STS.128"))
        hopper = new["HGMMA"] > 0
        products, copies = (f"({new['HGMMA']})", f"({new['UTMALDG']})") if hopper else (new["HMMA"], new["LDGSTS"])
        lines.append(
            f"| `{name}` | {'-' if hopper else old['registers']} / {new['registers']} | {resident} "
            f"| {products} | {copies} "
            f"| {new['LDSM']} | {wide} |"
        )
    return "\n".join(lines)


def write() -> None:
    found = measure_all()
    rows = {arch: [json.dumps(name) + ": " + json.dumps(row) for name, row in found[arch].items()] for arch in nvcc.ARCHITECTURES}
    parts = [f'"{arch}": {{\n  ' + ",\n  ".join(rows[arch]) + "\n}" for arch in nvcc.ARCHITECTURES]
    BUDGET.write_text(f'{{"nvcc": {json.dumps(found["nvcc"])},\n' + ",\n".join(parts) + "}\n")
    text = DOCS.read_text()
    head, rest = text.split(BEGIN)
    DOCS.write_text(head + BEGIN + "\n" + table(found) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    else:
        print(table(measure_all()))
