"""The picture of a frontier: quality against measured speedup, a line per contestant."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from frontier_bench.entries import Entry

OURS = ("#c2410c", "#e8590c", "#f59f00")
PEERS = ("#495057", "#748ffc", "#5f7c8a", "#8d6e97", "#6b8e6b", "#868e96", "#9c8468", "#4c6b8a", "#a0a4a8", "#7a8f9c")
MARKERS = {True: "osD", False: "^v<>PXph*d8"}
CARD = "#fbfaf7"
"""Of the background: the picture is read on light and on dark pages."""

TALLEST = 3.0
"""Perplexities are shown up to this many times the package's own worst: lines leave the picture above that."""


def draw(
    path: Path, entries: Sequence[Entry], stage: str, metric: str, dense: Mapping[str, float], title: str
) -> None:
    """
    Save the picture as PNG.

    Args:
        path: where to.
        entries: those that were measured at the stage.
        stage, metric: what is shown; perplexity on a logarithmic axis.
        dense: the teacher's values.
        title: above it.
    """
    figure = Figure(figsize=(8.2, 4.4), dpi=110, facecolor=CARD, layout="constrained")
    axes = figure.add_subplot(facecolor=CARD)
    names = dict.fromkeys(entry.contestant for entry in sorted(entries, key=lambda entry: not entry.ours))
    axes.axhline(dense[metric], color="#212529", linewidth=1, linestyle=(0, (4, 3)), label="dense")
    counts = {True: 0, False: 0}
    for name in names:
        mine = sorted((entry for entry in entries if entry.contestant == name), key=lambda entry: entry.budget)
        mine = [entry for entry in mine if math.isfinite(entry.mean(stage, metric))]
        if not mine:
            continue
        ours, index = mine[0].ours, counts[mine[0].ours]
        counts[ours] += 1
        x = [sum(entry.speedups) / len(entry.speedups) for entry in mine]
        y, spread = ([getattr(entry, what)(stage, metric) for entry in mine] for what in ("mean", "spread"))
        axes.errorbar(
            x,
            y,
            yerr=spread,
            color=OURS[index % len(OURS)] if ours else PEERS[index % len(PEERS)],
            marker=MARKERS[ours][index % len(MARKERS[ours])],
            markersize=6 if ours else 5,
            linewidth=2.2 if ours else 1.1,
            linestyle="-" if ours or index < len(PEERS) else ":",
            elinewidth=1,
            capsize=2,
            alpha=1 if ours else 0.85,
            zorder=3 if ours else 2,
            label=mine[0].title,
        )
    if metric == "perplexity":
        shown = [value for entry in entries if math.isfinite(value := entry.mean(stage, metric))]
        low = min(dense[metric], *shown)
        ours_worst = max((entry.mean(stage, metric) for entry in entries if entry.ours), default=math.inf)
        high = min(max(dense[metric], *shown), TALLEST * ours_worst)
        axes.set_yscale("log")
        axes.set_ylim(low * (low / high) ** 0.05, high * (high / low) ** 0.05)
        decades = [base * 10.0**power for power in range(9) for base in (1, 2, 5)]
        narrow = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
        axes.yaxis.set_major_locator(FixedLocator(narrow if high < 8 * low else decades))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.4g}" if high < 1000 else "{x:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("measured speedup over dense")
    axes.set_ylabel(metric if metric == "perplexity" else f"{metric}, %")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes.grid(color="#d9d6cf", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    pixels = io.BytesIO()
    figure.savefig(pixels)
    with Image.open(pixels) as image:  # a palette takes a third of the bytes
        image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
