"""What csrc/transport/ucx_api.h declares is what the ucp.h of the installed wheel says: prototypes, layouts, numbers."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc"
HEADER = CSRC / "transport" / "ucx_api.h"


def wheel() -> Path | None:
    found = importlib.util.find_spec("libucx")
    folders = [Path(folder) / "include" for folder in (found.submodule_search_locations or ())] if found else []
    return next((folder for folder in folders if (folder / "ucp" / "api" / "ucp.h").exists()), None)


pytestmark = [
    pytest.mark.skipif(wheel() is None, reason="no libucx wheel, which has the headers: pip install 'gingham[hosts]'"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


def declared() -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """(functions, constants, (struct, field)) of our header, read from its text, so that none can be forgotten."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    ours = text[text.index("#ifndef UCP_H_") : text.index("#endif")]
    functions = re.findall(r"\(\*(\w+)\)\(", text[text.index("struct UcxApi") : text.index("struct UcxFound")])
    constants = re.findall(r"\b(UC[PS]_\w+) =", ours)
    fields = []
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", ours, re.DOTALL):
        body = re.sub(r"union \{.*?\n  \} (\w+);", r"int \1;", body, flags=re.DOTALL)
        body = re.sub(r"\(\*(\w+)\)\([^;]*\);", r"\1;", body)
        for line in body.split(";"):
            fields += [(name, re.sub(r"\[\d+\]", "", part.split()[-1]).lstrip("*")) for part in line.split(",") if part.split()]
    return functions, constants, fields


def compiled(text: str, folder: Path, includes: list[str], run: bool) -> subprocess.CompletedProcess[str]:
    source, program = folder / "compare.cc", folder / "compare"
    source.write_text(text)
    done = subprocess.run(
        ["g++", "-std=c++20", "-w", f"-I{CSRC}", *includes, str(source), "-o", str(program)], capture_output=True, text=True
    )
    return subprocess.run([str(program)], capture_output=True, text=True) if run and done.returncode == 0 else done


def layout(fields: list[tuple[str, str]], constants: list[str]) -> str:
    structs = sorted({struct for struct, _ in fields})
    lines = [f'std::printf("{struct} %zu\\n", sizeof({struct}));' for struct in structs]
    lines += [f'std::printf("{s}.{f} %zu %zu\\n", offsetof({s}, {f}), sizeof({s}::{f}));' for s, f in fields]
    lines += [f'std::printf("{constant} %lld\\n", static_cast<long long>({constant}));' for constant in constants]
    lines += ['std::printf("status %zu\\n", sizeof(ucs_status_t));']
    return '#include <cstddef>\n#include <cstdio>\n#include "transport/ucx_api.h"\nint main() {\n' + "\n".join(lines) + "\n}\n"


def test_structs_and_numbers_are_ucxs(tmp_path: Path) -> None:
    _, constants, fields = declared()
    assert len(constants) >= 25 and len({struct for struct, _ in fields}) == 8 and len(fields) >= 48, (constants, fields)
    text = layout(fields, constants)
    ours = compiled(text, tmp_path, [], run=True)
    theirs = compiled("#include <ucp/api/ucp.h>\n" + text, tmp_path, ["-isystem", str(wheel())], run=True)
    assert ours.returncode == 0 == theirs.returncode, ours.stderr[-2000:] + theirs.stderr[-2000:]
    assert len(ours.stdout.splitlines()) == 8 + len(fields) + len(constants) + 1
    assert ours.stdout == theirs.stdout


def same(functions: list[str], wrong: dict[str, str]) -> str:
    lines = ["#include <ucp/api/ucp.h>", "#include <type_traits>", '#include "transport/ucx_api.h"', "using gingham::UcxApi;"]
    for name in functions:
        theirs = wrong.get(name, ("ucs_" if name == "status_string" else "ucp_") + name)
        lines.append(f"static_assert(std::is_same_v<decltype(UcxApi::{name}), decltype(&{theirs})>);")
    return "\n".join([*lines, "int main() {}", ""])


def test_prototypes_are_ucxs(tmp_path: Path) -> None:
    functions, _, _ = declared()
    assert len(functions) == 25, functions
    done = compiled(same(functions, {}), tmp_path, ["-isystem", str(wheel())], run=False)
    assert done.returncode == 0, done.stderr[-3000:]
    done = compiled(same(functions, {"ep_create": "ucp_worker_create"}), tmp_path, ["-isystem", str(wheel())], run=False)
    assert done.returncode != 0, "a difference would not be seen"
