"""The stand-in for NCCL whose ranks share one GPU, on a fake GPU: what a run on a real one is worth rests on this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cuda import fake_build, nvcc
from cuda.fake_runs import LONG_TESTS, PYTHON_TESTS, python_tests, run, same_gpu, survivors, train

pytestmark = [
    pytest.mark.skipif(nvcc.toolkit() is None, reason="no nvcc: the fake runtime needs the toolkit's headers"),
    pytest.mark.timeout(4000),
]
MESSAGES = Path(__file__).parent / "samegpu" / "messages.py"


@pytest.fixture(scope="module")
def package() -> Path:
    return fake_build.build("cpu", binding=True)


def messages(package: Path, mode: str, **environment: str) -> list[str]:
    folder = package / "gingham"
    told = fake_build.environment(package, FAKE_CUDA_LIBRARY=str(folder / "libfakecuda.so"), FAKE_CUDA_JITTER="300", **environment)
    command = [sys.executable, str(MESSAGES), str(folder / "libsamegpu.so"), mode]
    done = subprocess.run(command, capture_output=True, text=True, env=told, timeout=120, cwd=nvcc.ROOT)
    assert done.stdout, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == bool(found), done.stdout + done.stderr  # bench/gpu.sh looks at the status alone
    return found


@pytest.mark.parametrize("mode", ["exchange", "mismatch", "abort", "again"])
def test_messages(package: Path, mode: str) -> None:
    """Contents of messages of many pieces between three ranks and to themselves; sizes that differ are told to both ranks; an abort lets
    streams go on; a world that ended leaves no file, no memory and nothing in /dev/shm."""
    assert messages(package, mode) == []


def test_a_driver_without_the_operations_is_named(package: Path) -> None:
    (said,) = messages(package, "old driver", FAKE_CUDA_OLD_DRIVER="1")
    assert "cuStreamWaitValue32" in said and "CUDA 12" in said, said


@pytest.mark.parametrize("name", ["products over nccl", "collectives", pytest.param("with jitter", marks=pytest.mark.matrix)])
def test_the_pipeline_on_one_gpu(package: Path, name: str) -> None:
    run([str(package / "pipeline_tests"), name], fake_build.environment(package, **same_gpu(package)))


def test_ranks_share_a_gpu_only_with_it(package: Path) -> None:
    """With NCCL in its place the second rank is refused a GPU by number."""
    command = "import gingham; gingham.spawn(lambda rank: gingham.init(mode='1d', size=2).job.gpu, 2)"
    told = fake_build.package_environment(package, FAKE_CUDA_DEVICES="1")
    with pytest.raises(AssertionError, match=r"rank 1 wants GPU 1 of 1: NCCL needs a GPU for every rank"):
        run([sys.executable, "-c", command], told, limit=60)
    out = run([sys.executable, "-c", command.replace("gingham.spawn", "print(gingham.spawn", 1) + ")"], told | same_gpu(package), limit=60)
    assert out.splitlines()[-1] == "[0, 0]"


def test_products_on_one_gpu(package: Path) -> None:
    """Equal to torch in float64, forward and backward, in every mode, with all ranks on one GPU."""
    python_tests(package, PYTHON_TESTS["products"], "not matrix", **same_gpu(package))


def test_a_killed_rank_is_named(package: Path) -> None:
    """The watch aborts the communicators, so that streams that wait for the dead go on."""
    assert all(rank == 2 for _, rank, _ in survivors(package, "killed", "PeerDied", **same_gpu(package)))


@pytest.mark.matrix
@pytest.mark.parametrize("fault", ["raises", "leaves"])
def test_more_faults_are_named(package: Path, fault: str) -> None:
    assert all(rank == 2 for _, rank, _ in survivors(package, fault, "PeerDied", **same_gpu(package)))


@pytest.mark.matrix
def test_models_on_one_gpu(package: Path) -> None:
    for name in ("model", "rings"):
        python_tests(package, PYTHON_TESTS[name], "not matrix", **same_gpu(package))


QUICK = ("tests/python/test_checkpoint_joins.py", "tests/python/test_pipeline_checkpoints.py")


def test_checkpoints_and_pipelines_on_one_gpu(package: Path) -> None:
    """Stages write a checkpoint that other hybrids read, and train on as one process does."""
    python_tests(package, list(QUICK), "not matrix", **same_gpu(package))


@pytest.mark.matrix
@pytest.mark.parametrize("name", LONG_TESTS)
def test_all_that_trains_on_one_gpu(package: Path, name: str) -> None:
    python_tests(package, LONG_TESTS[name], "not matrix", 3600, **same_gpu(package))


@pytest.mark.matrix
def test_a_gpt_trains_on_one_gpu(package: Path) -> None:
    train(package, **same_gpu(package))
