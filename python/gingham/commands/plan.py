"""`python -m gingham plan`: the table of every grid that so many ranks can form, cheapest first."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from rich.console import Console

from ..plan.choose import Choice, Machine, plans
from ..plan.tables import amount, show
from ..plan.workload import gpt
from .options import number, whole


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
    usual = Machine()
    parser.add_argument("--memory", type=number(0), default=usual.memory / 1e9, metavar="GB", help="of tensors a rank may hold")
    parser.add_argument("--latency", type=number(0, equal=True), default=usual.latency, metavar="S", help="seconds a message")
    parser.add_argument("--bandwidth", type=number(0), default=usual.bandwidth / 1e9, metavar="GB/S", help="that a rank receives")
    parser.add_argument("--speed", type=number(0), default=usual.speed / 1e12, metavar="TFLOP/S", help="of a rank")


def run(options: Namespace) -> int:
    """The command: the table of every grid; returns its exit code, 1 where no grid is possible."""
    if options.width % options.heads:
        print(f"gingham plan: --heads {options.heads} must divide --width {options.width}", file=sys.stderr)
        return 2
    machine = Machine(options.latency, options.bandwidth * 1e9, options.speed * 1e12, options.memory * 1e9)
    workload = gpt(options.layers, options.width, options.heads, options.batch, options.context, options.vocabulary)
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
    ranks = f"{options.ranks} rank{'' if options.ranks == 1 else 's'}"
    title = f"GPT of {workload.parameters():,} parameters, {options.batch} x {options.context} tokens, {ranks}"
    headings = ("mode", "m x n x k", "received a rank", "messages", "memory a rank", "seconds")
    console = Console()
    pale = [index for index, key in enumerate(lines) if key[-1]]
    show(console, title, headings, rows, right=headings[2:], dim=pale)
    if not ranked[0].reason:
        console.print(f"mode='auto' takes the first line, the cheapest: {ranked[0].name} {_grids(ranked[:1])}", markup=False)
    for reason in dict.fromkeys(reason for _, reason in reasons):
        which = ", ".join(name for name, why in reasons if why == reason)
        console.print(f"not possible ({which}): {reason}", markup=False)
    return 1 if ranked[0].reason else 0
