"""Faults that GINGHAM_FAULT asks for, to see what a job does when they come by themselves. Unset it costs nothing.

    GINGHAM_FAULT="rank=2,op=matmul,call=3,kind=kill"      several with ";" between them

op: a call as the ranks name it in errors ("linear.forward", "all_gather", "sizes": STEPS and COLLECTIVES), its part before or after the
dot ("linear", "matmul", "backward"), "*" for any of these; or "init", "save", "load": points on the way through them, in the
order of INIT for init, and of the pieces of work that the ranks do together in a save or load (plan, merge, write, finish).
call: the n-th of that name on the rank, 1 by default; calls count from init on, points from the process's start.
kind: kill (SIGKILL) | stop (SIGSTOP) | raise (RuntimeError) | exit (the process ends at once, status 1) | oom (the next
allocation of the call fails; at a point: MemoryError).
"""

from __future__ import annotations

import difflib
import os
import signal
from dataclasses import dataclass

VARIABLE = "GINGHAM_FAULT"
KINDS = ("kill", "stop", "raise", "exit", "oom")
POINTS = ("init", "save", "load")
MOST = 2**31 - 1  # the last call that can be named
# fused products, and attention over a cut sequence by a ring: .forward and .backward
STEPS = ("linear", "shared", "qkv", "gated", "patches", "matmul", "matmul to float32", "attention")
PRODUCTS = ("forward", "backward")
COLLECTIVES = ("all_gather", "all_reduce", "broadcast", "exchange", "reduce_scatter", "sizes")
INIT = ("init.start", "init.arrive", "init.group", "init.join", "init.mesh")  # after the step of that name
KNOWN = ("*", *STEPS, *PRODUCTS, *(f"{step}.{product}" for step in STEPS for product in PRODUCTS), *COLLECTIVES, *POINTS, *INIT)


def _known() -> str:
    steps = f"{', '.join(STEPS)}, alone or with {' or '.join(f'.{product}' for product in PRODUCTS)}; {', '.join(PRODUCTS)}"
    return f"{steps}; {', '.join(COLLECTIVES)}; {', '.join((*POINTS, *INIT))}; *"


@dataclass
class Fault:
    rank: int
    op: str
    call: int
    kind: str
    seen: int = 0

    @property
    def is_point(self) -> bool:
        return self.op.split(".")[0] in POINTS


def parse(text: str, size: int) -> list[Fault]:
    """The faults of a specification for a job of `size` ranks. Raises ValueError naming what is wrong in it."""
    faults = []
    for part in filter(None, (part.strip() for part in text.split(";"))):

        def wrong(what: str, part: str = part) -> ValueError:
            return ValueError(
                f'{VARIABLE}: {what} in "{part}": expected "rank=2,op=matmul,call=3,kind={"|".join(KINDS)}", several with ";"'
            )

        fields = {name.strip(): value.strip() for name, _, value in (field.partition("=") for field in part.split(","))}
        if len(fields) < part.count(",") + 1:
            raise wrong("a field is given twice")
        strange = sorted(set(fields) - {"rank", "op", "call", "kind"})
        if strange:
            raise wrong(f"unknown field {strange[0]!r}")
        lacking = [name for name in ("rank", "op", "kind") if not fields.get(name)]
        if lacking:
            raise wrong(f"no {lacking[0]}")
        for name in ("rank", "call"):
            if not fields.get(name, "1").isdecimal():
                raise wrong(f"{name}={fields[name]} is no number")
        fault = Fault(int(fields["rank"]), fields["op"], int(fields.get("call", 1)), fields["kind"])
        if fault.rank >= size:
            raise wrong(f"rank={fault.rank} of a job of {size}")
        if fault.call > MOST:
            raise wrong(f"call={fault.call}, expected at most {MOST}")
        if fault.call < 1:
            raise wrong("calls count from 1, got call=0,")
        if fault.kind not in KINDS:
            raise wrong(f"kind={fault.kind}")
        if fault.op not in KNOWN:
            near = difflib.get_close_matches(fault.op, KNOWN, 1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{wrong(f'op={fault.op} is no call or point{meant}')}; ops are {_known()}")
        faults.append(fault)
    return faults


_text = ""
_size = 0
_points: list[Fault] = []


def read(rank: int, size: int) -> list[tuple[str, int, str]]:
    """Reads the variable, for init; returns the faults of this rank's calls, for the core. Raises ValueError for a wrong one."""
    global _text, _size, _points
    text = os.environ.get(VARIABLE, "")
    mine = [fault for fault in parse(text, size) if fault.rank == rank]
    if (text, size) != (_text, _size):
        _text, _size, _points = text, size, [fault for fault in mine if fault.is_point]
    return [(fault.op, fault.call, fault.kind) for fault in mine if not fault.is_point]


def at(point: str) -> None:
    """Passes a point: "save", "load", or one of INIT."""
    for fault in _points:
        if fault.op not in (point, point.split(".")[0]):
            continue
        fault.seen += 1
        if fault.seen == fault.call:
            _strike(fault, point)


def _strike(fault: Fault, point: str) -> None:
    if fault.kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
    elif fault.kind == "exit":
        os._exit(1)
    else:
        error = RuntimeError if fault.kind == "raise" else MemoryError
        raise error(f"rank {fault.rank}: the error that {VARIABLE} asks for, at {point}")
