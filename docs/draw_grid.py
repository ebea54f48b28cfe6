"""Draws grid.png: who holds what of Y = X W on 2 x 2 x 2 ranks in 2.5d, and what travels where."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

BLUES, ORANGES = ["#dbe9f6", "#b8d3ea"], ["#c0561d", "#d98b4f", "#8a3b10", "#b97a4a"]
Q, DEPTH, SIDE = 2, 2, 2.5


def arrow(axes, start, end, color) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="<|-|>", mutation_scale=15, linewidth=2, color=color))


def cell(axes, depth: int, row: int, col: int, left: float) -> None:
    x, y = left + col * (SIDE + 0.5), -row * (SIDE + 0.5)
    axes.add_patch(Rectangle((x, y), SIDE, SIDE, facecolor=BLUES[(row + col) % 2], edgecolor="0.3", linewidth=1.2))
    axes.text(x + SIDE / 2, y + SIDE - 0.35, f"rank {depth * Q * Q + row * Q + col}", ha="center", fontsize=11, weight="bold")
    axes.text(x + SIDE / 2, y + SIDE - 0.95, f"X rows {depth * Q + row}, cols {col}", ha="center", fontsize=9, color="#1b5faa")
    axes.text(x + SIDE / 2, y + SIDE - 1.45, f"W rows {row}, cols {col}", ha="center", fontsize=9, color=ORANGES[0])
    axes.text(x + SIDE / 2, y + SIDE - 1.95, f"Y rows {depth * Q + row}, cols {col}", ha="center", fontsize=9, color="#2c7a3f")


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(11, 5.2))
    for depth in range(DEPTH):
        left = depth * 8.0
        for row in range(Q):
            for col in range(Q):
                cell(axes, depth, row, col, left)
            y = -row * (SIDE + 0.5) + SIDE / 2 - 0.85
            arrow(axes, (left + SIDE - 0.15, y), (left + SIDE + 0.65, y), "#1b5faa")
        for col in range(Q):
            x = left + col * (SIDE + 0.5) + SIDE / 2
            arrow(axes, (x, -0.65), (x, 0.15), ORANGES[0])
        axes.text(left + SIDE + 0.25, SIDE + 0.35, f"depth {depth}", ha="center", fontsize=12)
    arrow(axes, (2 * SIDE + 0.6, -0.25), (7.9, -0.25), "0.35")
    axes.text((2 * SIDE + 8.5) / 2, 0.0, "backward:\ndW summed", ha="center", fontsize=9, color="0.35")
    axes.text(0, -4.0, "forward: X travels along a row of the grid", color="#1b5faa", fontsize=10)
    axes.text(8.0, -4.0, "W along a column; Y stays", color=ORANGES[0], fontsize=10)
    axes.set(xlim=(-0.3, 13.8), ylim=(-4.4, 3.4), aspect="equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("grid.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
