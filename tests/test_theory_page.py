"""docs/theory.md: what the code cites of it is there, and its worked examples are what theory.py counts."""

import re
from pathlib import Path

import pytest

import theory
import theory_layers

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "theory.md").read_text()
SECTIONS = dict(re.findall(r"^## (\d+)\. (.+)$", PAGE, re.MULTILINE))
FOLDERS = ("python", "csrc", "bench", "tests", "docs", "examples")
KINDS = (".py", ".h", ".cc", ".cu", ".cuh", ".md", ".pyi")
TABLES = [line.strip("| ").split(" | ") for line in PAGE.splitlines()]
EXAMPLES = [row for row in TABLES if row[0].startswith(("mode=", "grid=")) and len(row) == 6]


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in KINDS and "third_party" not in path.parts]
    return [*found, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_every_section_that_is_cited_exists() -> None:
    cited = 0
    for path in sources():
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(errors="ignore")
        for other in re.findall(r"\b(?:THEORY|DESIGN|HOUSE|HYBRID|HOSTS)(?:\.md)?(?:'s)?\b", text):
            raise AssertionError(f"{path.relative_to(ROOT)} cites {other}, which is not in the repository")
        for number in re.findall(r"theory\.md section (\d+)", text):
            assert number in SECTIONS, f"{path.relative_to(ROOT)} cites section {number} of docs/theory.md, which has {sorted(SECTIONS)}"
            cited += 1
    assert cited >= 10


@pytest.mark.parametrize("row", EXAMPLES, ids=lambda row: f"{row[0]} {row[1]}")
def test_a_worked_example_is_what_theory_counts(row: list[str]) -> None:
    init, layout, _, words, mean, messages = row
    grid = theory.Grid.of(**eval(f"dict({init})", {}))
    cost = theory.linear(grid, 48, 24, 96, layout=layout, bias=False)
    assert dict(cost.words) == {axis: int(count) for axis, count in (each.split() for each in words.split(", "))}
    assert sum(cost.words.values()) == int(mean) * grid.size and sum(cost.messages.values()) == int(messages)


@pytest.mark.parametrize("row", [row for row in TABLES if len(row) == 3 and re.fullmatch(r"(ring|window)(, causal)?(, zigzag)?", row[0])])
def test_a_worked_example_of_attention_is_what_theory_counts(row: list[str]) -> None:
    way, forward, backward = row
    counted = theory_layers.ring_words([8, 8, 8], 1, way.startswith("window"), "causal" in way, "zigzag" in way)
    assert counted == list(zip(map(int, forward.split(", ")), map(int, backward.split(", ")), strict=True))


def test_every_mode_has_an_example() -> None:
    said = " ".join(row[0] for row in EXAMPLES)
    assert len(EXAMPLES) == 9 and all(f'mode="{mode}"' in said for mode in ("1d", "2d", "2.5d", "3d")) and "grid=" in said
