"""`make wheels`: what the wheels hold, and each beside the torch releases that it must serve, in a fresh environment away from the sources.

The full matrices build both wheels first, or take those of the folder that GINGHAM_WHEELS names. torch for CUDA, 7 GB on the disk for each
trial while it runs, is brought only with GINGHAM_LARGE_TORCH=1; no GPU is needed, and one that is there is hidden.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cuda import nvcc, sass

SCRIPT = nvcc.ROOT / "wheels.py"
TRIAL = Path(__file__).with_name("wheel_trial.py")
PYTHONS = {"cp311": "python3.11", "cp312": "python3.12"}
SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
slow = [pytest.mark.matrix, pytest.mark.timeout(3600)]


@functools.cache
def wheels_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheels", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=os.environ | environment)


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    """Also where a name is on the path and cannot be run, as a shim of pyenv's."""
    shim = tmp_path / "bin" / "python9.12"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    path = os.pathsep.join([str(shim.parent), os.environ["PATH"]])
    done = build("--out", str(tmp_path / "dist"), "python9.12", "/nowhere/python", PATH=path, PYENV_ROOT=str(tmp_path))
    assert done.returncode == 1 and "MISSING: no python9.12, /nowhere/python here" in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "dist").exists()
    assert wheels_script().interpreter(sys.executable), "the Python that runs this is one"


def test_cuda_is_asked_for_where_nvcc_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ON insists, so that a wheel without CUDA cannot come of a machine with nvcc unless it was asked for."""
    monkeypatch.delenv("WITH_CUDA", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert wheels_script().with_cuda() == "OFF"
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert wheels_script().with_cuda() == "ON"
    monkeypatch.setenv("WITH_CUDA", "OFF")
    assert wheels_script().with_cuda() == "OFF"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each Python that is here."""
    here = {tag: name for tag, name in PYTHONS.items() if wheels_script().interpreter(name)}
    folder = os.environ.get("GINGHAM_WHEELS")
    if not folder:
        folder = str(tmp_path_factory.mktemp("dist"))
        done = build("--out", folder, *here.values())
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {tag: list(Path(folder).resolve().glob(f"gingham-*-{tag}-*.whl")) for tag in here}
    assert found and all(len(paths) == 1 for paths in found.values()), found
    return {tag: paths[0] for tag, paths in found.items()}


def taken(wheels: dict[str, Path], tag: str) -> Path:
    if tag not in wheels:
        pytest.skip(f"no {PYTHONS[tag]} here")
    return wheels[tag]


def elf(path: Path, *words: str) -> str:
    return subprocess.run(["readelf", "--wide", *words, str(path)], capture_output=True, text=True, check=True).stdout


class TestContents:
    pytestmark = [*slow, pytest.mark.parametrize("tag", PYTHONS)]

    def test_the_package_and_nothing_else(self, wheels: dict[str, Path], tag: str) -> None:
        with zipfile.ZipFile(taken(wheels, tag)) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
            microbench = archive.getinfo("gingham/bin/microbench")
        sources = subprocess.run(["git", "-C", str(nvcc.ROOT), "ls-files", "python/gingham"], capture_output=True, text=True, check=True)
        built = {f"gingham/_C.cpython-{tag[2:]}-x86_64-linux-gnu.so", "gingham/bin/microbench"}
        expected = {name.removeprefix("python/") for name in sources.stdout.split()} | built
        assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == expected
        assert (microbench.external_attr >> 16) & 0o111 == 0o111, "it cannot be started"

    def test_metadata(self, wheels: dict[str, Path], tag: str) -> None:
        path = taken(wheels, tag)
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata: Message = Parser().parsestr(archive.read(name).decode())
        required = [word.replace(" ", "") for word in metadata.get_all("Requires-Dist") or []]
        assert "torch>=2.10" in required and not any(word.startswith("torch") and "<" in word for word in required), required
        assert metadata["Requires-Python"] == ">=3.11"
        assert re.fullmatch(rf"gingham-{re.escape(metadata['Version'])}-{tag}-{tag}-manylinux_2_\d+_x86_64\.whl", path.name)

    def test_binaries(self, wheels: dict[str, Path], tag: str, tmp_path: Path) -> None:
        """Only the system's libraries, no newer glibc than the tag says, stripped, and nothing of the machine that built them."""
        path = taken(wheels, tag)
        glibc = int(re.search(r"manylinux_2_(\d+)_", path.name)[1])  # type: ignore[index]
        with zipfile.ZipFile(path) as archive:
            files = [name for name in archive.namelist() if not name.endswith("/")]
            archive.extractall(tmp_path)
        for name in files:
            content = (tmp_path / name).read_bytes()
            for place in (rb"/(work|home|root|Users|opt)/[\w.]+", rb"gingham-wheels-\w+", rb"/pip-build-env"):
                assert not (found := re.search(place, content)), (name, found)
            if content[:4] == b"\x7fELF":
                assert set(re.findall(r"NEEDED.*\[(.+)\]", elf(tmp_path / name, "--dynamic"))) <= SYSTEM, name
                assert not re.search("RPATH|RUNPATH", elf(tmp_path / name, "--dynamic")), name
                wanted = [int(minor) for minor in re.findall(r"Name: GLIBC_2\.(\d+)", elf(tmp_path / name, "--version-info"))]
                assert wanted and max(wanted) <= glibc, (name, max(wanted))
                assert ".symtab" not in elf(tmp_path / name, "--sections") and ".debug_info" not in elf(tmp_path / name, "--sections"), name

    def test_kernels_for_both_generations(self, wheels: dict[str, Path], tag: str, tmp_path: Path) -> None:
        path, tool = taken(wheels, tag), sass.cuobjdump()
        if nvcc.toolkit() is None or tool is None:
            pytest.skip("no nvcc, so that wheels have no kernels, or no cuobjdump to look at them")
        with zipfile.ZipFile(path) as archive:
            binaries = [archive.extract(name, tmp_path) for name in archive.namelist() if re.search(r"_C\..*so$|microbench$", name)]
        assert len(binaries) == 2
        for binary in binaries:
            said = subprocess.run([str(tool), "--list-elf", binary], capture_output=True, text=True, check=True).stdout
            assert {"sm_80", "sm_90a"} <= set(re.findall(r"\.(sm_\w+)\.cubin", said)), said[:500]


