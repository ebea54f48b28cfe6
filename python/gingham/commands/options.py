"""Options of the command line: a wrong one is one line and status 2; every default is in the help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class Defaults(argparse.HelpFormatter):
    """Adds "(default: ..)" where an option has one and its help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default is None or action.default in (argparse.SUPPRESS, "") or action.default is False or "default" in text
        return text if silent or not action.option_strings else f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"formatter_class": Defaults} | options))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number of at least `least`."""

    def read(text: str) -> int:
        wanted = f"a whole number of at least {least}" + ("" if most is None else f" and at most {most}")
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {wanted}") from None
        if value < least or most is not None and value > most:
            raise argparse.ArgumentTypeError(f"got {value}, expected {wanted}")
        return value

    return read


def number(above: float, below: float = math.inf, equal: bool = False) -> Callable[[str], float]:
    """A finite number above `above` (or equal) and below `below`."""

    def read(text: str) -> float:
        wanted = f"a number {'of at least' if equal else 'above'} {above:g}" + ("" if math.isinf(below) else f" and below {below:g}")
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {wanted}") from None
        if not math.isfinite(value) or value < above or value == above and not equal or value >= below:
            raise argparse.ArgumentTypeError(f"got {text}, expected {wanted}")
        return value

    return read
