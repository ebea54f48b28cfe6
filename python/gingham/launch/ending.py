"""The end of a process: torch's threads let go of what they hold before Python ends.

A thread of torch's Gloo that drops the last reference to a finished collective's tensors takes Python's lock. Where the interpreter is
ending by then, that ends the process by SIGABRT ("terminate called without an active exception"), though the program went right. torch asks
programs to call destroy_process_group against it, which waits for these threads only where no DeviceMesh or the like keeps the group.
"""

import atexit
import os
import time
from pathlib import Path

_PATIENCE = 1.0  # seconds; a thread that is in a collective still, whose peers are slow, keeps what it holds
_LOOK = 0.001  # seconds


@atexit.register  # when gingham is imported: what a program registers later runs before
def let_go() -> None:
    """Gives Python's lock away until torch's threads have nothing to do, for a second at most."""
    end = time.monotonic() + _PATIENCE
    idle = 0
    while idle < 2 and (states := _states()) and time.monotonic() < end:
        time.sleep(_LOOK)
        idle = 0 if "R" in states else idle + 1


def _states() -> list[str]:
    """Of the threads that torch named, whose work holds tensors: R for one that runs, or waits for a processor."""
    found = []
    for each in Path("/proc/self/task").glob("*/stat"):
        try:
            name, _, rest = each.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        if name.startswith("pt_") and int(each.parent.name) != os.getpid():
            found.append(rest.split()[0])
    return found
