"""`python -m gingham plan`: the table of every grid that so many ranks can form, cheapest first, or of every hybrid of data, pipeline and
tensor ranks."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from rich.console import Console

from ..plan.choose import Choice, Machine, plans
from ..plan.hybrids import AXES, SHARDS, Hybrid, Wish, hybrids, why
from ..plan.pipeline import SCHEDULES
from ..plan.tables import amount, show
from ..plan.workload import Workload, gpt
from .arguments import MODES, ZERO
from .options import number, whole

LINES = 24  # of the table of hybrids


def _one_line(first: Choice, other: Choice) -> bool:
    return first.grid == other.grid or {first.name, other.name} == {"grid"}


def _names(choices: list[Choice]) -> str:
    return " = ".join(dict.fromkeys(choice.name for choice in choices if choice.name != "grid")) or "grid"


def _grids(choices: list[Choice]) -> str:
    return ", ".join(dict.fromkeys(" x ".join(map(str, choice.grid)) for choice in choices))


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--ranks", type=whole(1, 4096), required=True, help="processes of the job")
    for name, value, text in (
        ("layers", 4, "transformer blocks"),
        ("width", 256, "features between the blocks"),
        ("heads", 8, "attention heads, which divide --width"),
        ("batch", 8, "samples of a step"),
        ("context", 128, "tokens of a sample"),
        ("vocabulary", 256, "tokens that there are"),
    ):
        parser.add_argument(f"--{name}", type=whole(1), default=value, help=text)
    parser.add_argument(
        "--hybrids", action="store_true", help="every data x pipeline x tensor that fits (default: grids, no data or stages)"
    )
    parser.add_argument("--data", type=whole(1), metavar="D", help="hybrids of so many data ranks (default: 1, or any with --hybrids)")
    parser.add_argument("--zero", type=int, choices=tuple(ZERO), help="cut over data as train's --zero (default: each way)")
    parser.add_argument("--pipeline", type=whole(1), metavar="P", help="of so many pipeline ranks (default: 1, or any with --hybrids)")
    parser.add_argument("--schedule", choices=SCHEDULES, help="of stages (default: each)")
    parser.add_argument("--microbatches", type=whole(1), metavar="M", help="of a step (default: 1, 2, 4 and 8 times the pipeline's ranks)")
    parser.add_argument("--mode", choices=MODES, help="of the tensor ranks (default: every grid)")
    parser.add_argument("--hosts", type=whole(1), default=1, metavar="H", help="hybrids whose ranks lie on so many hosts, as many on each")
    usual = Machine()
    parser.add_argument("--memory", type=number(0), default=usual.memory / 1e9, metavar="GB", help="of tensors a rank may hold")
    parser.add_argument("--latency", type=number(0, equal=True), default=usual.latency, metavar="S", help="seconds a message")
    parser.add_argument("--bandwidth", type=number(0), default=usual.bandwidth / 1e9, metavar="GB/S", help="that a rank receives")
    parser.add_argument("--between", type=number(0), metavar="GB/S", help="that a rank receives from other hosts (default: --bandwidth)")
    parser.add_argument("--speed", type=number(0), default=usual.speed / 1e12, metavar="TFLOP/S", help="of a rank")


def run(options: Namespace) -> int:
    """The command: the table of every grid; returns its exit code, 1 where no grid is possible."""
    if options.width % options.heads:
        print(f"gingham plan: --heads {options.heads} must divide --width {options.width}", file=sys.stderr)
        return 2
    between = None if options.between is None else options.between * 1e9
    machine = Machine(options.latency, options.bandwidth * 1e9, options.speed * 1e12, options.memory * 1e9, between)
    workload = gpt(options.layers, options.width, options.heads, options.batch, options.context, options.vocabulary)
    given = [options.data, options.zero, options.pipeline, options.schedule, options.microbatches, options.mode]
    if options.hybrids or options.hosts > 1 or any(value is not None for value in given):
        return _hybrids(options, workload, machine)
    ranked = plans(workload, options.ranks, machine)
    # choices of the same cost are one line: a mode and the grid that it is, grids whose axes trade places
    lines: dict[tuple[str, ...], list[Choice]] = {}
    for choice in ranked:
        costs = amount(choice.received / options.ranks), f"{choice.messages:,}", amount(choice.memory), f"{choice.seconds:#.3g}"
        named = "" if choice.name == "grid" else choice.name
        alike = next((key for key, (first, *_) in lines.items() if key[1:] == (*costs, choice.reason) and _one_line(first, choice)), None)
        lines.setdefault(alike or (f"{named} {choice.grid}", *costs, choice.reason), []).append(choice)
    rows = [(_names(choices), _grids(choices), *cells) for (_, *cells, _), choices in lines.items()]
    reasons = [(row[0] if row[0] != "grid" else row[1], key[-1]) for row, key in zip(rows, lines, strict=True) if key[-1]]
    title = _title(options, workload)
    headings = ("mode", "m x n x k", "received a rank", "messages", "memory a rank", "seconds")
    console = Console()
    pale = [index for index, key in enumerate(lines) if key[-1]]
    show(console, title, headings, rows, right=headings[2:], dim=pale)
    if not ranked[0].reason:
        console.print(f"mode='auto' takes the first line, the cheapest: {ranked[0].name} {_grids(ranked[:1])}", markup=False)
    for reason in dict.fromkeys(reason for _, reason in reasons):
        which = ", ".join(name for name, why in reasons if why == reason)
        console.print(f"not possible ({which}): {reason}", markup=False)
    console.print("data and pipeline ranks beside these: --hybrids, or --data and --pipeline", markup=False)
    return 1 if ranked[0].reason else 0


def _title(options: Namespace, workload: Workload) -> str:
    ranks = f"{options.ranks} rank{'' if options.ranks == 1 else 's'}"
    return f"GPT of {workload.parameters():,} parameters, {options.batch} x {options.context} tokens, {ranks}"


def _hybrids(options: Namespace, workload: Workload, machine: Machine) -> int:
    """The table of hybrids, of each shape the cheapest schedule and number of micro-batches; 1 where none is possible, 2 where the
    options do not fit together."""
    every = options.hybrids or options.hosts > 1
    pipeline = options.pipeline or (None if every else 1)
    wish = Wish(
        data=options.data or (None if every else 1),
        shards=SHARDS if options.zero is None else (ZERO[options.zero],),
        pipeline=pipeline,
        schedules=SCHEDULES if options.schedule is None else (options.schedule,),
        microbatches=options.microbatches,
        mode=options.mode,
        hosts=options.hosts,
    )
    if options.ranks % options.hosts:
        print(f"gingham plan: --hosts {options.hosts} must divide the {options.ranks} ranks", file=sys.stderr)
        return 2
    ranked = hybrids(workload, options.ranks, machine, wish)
    wrong = "" if ranked else "no data x pipeline x tensor ranks of these numbers and mode"
    wrong = wrong or ("--schedule orders the passes of stages: give --pipeline, at least 2" if options.schedule and pipeline == 1 else "")
    wrong = wrong or ("--zero cuts what --data replicates: give --data, at least 2" if options.zero and wish.data == 1 else "")
    if wrong:
        print(f"gingham plan: {wrong} ({options.ranks} ranks)", file=sys.stderr)
        return 2
    shapes: dict[tuple[object, ...], Hybrid] = {}
    for each in ranked:
        shapes.setdefault((each.pipeline, each.data, each.shard, each.tensor["mode"], each.name.rpartition(" x ")[2], each.reason), each)
    possible = [each for each in shapes.values() if not each.reason]
    rows = [_cells(each, options.hosts) for each in possible[:LINES]]
    far = ("from other hosts",) if options.hosts > 1 else ()
    headings = ("pipeline x data x tensor", *(f"{axis} bytes" for axis in AXES), *far, "messages", "memory a rank", "idle", "seconds")
    console = Console()
    show(console, _title(options, workload) + "; bytes received a rank and step", headings, rows, right=headings[1:])
    if len(possible) > LINES:
        console.print(f"and {len(possible) - LINES} dearer shapes", markup=False)
    if possible:
        # init chooses before it knows the hosts
        told = "parallel='auto' takes" if options.hosts == 1 else f"on {options.hosts} hosts, parallel={possible[0].parallel} is"
        console.print(f"{told} the cheapest. {why(ranked)}", markup=False)
    for reason in dict.fromkeys(each.reason for each in ranked if each.reason):
        names = list(dict.fromkeys(each.name for each in ranked if each.reason == reason))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"not possible ({', '.join(names[:3])}{more}): {reason}", markup=False)
    return 0 if possible else 1


def _cells(each: Hybrid, hosts: int) -> tuple[str, ...]:
    received = [amount(each.received[axis] / each.ranks) for axis in AXES]
    received += [amount(sum(each.crossed.values()) / each.ranks)] if hosts > 1 else []
    memory, messages = amount(sum(each.memory.values())), f"{sum(each.messages.values()):,}"
    return each.name, *received, messages, memory, f"{each.bubble:.0%}", f"{each.seconds:#.3g}"
