"""The plots of the page."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

Points = list[tuple[float, float]]
MARKERS = "osD^vP"


def plot_budgets(path: Path, cases: dict[str, Points], published: tuple[str, tuple[float, float]]) -> None:
    """
    Speedup asked against speedup measured.

    Args:
        path: of the PNG.
        cases: (asked, measured) by case.
        published: a label and a point of another project.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.4), dpi=100, layout="constrained")
    highest = max([x for points in cases.values() for point in points for x in point] + list(published[1]))
    axes.plot([1, highest], [1, highest], color="0.6", linewidth=1, linestyle="--", label="as asked")
    for marker, (case, points) in zip(MARKERS * 2, cases.items(), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, linewidth=1, markersize=5, label=case)
    axes.plot(*published[1], marker="X", color="black", linestyle="none", markersize=8, label=published[0])
    axes.set_xlabel("speedup asked")
    axes.set_ylabel("speedup measured")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(path, figure)


def plot_scaling(path: Path, axes_of: dict[str, dict[str, Points]]) -> None:
    """
    Seconds over sizes, both logarithmic, a panel per size that is varied.

    Args:
        path: of the PNG.
        axes_of: (size, seconds) by what was timed, by the size's name.
    """
    figure, panels = plt.subplots(1, len(axes_of), figsize=(8, 3.8), dpi=100, layout="constrained", sharey=True)
    for panel, (size, lines) in zip(panels, axes_of.items(), strict=True):
        for marker, (what, points) in zip(MARKERS, lines.items(), strict=False):
            panel.plot(*zip(*sorted(points), strict=True), marker=marker, linewidth=1, markersize=5, label=what)
        logarithmic(panel, sorted({x for points in lines.values() for x, _ in points}))
        panel.set_xlabel(size)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[-1].legend(fontsize=8)
    save(path, figure)


def logarithmic(axes: Axes, ticks: list[float]) -> None:
    """Both axes logarithmic, with plain numbers at the sizes themselves."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def save(path: Path, figure: plt.Figure) -> None:
    """Write the PNG; nothing in it but the picture, so that the same rows give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
