"""Builds what the tests of this folder need while the tests of other folders run: these leave a third of two cores idle.

    PYTHONPATH=tests python -m cuda.ahead     builds all of it

Each build holds its lock (nvcc.alone), so that a test that comes before its build is done waits for it. A build that fails is left to the
test that asks for it, which builds again and shows what the compiler said.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from cuda import fake_build, nvcc, shim_build
from cuda.ptx import build as ptx_build

PARTS: tuple[Callable[[], object], ...] = (
    lambda: fake_build.build("cpu", binding=True),
    lambda: shim_build.build("plain"),
    ptx_build.build,
    lambda: nvcc.compile_kernels(("sm_90a",)),
    lambda: shim_build.build("address"),
)


def begin() -> subprocess.Popen[bytes]:
    """All parts in a process group of its own, which takes only what others leave of the cores."""
    environment = os.environ | {"PYTHONPATH": str(nvcc.ROOT / "tests"), "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(["nice", "-n", "19", sys.executable, "-m", "cuda.ahead"], env=environment, process_group=0, **quiet)


def end(running: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGTERM)
    running.wait()


def main() -> None:
    parent = os.getppid()
    for part in PARTS:
        if os.getppid() != parent:  # whoever asked for it is gone
            return
        with contextlib.suppress(Exception):
            part()


if __name__ == "__main__":
    main()
