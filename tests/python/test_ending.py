"""How a process ends: torch's threads must not take it along."""

import subprocess
import sys

import pytest

# Python's lock is kept from the collective's end to the program's, so that torch's thread, once it has had a processor, waits for it then,
# with the last reference to the collective's tensors
HELD = """
import sys, time, torch, torch.distributed as dist
{}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
out, x = [torch.zeros(4)], torch.ones(4)
sys.setswitchinterval(100)
work = dist.all_gather(out, x, async_op=True)
del work, out, x
end = time.perf_counter() + 0.5
while time.perf_counter() < end:
    pass
{}
"""


def ended(imported: str, last: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HELD.format(imported, last)], capture_output=True, text=True, timeout=100)


DESTROYED = "dist.destroy_process_group()"  # the mesh keeps the group and its threads


@pytest.mark.parametrize("last", ["", "sys.exit(0)", "import atexit; atexit.register(dist.barrier)", DESTROYED])
def test_a_program_that_went_right_ends_so(last: str) -> None:
    for _ in range(3):
        done = ended("import gingham", last)
        assert done.returncode == 0, done.stderr


def test_without_gingham_torch_ends_it_by_a_signal() -> None:
    """Else the test above shows nothing."""
    for _ in range(10):
        done = ended("")
        if done.returncode:
            assert "terminate called without an active exception" in done.stderr
            return
    pytest.skip("10 programs ended well without gingham: this torch lets go by itself, or their threads had no processor")
