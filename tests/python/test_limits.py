"""Limits of the host: system calls that are forbidden, memory cgroups, address space, ranks, and memory over many steps."""

import ctypes
import os
import platform
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from gingham import _C, nn
from grids import GRIDS, ranks_of

CALLS = {"x86_64": dict(memfd_create=319, fallocate=285, pidfd_open=434), "aarch64": dict(memfd_create=279, fallocate=47, pidfd_open=434)}
NUMBERS = CALLS.get(platform.machine(), {})


def forbid(call: str) -> None:
    """From here on the kernel answers EPERM to a system call of this process and its children, as a container's seccomp filter does."""
    load, jump, give = 0x20, 0x15, 0x06
    program = [(load, 0, 0, 0), (jump, 0, 1, NUMBERS[call]), (give, 0, 0, 0x00050001), (give, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filters = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filters are not allowed here")


def alone(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, with this file's names at hand."""
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]}\nfrom test_limits import *\n{body}"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=os.environ | environment)


def filters_or_skip(done: subprocess.CompletedProcess[str]) -> None:
    if "seccomp filters are not allowed here" in done.stderr:
        pytest.skip("the system allows no seccomp filters")


@pytest.mark.skipif(not NUMBERS, reason="the numbers of this machine's system calls are not listed")
@pytest.mark.parametrize("call", ["memfd_create", "fallocate"])
def test_b7_a_forbidden_call_is_named_with_its_remedy(call: str) -> None:
    done = alone(f"forbid({call!r})\ngingham.init()")
    filters_or_skip(done)
    assert done.returncode == 1 and f"{call}: Operation not permitted" in done.stderr, done.stderr
    assert f"allow {call}" in done.stderr and "seccomp" in done.stderr and "MeshError" in done.stderr, done.stderr


PIDFD = """
import json, time, warnings
forbid("pidfd_open")
def body(rank):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mesh = gingham.init("2d", size=4, timeout=20.0)
    assert any("pidfd_open" in str(each.message) for each in seen), seen
    x = mesh.scatter(torch.ones(4, 4))
    mesh.gather(x)
    if rank == 2:
        os.kill(os.getpid(), 9)
    start = time.monotonic()
    try:
        mesh.gather(x)
    except gingham.PeerDied as error:
        assert error.rank == 2 and time.monotonic() - start < 1.0
        raise ValueError("seen") from error
try:
    gingham.spawn(body, 4)
except gingham.PeerDied as error:
    print("rank", error.rank, time.monotonic())
"""


@pytest.mark.skipif(not NUMBERS, reason="the numbers of this machine's system calls are not listed")
def test_b7_without_pidfds_deaths_are_named_as_soon() -> None:
    done = alone(PIDFD)
    filters_or_skip(done)
    assert done.returncode == 0 and "rank 2" in done.stdout, (done.stdout, done.stderr[-3000:])


def test_b8_too_many_ranks_are_refused_before_anything_is_made(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "65")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(gingham.MeshError, match="at most 64 ranks of a job.*got 65"):
        gingham.init("1d", size=65)
    assert not torch.distributed.is_initialized()


def test_b8_too_little_address_space_is_named_with_the_fix() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))\n"
    done = alone(limit + "gingham.init(heap=1 << 40)")
    assert done.returncode == 1 and "MemoryError: cannot map" in done.stderr, done.stderr[-2000:]
    assert "ulimit -v" in done.stderr and "gingham.init(heap=bytes)" in done.stderr
    done = alone(limit + "print(gingham.init(heap=1 << 26).job.heap)")
    assert done.returncode == 0 and done.stdout.split() == [str(1 << 26)], done.stderr[-2000:]


def test_b8_the_heap_is_rank_0s_for_all(ranks) -> None:
    def made(rank: int) -> int:
        mesh = gingham.init(**GRIDS["2.5d"], heap=(32 << 20) + 1)
        assert mesh.background.job is mesh.job
        return mesh.job.heap

    assert set(ranks(8)(made)) == {(32 << 20) + 4096}
    with pytest.raises(gingham.MeshError, match="heap=0"):
        gingham.init(heap=0)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 700 MiB that a process may join."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for words in mounts:
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options):
            group = Path(words[4]) / f"gingham-test-{os.getpid()}"
            limit = group / ("memory.max" if kind == "cgroup2" else "memory.limit_in_bytes")
            try:
                group.mkdir()
            except OSError:
                continue
            try:
                limit.write_text(str(700 << 20))
                yield group
                return
            except OSError:
                continue
            finally:
                for _ in range(50):
                    try:
                        group.rmdir()
                        break
                    except OSError:
                        time.sleep(0.1)
    pytest.skip("no memory cgroup may be made here")


def test_b2_a_memory_cgroup_is_asked_before_memory_is_taken(cgroup: Path) -> None:
    body = f"""
open("{cgroup}/cgroup.procs", "w").write(str(os.getpid()))
mesh = gingham.init(heap=4 << 30)
kept = []
try:
    for _ in range(100):
        kept.append(mesh.empty([4 << 20], torch.float32).fill_(1))
except MemoryError as error:
    print(len(kept), error)
"""
    done = alone(body)
    assert done.returncode == 0 and "the memory cgroup" in done.stdout, (done.returncode, done.stdout, done.stderr[-2000:])
    assert "16777216 bytes" in done.stdout and 1 <= int(done.stdout.split()[0]) < 45


def of_random_shapes(rank: int, name: str, steps: int) -> list[tuple[int, int]]:
    """Training steps over batches of random lengths: (bytes of memory of this process, reserved bytes of the heap), now and then."""
    mesh = gingham.init(**GRIDS[name])
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.LayerNorm(32), nn.MLP(32, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator, seen = random.Random(1), []
    for step in range(steps):
        x = mesh.scatter(torch.ones(generator.randint(1, 700), generator.randint(1, 12), 32))
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps // 3 and step % (steps // 30) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages * os.sysconf("SC_PAGESIZE"), mesh.job.memory()["reserved"]))
    return seen


def slope(values: list[int], steps: int) -> float:
    """Bytes a step, by least squares over the last two thirds of the steps."""
    at = torch.linspace(steps / 3, steps, len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    return float(((at - at.mean()) * (y - y.mean())).sum() / ((at - at.mean()) ** 2).sum())


# Bytes for what the largest of these steps holds at one time (2 MB in 2d, 4 in 1d) and the holes between. Free blocks that are kept by
# their size and never joined came to 24 MiB in 2d, 36 in 1d.
BOUND = {"2d": 12 << 20, "1d": 16 << 20}


def test_b11_the_heap_is_bounded_over_random_lengths(ranks) -> None:
    for seen in ranks(4)(of_random_shapes, "2d", 300, timeout=120.0):
        assert max(reserved for _, reserved in seen) <= BOUND["2d"], seen


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["1d", "2d"])
def test_b11_memory_is_flat_over_ten_thousand_steps_of_random_lengths(ranks, name: str) -> None:
    steps = 10_000
    for seen in ranks(ranks_of(name))(of_random_shapes, name, steps, timeout=1500.0):
        figures: Any = [slope([rss for rss, _ in seen], steps), slope([reserved for _, reserved in seen], steps)]
        print(f"{name}: {figures[0]:.0f} bytes a step resident, {figures[1]:.0f} reserved, {seen[-1]}")
        assert max(figures) < 1024, (figures, seen)
        assert max(reserved for _, reserved in seen) <= BOUND[name], seen


def test_memory_left_is_less_than_the_hosts() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert 0 < _C.memory_left() <= total
