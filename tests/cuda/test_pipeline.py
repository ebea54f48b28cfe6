"""Rung 5: the real host side of the CUDA backend (binding, step, streams, events, NCCL groups, watch) on fake devices.

Nothing here was tested on a GPU: the runtime and NCCL are tests/cuda/fake, kernels are the CPU's or the simulated .cu files.
"""

import json
import sys
from pathlib import Path

import pytest

from cuda import fake_build, nvcc, overlap
from cuda.fake_runs import LONG_TESTS, PYTHON_TESTS, python_tests, run, survivors, train

pytestmark = [
    pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc: the fake runtime needs the toolkit's headers"),
    pytest.mark.timeout(4000),
]
NAMES = ("hosts.py", "refused.py", "one_thread.py", "broken_off.py", "early.py", "engines.py")
VIRTUAL, REFUSED, ONE_THREAD, BROKEN_OFF, EARLY, ENGINES = (Path(__file__).parent / "fake" / name for name in NAMES)


@pytest.fixture(scope="module")
def package() -> Path:
    return fake_build.build("cpu", binding=True)


def test_products_and_collectives(package: Path) -> None:
    """2, 4 and 8 devices, every product, 1 and 3 slices, NCCL and copies; rendezvous, buffered, one communicator at a time, jitter."""
    print(run([str(package / "pipeline_tests")], fake_build.environment(package)))


def test_backward_runs_in_the_thread_that_has_the_mesh(package: Path) -> None:
    run([sys.executable, str(ONE_THREAD)], fake_build.package_environment(package))


@pytest.mark.matrix
def test_simulated_kernels_in_the_pipeline() -> None:
    """The .cu files' own code, launched by the real step."""
    folder = fake_build.build("simulated")
    for name in ("collectives", "a step could be captured", "attention"):
        print(run([str(folder / "pipeline_tests"), name], fake_build.environment(folder)))


@pytest.mark.matrix
def test_simulated_kernels_on_every_grid() -> None:
    folder = fake_build.build("simulated")
    for name in ("products over nccl", "products over copies"):
        print(run([str(folder / "pipeline_tests"), name], fake_build.environment(folder)))


@pytest.mark.matrix
def test_thread_sanitizer() -> None:
    """Ranks as threads: a missing event between streams is a data race, which ThreadSanitizer names. `make sanitize` runs the same."""
    folder = fake_build.build("cpu", "thread")
    environment = fake_build.environment(folder, FAKE_CUDA_JITTER="100")
    for name in ("products over copies", "attention over copies"):
        print(run([str(folder / "pipeline_tests"), name], environment | {"TSAN_OPTIONS": "halt_on_error=1"}))


MORE_PYTHON_TESTS = {
    "products": PYTHON_TESTS["products"],
    "bytes": ["tests/python/test_traffic.py", "tests/python/nn/test_layer_traffic.py"],
    "nn": ["tests/python/nn"],
    "models": ["tests/python/convert", "tests/python/test_training_tools.py", "tests/python/test_compile.py"],
}


@pytest.mark.parametrize("name", PYTHON_TESTS)
def test_python_on_fake_devices(package: Path, name: str) -> None:
    """Equal to torch in float64, forward and backward, in every mode; bytes equal to the formulas; the same tests as on the CPU."""
    python_tests(package, PYTHON_TESTS[name], "not matrix")


@pytest.mark.matrix
@pytest.mark.parametrize("name", MORE_PYTHON_TESTS)
def test_python_matrix_on_fake_devices(package: Path, name: str) -> None:
    python_tests(package, MORE_PYTHON_TESTS[name], "matrix or not matrix", 3600)


@pytest.mark.matrix
@pytest.mark.parametrize("name", LONG_TESTS)
def test_all_that_trains_on_fake_devices(package: Path, name: str) -> None:
    """Checkpoints, hybrids, pipelines, layers, faults: the quick tests of each."""
    python_tests(package, LONG_TESTS[name], "not matrix", 3600)


@pytest.mark.matrix
def test_pipelines_in_every_schedule_on_fake_devices(package: Path) -> None:
    """On devices that carry one group at a time, so that two ranks which queued messages in other orders would wait for each other."""
    python_tests(package, ["tests/python/test_pipeline.py"], "matrix", 3600)


def test_a_gpt_trains_as_its_serial_twin(package: Path) -> None:
    train(package)


def test_weights_gathered_early(package: Path) -> None:
    """Bits and bytes are those without it, also where weights are written to between layers; a rank that differs is named."""
    found = json.loads(run([sys.executable, str(EARLY)], fake_build.package_environment(package), limit=600).splitlines()[-1])
    assert found["wrong"] == []
    print(found["made"])
    guessed = {name: count for name, count in found["made"].items() if not name.startswith(("written", "jumping", "compiled"))}
    assert all(count["begun"] == count["used"] >= 9 for count in guessed.values()), guessed
    assert found["made"]["written 2.5d"]["begun"] > found["made"]["written 2.5d"]["used"]
    assert all("rank 1 got" in said and "weights gathered ahead" in said for said in found["alone"]), found["alone"]
    assert all(said.startswith("MeshError") and "rank 1 got" in said for said in found["within"]), found["within"]


