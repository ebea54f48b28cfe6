"""Runs the parts of bench/gpu.sh, each in a process of its own under its own limit, and puts their rows together.

    python bench/gpu/run.py SET --out FOLDER     SET: truth (all that is checked, the first times) | long (sanitizers, every grid, counters)
    python bench/gpu/run.py SET --list           the parts with limits and the seconds that they are known to take, nothing is run

Writes FOLDER/gpu_SET.json and FOLDER/gpu_SET.log; the last lines are a table. Leaves with the number of parts that failed (at most 100),
among them those for which no time was left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts import BUILD, ROOT, SETS, Part, parts_of

NO_TIME = "not run, no time left"


def listed(parts: list[Part], budget: float) -> str:
    lines = ["  limit  predicted  part"]
    for part in parts:
        known = f"{part.measured:8.1f} s" if part.measured is not None else "     never"
        lines.append(f"{part.limit:5d} s {known}  {part.name}: {' '.join(part.command)}")
    never = [part for part in parts if part.measured is None]
    predicted, most, unknown = (
        sum(values) for values in zip(*((p.predicted, p.limit, p.limit * (p in never)) for p in parts), strict=True)
    )
    lines += [
        f"{len(parts)} parts, predicted {predicted:.0f} s: {predicted - unknown:.0f} s of parts that one H100 has timed,"
        f" {unknown} s, their limits, for {len(never)} that no GPU has timed",
        f"at most {most} s, cut off at {budget:.0f}; before them {BUILD} s for the build of bench/gpu.sh on 16 cores",
    ]
    return "\n".join(lines)


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def executed(part: Part, limit: float) -> tuple[str, str]:
    """What the part printed and how it ended, "" for well. Whatever it started ends with it, also where this process is interrupted."""
    if not shutil.which(part.command[0]):
        return "", f"{part.command[0]} is not here"
    ours = {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")]), "PYTHONUNBUFFERED": "1"}
    # into a file: a pipe would stay open for as long as any process that the part left behind
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            part.command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | ours | part.environment, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
            ended = f"status {status}" if status else ""
        except subprocess.TimeoutExpired:
            ended = "ran past its limit" if limit == part.limit else f"ran past the {limit:.0f} s that were left"
        finally:
            kill(process.pid)
            process.wait()
        said.seek(0)
        return said.read(), ended


def rows_of(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.splitlines():
        if line.startswith("ROW "):
            try:
                rows.append(json.loads(line[4:]))
            except ValueError:  # a part that was killed as it wrote
                rows.append({"name": "a row that was cut off", "value": line[4:80], "bound": 0.0, "unit": "", "right": False})
    return rows


def run(part: Part, room: float, log: Any) -> dict[str, Any]:
    """The rows that the part printed, how it ended and how long it took."""
    began = time.monotonic()
    # one whose seconds are known is not begun in less
    text, ended = ("", NO_TIME) if room < max(5, part.measured or 0) else executed(part, min(part.limit, int(room)))
    seconds = time.monotonic() - began
    log.write(f"\n===== {part.name}: {' '.join(part.command)}\n{text}\n===== {seconds:.1f} s {ended}\n")
    log.flush()
    rows = rows_of(text)
    return {
        "part": part.name,
        "command": part.command,
        "environment": part.environment,
        "limit": part.limit,
        "measured": part.measured,
        "seconds": seconds,
        "ended": ended,
        "rows": rows,
        "wrong": sum(each["right"] is False for each in rows),
        "tail": text.splitlines()[-12:],
    }


def state(found: dict[str, Any]) -> str:
    """A part's line in the table."""
    checks = sum(each["right"] is not None for each in found["rows"])
    word = "FAILED" if found["ended"] or found["wrong"] else "ok"
    right = f"{checks - found['wrong']}/{checks} checks"
    return f"{word:6s} {found['part']:36s} {found['seconds']:6.1f} s of {found['limit']:3d}  {right:14s} {found['ended']}".rstrip()


def shown(found: dict[str, Any]) -> list[str]:
    """The part's line, one for each wrong row and each measurement, and the end of what an unhappy one printed."""
    lines = [state(found)]
    for each in found["rows"]:
        value = each["value"] if isinstance(each["value"], str) else f"{each['value']:.4g}"
        rest = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in each.items()
            if k not in ("name", "value", "bound", "unit", "right")
        )
        if each["right"] is False:
            lines.append(f"         WRONG {each['name']}: {value} > {each['bound']} {rest}"[:400])
        elif each["right"] is None:
            lines.append(f"         {each['name']}: {value} {each['unit']} {rest}"[:700])
    failed = bool(found["ended"] or found["wrong"])
    if not found["rows"]:
        lines += [f"         | {line[:160]}" for line in found["tail"][-(10 if failed else 4) :]]
    elif failed and found["ended"]:
        lines += [f"         | {line[:160]}" for line in found["tail"][-3:]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="parts whose name holds one of these words: times,streams")
    parser.add_argument("--budget", type=float, default=560, help="seconds in all; parts that no longer fit are named and left out")
    chosen = parser.parse_args()
    parts = [part for part in parts_of(chosen.set) if any(word in part.name for word in chosen.only.split(","))]
    if not parts:
        parser.error(f"--only {chosen.only}: no part of {chosen.set} has such a name; --list shows them")
    if chosen.list:
        print(listed(parts, chosen.budget))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), []
    with open(chosen.out / f"gpu_{chosen.set}.log", "w") as log:
        for part in parts:
            done.append(run(part, chosen.budget - (time.monotonic() - began), log))
            print("\n".join(shown(done[-1])), flush=True)
            (chosen.out / f"gpu_{chosen.set}.json").write_text(json.dumps(done, indent=1))
    failed = sum(bool(each["ended"] or each["wrong"]) for each in done)
    print("\n" + "\n".join(map(state, done)))
    left = [each["part"] for each in done if each["ended"] == NO_TIME]
    took = f"in {time.monotonic() - began:.0f} s"
    print(f"{len(done) - failed} of {len(done)} parts as they should be, {failed} not, {took}; {NO_TIME}: {', '.join(left) or 'none'}")
    sys.exit(min(failed, 100))


if __name__ == "__main__":
    main()