def environment_with(tmp_path: Path, tag: str, wheel: Path, torch: str) -> Path:
    """The Python of a fresh environment that holds this wheel, with what it asks for, and this torch."""
    base = wheels_script().interpreter(PYTHONS[tag])
    subprocess.run([base, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    for words in ([*index, f"torch=={torch}"], [str(wheel), f"torch=={torch}"]):
        done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return python


def tried(python: Path, folder: Path) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GINGHAM_", "PYTHON", "VIRTUAL_ENV"))}
    shutil.copy(TRIAL, folder / "trial.py")
    environment = kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), "trial.py"], capture_output=True, text=True, env=environment, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("torch", ["2.13.0", "2.11.0"])
@pytest.mark.parametrize("tag", PYTHONS)
def test_beside_torch(wheels: dict[str, Path], tag: str, torch: str, tmp_path: Path) -> None:
    """One binary beside each release: the file that is imported is the wheel's, byte by byte."""
    wheel = taken(wheels, tag)
    # what requirements.lock takes for make test is there already; others come from PyPI, which serves Linux torch for CUDA
    if (tag, torch) != ("cp311", "2.13.0") and os.environ.get("GINGHAM_LARGE_TORCH") != "1":
        pytest.skip(f"torch {torch} for {PYTHONS[tag]} has 7 GB: GINGHAM_LARGE_TORCH=1 brings it")
    try:
        found = tried(environment_with(tmp_path, tag, wheel, torch), tmp_path)
    finally:
        shutil.rmtree(tmp_path / "venv", ignore_errors=True)
    print({name: found[name] for name in ("torch", "cuda of torch", "gpu", "one rank", "four ranks", "refusal")})
    with zipfile.ZipFile(wheel) as archive:
        (core,) = (archive.read(name) for name in archive.namelist() if re.search(r"/_C\..*\.so$", name))
    assert found["core sha256"] == hashlib.sha256(core).hexdigest() and found["core"].startswith(str(tmp_path / "venv"))
    assert found["package"].startswith(str(tmp_path / "venv")) and found["version"] == wheel.name.split("-")[1]
    assert found["torch"].split("+")[0] == torch and not found["gpu"]
    assert found["report"]["built"] == (nvcc.toolkit() is not None) and not found["report"]["devices"], found["report"]
    assert found["one rank"] < 1e-5 and len(found["four ranks"]) == 4 and max(found["four ranks"]) < 1e-5, found
    missing = "rank 0: no CUDA device is visible" if found["report"]["built"] else "built without CUDA"
    assert missing in found["refusal"], found["refusal"]
    for name, said in (("help", "train|plan|doctor"), ("doctor", "microbench"), ("bench", "matmul"), ("train", "equal to the formula")):
        status, out, error = found[name]
        assert status == 0 and said in out, (name, status, out, error)
    largest = re.search(r"largest of all.*?([0-9.e-]+) relative", found["train"][1])
    assert largest and float(largest[1]) < 1e-5, found["train"][1]