def test_what_a_stack_of_linears_queues_overlaps(package: Path) -> None:
    """By the model of overlap.py, at the sizes of docs/cuda.md: what is lost where a message comes later, or a kernel waits for more."""
    nccl, engines = overlap.layer(package, 16384, 8192).values()
    shares = {part: (nccl[part].share, engines[part].share) for part in nccl}
    print(shares)
    least = {"forward": (0.86, 0.91), "backward": (0.81, 0.89), "both": (0.82, 0.90)}
    assert all(by_nccl >= least[part][0] and by_engines >= least[part][1] for part, (by_nccl, by_engines) in shares.items()), shares


@pytest.mark.parametrize("why", ["", "GINGHAM_COPY_ENGINES=yes, 1 asks for them", "cudaIpcOpenMemHandle of the memory of rank 0"])
def test_copy_engines_are_had_or_missed_by_name(package: Path, why: str) -> None:
    """On every rank the same, with a warning on one; the results are right either way."""
    asked = {"GINGHAM_COPY_ENGINES": "yes" if "yes" in why else "1"} | ({"FAKE_CUDA_WINDOWS": "closed"} if "memory" in why else {})
    seen = json.loads(run([sys.executable, str(ENGINES)], fake_build.package_environment(package, **asked)).splitlines()[-1])
    assert all(each["off"] < 1e-12 for each in seen), seen
    found = [by for each in seen for by in each["by"].values()]
    assert len(found) == 12 and all(by == "copy engines" if not why else by.startswith("NCCL (rank ") for by in found), seen
    assert not why or all(why in each["by"]["world"] for each in seen), seen
    assert [len(each["told"]) for each in seen] == [int(bool(why)), 0, 0, 0] and (not why or why in seen[0]["told"][0]), seen


ENGINED = {"GINGHAM_COPY_ENGINES": "1", "GINGHAM_COPY_BYTES": "4096"}  # slots of 256 bytes or 512


def test_a_gpt_trains_by_copy_engines(package: Path) -> None:
    train(package, **ENGINED)


@pytest.mark.parametrize(
    "fault", ["killed", pytest.param("raises", marks=pytest.mark.matrix), pytest.param("leaves", marks=pytest.mark.matrix)]
)
def test_faults_are_named_by_copy_engines(package: Path, fault: str) -> None:
    assert all(rank == 2 for _, rank, _ in survivors(package, fault, "PeerDied", **ENGINED))


@pytest.mark.matrix
@pytest.mark.parametrize("name", PYTHON_TESTS | LONG_TESTS)
def test_all_that_trains_by_copy_engines(package: Path, name: str) -> None:
    """Slots of 4 or 8 KiB in what takes minutes: with small ones its larger messages are thousands of rounds, beyond the tests' limits."""
    slots = ENGINED if name in PYTHON_TESTS else ENGINED | {"GINGHAM_COPY_BYTES": "65536"}
    python_tests(package, (PYTHON_TESTS | LONG_TESTS)[name], "not matrix", 3600, **slots)


def test_virtual_hosts_of_fake_devices(package: Path) -> None:
    """Two hosts of fake GPUs: keys between them on the engine, bytes by the fake NCCL; bits and counts are those of one host."""
    out = run([sys.executable, str(VIRTUAL)], fake_build.package_environment(package), limit=300)
    assert json.loads(out.splitlines()[-1]) == []


def test_what_attention_on_gpus_refuses(package: Path) -> None:
    """Heads wider than the kernels take: rings by name, gathered keys go to torch, and the core itself on every rank."""
    out = run([sys.executable, str(REFUSED)], fake_build.package_environment(package), limit=120)
    for ring, order, same, core in json.loads(out.splitlines()[-1]):
        assert "heads of 264" in ring and "at most 256" in ring and "ring=False" in ring, ring
        assert "too wide for GPUs" in order and "rank 1" in core and "heads of 264 float32" in core, (order, core)
        assert same


def test_memory_outlasts_messages(package: Path) -> None:
    """Of a group that nobody has settled, and of a call that an error leaves while one of its messages hangs."""
    faults = {"FAKE_NCCL_HANG": "0,4", "FAKE_NCCL_REFUSE": "0,5"}
    out = run([sys.executable, str(BROKEN_OFF)], fake_build.package_environment(package, **faults), limit=120)
    seen = json.loads(out.splitlines()[-1])
    assert [(alive, left, under_way) for alive, left, _, under_way in seen] == [(2, 0, 0)] * 4, seen
    assert "a send was refused (injected)" in seen[0][2], seen


@pytest.mark.parametrize(
    "fault", ["killed", "nccl error", "nccl hangs", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("raises", "leaves"))]
)
def test_faults_are_named(package: Path, fault: str) -> None:
    """Every surviving rank raises a typed error soon; an NCCL error or hang names a rank, a killed one is named exactly."""
    extra = {"nccl error": {"FAKE_NCCL_FAIL": "1,7"}, "nccl hangs": {"FAKE_NCCL_HANG": "1,7"}}.get(fault, {})
    expected = "PeerStalled" if fault == "nccl hangs" else "PeerDied"
    others = survivors(package, fault, expected, **extra)
    if fault in ("killed", "raises", "leaves"):
        assert all(rank == 2 for _, rank, _ in others), others
