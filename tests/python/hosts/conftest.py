"""Two network namespaces with a link between them, as two hosts have; root only."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two, with eth0 at 10.77.0.1 and 10.77.0.2."""
    names = f"gh{os.getpid()}a", f"gh{os.getpid()}b"

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if os.geteuid() != 0 or shutil.which("ip") is None or not ip("netns", "add", names[0]):
        pytest.skip("no network namespaces here: they need root and ip")
    try:
        ip("netns", "add", names[1])
        made = ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        if not made:
            pytest.skip("no veth here")
        for at, name in enumerate(names, 1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{at}/24", "dev", "eth0")
            assert ip("-n", name, "link", "set", "eth0", "up") and ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)
