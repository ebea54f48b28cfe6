"""The rules of architecture as tests: who may know whom, sizes, words. An exception is named here, with its reason."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC, PYTHON = ROOT / "csrc", ROOT / "python" / "gingham"

FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 120
LONG_FILES = {"csrc/third_party/dlpack.h": "vendored unchanged"}
LONG_FUNCTIONS: dict[str, str] = {}

CORE_FOLDERS = {
    "base": {"base"},
    "kernels": {"base", "kernels"},
    "control": {"base", "control"},
    "transport": {"base", "control", "transport"},
    "collectives": {"base", "kernels", "transport", "collectives"},
    "ops": {"base", "kernels", "control", "transport", "collectives", "ops"},
}
# room or module of python/gingham -> those of ours that it may import; commands and __init__ may import any of them
PYTHON_ROOMS = {
    "errors": set(),
    "native": {"_C"},
    "function": set(),
    "graph_ops": {"function", "errors"},
    "mesh": {"function", "graph_ops", "errors", "native"},
    "checks": {"mesh", "errors"},
    "plan": {"mesh", "errors"},
    "autograd": {"function", "graph_ops", "mesh", "plan", "errors", "native"},
    "nn": {"function", "graph_ops", "mesh", "checks", "plan", "autograd", "errors"},
    "launch": {"mesh", "checks", "plan", "errors", "native"},
    "checkpoint": {"mesh", "launch", "errors", "native"},
    "convert": {"function", "graph_ops", "mesh", "checks", "plan", "autograd", "nn", "checkpoint", "errors"},
    "pipeline": {"mesh", "checks", "plan", "autograd", "nn", "launch", "checkpoint", "errors", "native"},
    "integrations": {"mesh", "autograd", "nn", "convert", "checkpoint", "errors"},
    "commands": {"mesh", "plan", "launch", "nn", "checkpoint", "convert", "errors", "native", "__init__"},
}
LOOSE_ENTRIES = 9  # of python/gingham that are no rooms
ARITHMETIC = ("mesh/modes.py", "mesh/layout.py", "errors.py", "plan/")  # know neither the core nor torch
MODE_FILES = {"mesh/modes.py", "plan/choose.py", "commands/arguments.py", "commands/cli.py"}
MODE = re.compile(r"""["'](1d|2d|2\.5d|3d)["']""")
TEXT = {".py", ".cc", ".h", ".cu", ".cuh", ".sh", ".md", ".toml", ".txt", ".yaml", ".svg", ""}


def tracked() -> list[Path]:
    """Files of the project: tracked by git, or new and not ignored; a source archive without git is walked."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode == 0:
        return sorted(ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file())
    ignored = {".venv", "build", "__pycache__", ".git"}
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and not ignored & set(path.parts))


FILES = [path for path in tracked() if path.suffix in TEXT]
CPP = [path for path in FILES if path.suffix in {".cc", ".h", ".cu", ".cuh"}]
PY = [path for path in FILES if path.suffix == ".py"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_core_folders_include_only_what_lies_below() -> None:
    wrong = []
    for folder, allowed in CORE_FOLDERS.items():
        for path in sorted((CSRC / folder).glob("*")):
            for include in includes(path):
                head = include.split("/")[0]
                if head in CORE_FOLDERS and head not in allowed:
                    wrong.append(f"{name(path)} includes {include}")
                if "binding" in include:
                    wrong.append(f"{name(path)} includes {include}: nothing calls upward")
    assert not wrong, wrong


def test_core_has_no_torch_header_and_one_place_for_pybind11() -> None:
    wrong = []
    for path in CPP:
        for include in includes(path):
            if re.match(r"(torch|ATen|c10|caffe2)/", include):
                wrong.append(f"{name(path)} includes {include}")
            if include.startswith("pybind11") and not re.fullmatch(r"csrc/binding\w*\.(cc|h)", name(path)):
                wrong.append(f"{name(path)} includes {include}")
    assert not wrong, wrong


def test_devices_are_told_apart_in_few_places() -> None:
    """What a build for tests changes is linked, not compiled, into the product."""
    known = {
        "csrc/base/stream.h",
        "csrc/transport/device.cc",
        "csrc/kernels/device.cuh",
        "csrc/kernels/gemm_sm90.cu",
        "csrc/kernels/gemm_sm90_check.cu",
    }
    wrong = [name(path) for path in CPP if path.is_relative_to(CSRC) and re.search(r"#\s*if.*GINGHAM_(CUDA|SHIM)", path.read_text())]
    assert set(wrong) <= known, wrong
    assert not [name(path) for path in CPP + PY if not path.is_relative_to(ROOT / "tests") and "GINGHAM_FAKE" in path.read_text()]


def test_every_kernel_header_has_a_cpu_source() -> None:
    headers = sorted((CSRC / "kernels").glob("*.h"))
    missing = [name(header) for header in headers if not header.with_suffix(".cc").exists()]
    assert not missing, missing


def imports(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """First name below gingham of every import in the file; package = the names of its package below gingham."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "gingham":
                    yield parts[1] if len(parts) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = ["gingham", *package[: len(package) - node.level + 1], *module]
            if module[:1] == ["gingham"]:
                yield from [module[1]] if len(module) > 1 else [alias.name for alias in node.names]


def test_python_rooms_import_only_what_lies_below() -> None:
    wrong = []
    for path in sorted(PYTHON.rglob("*.py")):
        relative = path.relative_to(PYTHON).with_suffix("").parts
        if relative[0] in ("__init__", "__main__"):
            continue
        found = set(imports(ast.parse(path.read_text()), list(relative[:-1])))
        wrong += [f"{name(path)} imports {module}" for module in sorted(found - PYTHON_ROOMS[relative[0]] - {relative[0]})]
    assert not wrong, wrong


def test_the_rooms_have_no_circle() -> None:
    below = {room: set(known) & set(PYTHON_ROOMS) for room, known in PYTHON_ROOMS.items()}
    while ready := [room for room, known in below.items() if not known]:
        below = {room: known - set(ready) for room, known in below.items() if room not in ready}
    assert not below, below


def test_arithmetic_knows_neither_the_core_nor_torch() -> None:
    wrong = []
    for path in sorted(PYTHON.rglob("*.py")):
        if not path.relative_to(PYTHON).as_posix().startswith(ARITHMETIC) or path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            ours = isinstance(node, ast.ImportFrom) and node.level > 0
            pure = (
                not ours
                or module in ("errors", "mesh.modes", "mesh.layout", "modes", "layout")
                or path.parent.name == "plan"
                and node.level == 1
            )
            if not pure or any(each.split(".")[0] in ("torch", "native", "_C") for each in [module, *names]):
                wrong.append(f"{name(path)} imports {module or names}")
    assert not wrong, wrong


def test_few_entries_are_no_rooms() -> None:
    loose = [path for path in FILES + [PYTHON / "py.typed", PYTHON / "_C.pyi"] if path.parent == PYTHON]
    assert len(set(loose)) <= LOOSE_ENTRIES, sorted(map(name, loose))


def test_mode_strings_only_where_modes_are_known() -> None:
    wrong = []
    for path in PY + CPP:
        if not path.is_relative_to(CSRC) and not path.is_relative_to(PYTHON):
            continue
        if path.is_relative_to(PYTHON) and path.relative_to(PYTHON).as_posix() in MODE_FILES:
            continue
        code = strip_comments(path.read_text()) if path.suffix != ".py" else strip_docstrings(path.read_text())
        wrong += [f"{name(path)}: {hit}" for hit in MODE.findall(code)]
    assert not wrong, wrong


def strip_docstrings(text: str) -> str:
    """The file's code without comments and docstrings; other strings stay."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def strip_comments(text: str) -> str:
    """C++ without comments and string contents' braces; line breaks stay, so that lines can be counted."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)

    def blank(match: re.Match[str]) -> str:
        word = match.group()
        return "\n" * word.count("\n") if word.startswith("/") else word.replace("{", " ").replace("}", " ")

    return pattern.sub(blank, text)


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def cpp_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Every block after a ')' that is not a namespace, class, enum or initialiser, outermost first, by counting braces."""
    # a macro's lines stay as empty ones, so that lines can be counted
    text = re.sub(r"^[ \t]*#(?:\\\n|[^\n])*", lambda m: "\n" * m.group().count("\n"), strip_comments(path.read_text()), flags=re.MULTILINE)
    depth, start, open_depth, label = 0, 0, -1, ""
    for match in re.finditer(r"[{};]", text):
        at, mark = match.start(), match.group()
        if mark == "{":
            if open_depth < 0:
                head = re.split(r"[{};]", text[:at])[-1]
                header = " ".join(head.split())
                scope = re.match(r"(inline )?(namespace|class|struct|union|enum|extern|template<[^>]*> ?(class|struct))\b", header)
                if "(" in header and not scope:
                    # the signature's first line: the split keeps the blank lines before it
                    start = text[:at].rfind(head.strip()) if head.strip() else at
                    open_depth, label = depth, header
            depth += 1
        elif mark == "}":
            depth -= 1
            if depth == open_depth:
                yield label[:80], text.count("\n", start, at) + 1
                open_depth = -1


def test_tensors_name_their_device() -> None:
    """A factory without `device=` makes a tensor on torch's default device, which is neither the mesh's nor the host's by right."""
    makers = {"tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm"}
    wrong = []
    for path in sorted(PYTHON.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in makers:
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and not {"device", None} & {keyword.arg for keyword in node.keywords}:
                wrong.append(f"{name(path)}:{node.lineno}: torch.{node.func.attr}")
    assert not wrong, wrong


def test_files_are_short() -> None:
    long = {name(path): len(path.read_text().splitlines()) for path in CPP + PY}
    long = {path: lines for path, lines in long.items() if lines > FILE_LINES and path not in LONG_FILES}
    assert not long, f"files over {FILE_LINES} lines: {long}"


def test_functions_are_short() -> None:
    wrong = []
    for path in CPP + PY:
        if name(path) in LONG_FILES:
            continue
        limit = KERNEL_LINES if path.suffix in {".cu", ".cuh"} else FUNCTION_LINES
        functions = python_functions(path) if path.suffix == ".py" else cpp_functions(path)
        for function, lines in functions:
            if lines > limit and f"{name(path)}:{function}" not in LONG_FUNCTIONS:
                wrong.append(f"{name(path)}:{function} has {lines} lines")
    assert not wrong, wrong


def test_named_exceptions_still_exist() -> None:
    assert all((ROOT / path.split(":")[0]).exists() and reason for path, reason in (LONG_FILES | LONG_FUNCTIONS).items())


@pytest.mark.parametrize("word", ["utils", "common", "helpers", "misc", "core", "impl"])
def test_no_file_is_named(word: str) -> None:
    assert not [name(path) for path in FILES if word in path.relative_to(ROOT).with_suffix("").parts]


def test_no_leftovers_and_no_machine_paths() -> None:
    """Split so that this file does not find itself."""
    left = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    paths = re.compile(r"(?<![\w.])/(work|home|root|opt|Users|workspace)" r"/[\w.]+")
    wrong = []
    for path in FILES:
        if name(path) in {"LICENSE", "csrc/third_party/dlpack.h"}:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if left.search(line) or paths.search(line):
                wrong.append(f"{name(path)}:{number}: {line.strip()[:100]}")
    assert not wrong, wrong
