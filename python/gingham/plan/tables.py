"""Tables of the command line and of plans: equal blocks on one line, bytes in units, no number ever cut.

blocks.0.attn.q  256 x 256  1.2 KB            blocks.0-11.attn.q  256 x 256  1.2 KB
blocks.1.attn.q  256 x 256  1.2 KB     ->
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

NAMES = 12  # columns that a name gets at least; it goes on in the next line


def amount(size: float) -> str:
    """Bytes as 512 B, 1.5 KB, 33.5 MB, 2.15 GB (powers of 1000)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(size) >= 0.9995 * scale:
            return f"{size / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{size:.0f} B"


def fold(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows that differ in one number of their name, the first column, made one: layers.0-11.fc1. Others as they are, in order."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        head, number, rest = _numbered(row[0])
        groups.setdefault((head, rest, *row[1:], "" if number is None else "numbered"), []).append(-1 if number is None else number)
    found = []
    for (head, rest, *cells, numbered), numbers in groups.items():
        if not numbered:
            found += [(head, *cells)] * len(numbers)
            continue
        for first, last in _runs(numbers):
            found.append((f"{head}{first}{'' if first == last else f'-{last}'}{rest}", *cells))
    return found


def _numbered(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            head, rest = ".".join(parts[:index]), ".".join(parts[index + 1 :])
            return f"{head}." if head else "", int(part), f".{rest}" if rest else ""
    return name, None, ""


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def show(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    total: Sequence[str] | None = None,
    dim: Sequence[int] = (),
) -> None:
    """Prints a table as wide as the console; columns wrap between words. Wider where a number would be cut.

    right: headings of numbers; total: a last line; dim: rows that are shown pale.
    """
    every = [list(headings), *map(list, rows), *([list(total)] if total else [])]
    between = 2 * (len(headings) - 1)
    widths = _widths(every, console.width - between)
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, width in zip(headings, widths, strict=True):
        table.add_column(heading, justify="right" if heading in right else "left", width=width, overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(_at_dots(row[0], widths[0]), *row[1:], style="dim" if index in dim else "")
    if total:
        table.add_section()
        table.add_row(*total)
    needed = sum(widths) + between
    wide = Console(file=console.file, width=needed, quiet=console.quiet) if needed > console.width else console
    wide.print(table)


def _at_dots(name: str, width: int) -> str:
    """A name in lines of at most `width`, broken after dots where that is possible."""
    if " " in name:
        return name
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _widths(rows: list[list[str]], room: int) -> list[int]:
    """What every column gets: its longest cell. Where that is too much, first headings wrap, then names, then all between words."""
    columns = list(zip(*rows, strict=True))
    words = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    words[0] = min(words[0], NAMES)
    widths = [max(len(cell) for cell in column) for column in columns]
    cells = [max([len(cell) for cell in column[1:]] + [word]) for column, word in zip(columns, words, strict=True)]
    for least in (cells, [words[0], *cells[1:]], words):
        while sum(widths) > room and any(width > small for width, small in zip(widths, least, strict=True)):
            index = max(range(len(widths)), key=lambda column: (widths[column] > least[column], widths[column]))
            widths[index] -= 1
    return widths
