"""The pictures, in light colours: as SVG for the page, and as PNG files."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import HawAdaError
from ..planning.plan import Plan
from ..vanilla.family import FFN, HEADS
from ..vanilla.shape import LAYERS
from .known import SlimFacts

WIDTH = 4.8
"""Inches: with text of 10 points this can be read on a phone, where it is as wide as the screen."""

BINS = 12
"""Neighbouring FFN channels are shown together, in so many parts at most."""

MOST_STEPS = 100
"""Moments of a training that are drawn at most."""

COLOURS = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "line": "#d0d7de",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#009e73",
}
"""After Okabe and Ito, "Color Universal Design" (2008): told apart with any kind of colour vision."""

AXES = {HEADS: "heads", FFN: "FFN channels", LAYERS: "layers"}


@dataclass(frozen=True)
class Picture:
    """
    A picture of the page.

    Args:
        name (`str`): of its file, without the ending.
        text (`str`): what it shows, for those who do not see it.
        svg (`bytes`): for the page.
        png (`bytes`): for a file.
    """

    name: str
    text: str
    svg: bytes
    png: bytes

    @property
    def source(self) -> str:
        """The SVG as an address: the page needs no other file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def frontier(facts: SlimFacts) -> Picture | None:
    """The search's shapes: loss against latency, the chosen one marked."""
    search = facts.search
    if search is None:
        return None
    points = [(_ms(point), _loss(point), point) for point in search["points"]]
    chosen = next(point for point in points if point[2]["rejected"] is None)
    timed = [point for point in points if point[2]["measured_ms"] is not None and point is not chosen]
    guessed = sorted(point[:2] for point in points if point[2]["measured_ms"] is None and point[2]["frontier"])
    dense_ms, limit = search["dense_ms"], search["limit_ms"]
    top = 1.6 * max([loss for _, loss, _ in [*timed, chosen]]) or 1.0
    hidden = sum(loss > top for _, loss, _ in points)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        shown = [point for point in guessed if point[1] <= top]
        axes.plot(*_columns(shown), "o-", color=COLOURS["muted"], markersize=3, linewidth=1, label="estimated only")
        axes.plot(*_columns(timed), "o", color=COLOURS["first"], markersize=6, label="timed and evaluated")
        axes.plot(dense_ms, 0, "s", color=COLOURS["ink"], markersize=8, label="dense")
        axes.plot(*chosen[:2], "D", color=COLOURS["second"], markersize=9, label="chosen")
        if limit is not None:
            axes.axvline(limit, color=COLOURS["third"], linestyle="--", linewidth=1.5, label="budget")
        axes.set_ylim(-0.05 * top, top)
        axes.set_xlabel("latency, ms")
        axes.set_ylabel("loss before recovery")
        legend(figure, axes)

    text = (
        f"Loss against latency of {len(points)} shapes. Dense: {dense_ms:.1f} ms, loss 0. Chosen: {chosen[0]:.1f} ms, "
        f"loss {chosen[1]:.3g}. " + (f"Budget: {limit:.1f} ms. " if limit is not None else "")
    )
    text += f"{hidden} shapes of more loss lie above the picture." if hidden else ""
    return picture_of("frontier", text.strip(), draw, 3.9)


def peers(facts: SlimFacts) -> Picture | None:
    """Dense, slim and peers: quality against latency."""
    if not facts.measured_peers:
        return None
    latency, quality = facts.report["latency"], facts.qualities[0]
    dense_ms, slim_ms = latency["dense_ms"], latency["slim_ms"]
    others = [(peer.ms(dense_ms), peer.quality, peer.name) for peer in facts.measured_peers]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*_columns(others), "^", color=COLOURS["first"], markersize=7, label="peers")
        axes.plot(dense_ms, quality["dense"], "s", color=COLOURS["ink"], markersize=8, label="dense")
        axes.plot(slim_ms, quality["slim"], "D", color=COLOURS["second"], markersize=9, label="slim")
        for ms, value, name in others:
            axes.annotate(name, (ms, value), (6, 4), textcoords="offset points", fontsize=9, color=COLOURS["ink"])
        axes.margins(0.18)
        axes.set_xlabel("latency, ms")
        axes.set_ylabel(quality["name"])
        legend(figure, axes)

    names = "; ".join(f"{name}: {ms:.1f} ms, {value:.4g}" for ms, value, name in others)
    text = (
        f"{quality['name']} against latency. Dense: {dense_ms:.1f} ms, {quality['dense']:.4g}. "
        f"Slim: {slim_ms:.1f} ms, {quality['slim']:.4g}. {names}."
    )
    return picture_of("peers", text, draw, 3.9)


def kept(facts: SlimFacts) -> Picture | None:
    """A map of the dense layers: which heads and channels stay."""
    plan = facts.plan
    if plan is None:
        return None
    sizes = plan.dense.sizes()
    count = sizes["num_hidden_layers"]
    rows = {
        "heads, by KV group": [_group_parts(plan, layer) for layer in range(count)],
        "FFN channels, in order": [_bin_parts(plan, layer) for layer in range(count)],
    }

    def draw(figure: Any) -> None:
        for number, (axes, (title, parts)) in enumerate(
            zip(figure.subplots(1, 2, sharey=True), rows.items(), strict=True)
        ):
            _map(axes, parts)
            axes.set_title(title, fontsize=10, color=COLOURS["ink"])
            if number == 0:
                axes.set_ylabel("dense layer")

    gone = [layer for layer in range(count) if layer not in plan.layers]
    text = (
        f"Map of {count} dense layers, the fuller a cell the more of it stays. Dropped layers: "
        f"{', '.join(map(str, gone)) or 'none'}. Every other layer keeps {plan.shape.num_attention_heads} of "
        f"{sizes['num_attention_heads']} query heads and {plan.shape.intermediate_size} of "
        f"{sizes['intermediate_size']} FFN channels."
    )
    return picture_of("kept", text, draw, min(9.0, 1.3 + 0.24 * count))


def gates(facts: SlimFacts) -> Picture | None:
    """The gates of every layer over training."""
    entries = _thinned(facts.entries)
    axes_there = [axis for axis in AXES if entries and all(axis in entry for entry in entries)]
    if not axes_there:
        return None
    steps, hard = [entry["step"] for entry in entries], _first_hard(facts.entries)

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(axes_there), 2, squeeze=False, sharex=True, sharey=True)
        for row, axis in zip(panels, axes_there, strict=True):
            for panel, what in zip(row, ("keep", "gate"), strict=True):
                layers = list(zip(*(entry[axis][what] for entry in entries), strict=True))
                for layer, values in enumerate(layers):
                    colour = _mixed(layer / max(1, len(layers) - 1))
                    panel.plot(steps, values, color=colour, linewidth=1.2)
                if hard is not None:
                    panel.axvline(hard, color=COLOURS["muted"], linestyle=":", linewidth=1)
                panel.set_ylim(-0.04, 1.04)
                panel.set_title(f"{AXES[axis]}: {'kept' if what == 'keep' else 'gate'}", fontsize=10)
        for panel in panels[-1]:
            panel.set_xlabel("step")

    last = entries[-1]
    ends = "; ".join(
        f"{AXES[axis]} kept {min(last[axis]['keep']):.2f} to {max(last[axis]['keep']):.2f}, gates "
        f"{min(last[axis]['gate']):.2f} to {max(last[axis]['gate']):.2f}"
        for axis in axes_there
    )
    text = f"One line per layer over {steps[-1]} steps: what is kept, and the mean gate. In the end: {ends}."
    return picture_of("gates", text, draw, 0.7 + 1.6 * len(axes_there))


def training(facts: SlimFacts) -> Picture | None:
    """The distillation loss over training, and where a latency was bound the milliseconds."""
    series = {
        name: [(entry["step"], entry["figures"][name]) for entry in facts.entries if name in entry["figures"]]
        for name in ("kl", "mse", "estimate_ms", "measured_ms")
    }
    loss = "kl" if series["kl"] else "mse"  # of outputs that are no distribution
    if not series[loss] and not series["estimate_ms"]:
        return None
    hard = _first_hard(facts.entries)
    limit = next((entry["figures"]["limit_ms"] for entry in facts.entries if "limit_ms" in entry["figures"]), None)
    panels = [name for name in (loss, "estimate_ms") if series[name]]

    def draw(figure: Any) -> None:
        found = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for panel, name in zip(found, panels, strict=True):
            if hard is not None:
                panel.axvline(hard, color=COLOURS["muted"], linestyle=":", linewidth=1)
            if name == loss:
                panel.plot(*_columns(series[loss]), color=COLOURS["first"], linewidth=1.5)
                panel.set_ylabel("KL, nats" if loss == "kl" else "mean squared error")
                continue
            panel.plot(*_columns(series["estimate_ms"]), color=COLOURS["first"], label="estimate")
            if series["measured_ms"]:
                panel.plot(
                    *_columns(series["measured_ms"]),
                    "o",
                    color=COLOURS["second"],
                    markersize=4,
                    label="measured",
                )
            if limit is not None:
                panel.axhline(limit, color=COLOURS["third"], linestyle="--", label="budget")
            panel.set_ylabel("ms")
            legend(figure, panel)
        found[-1].set_xlabel("step")

    parts = [
        f"{name} from {values[0][1]:.4g} to {values[-1][1]:.4g}"
        for name, values in (("divergence", series[loss]), ("estimated latency in ms", series["estimate_ms"]))
        if values
    ]
    return picture_of("training", f"Over training: {'; '.join(parts)}.", draw, 0.9 + 2.0 * len(panels))


def picture_of(name: str, text: str, draw: Callable[[Any], None], height: float) -> Picture:
    """
    A picture, drawn once for the page and for a file.

    Args:
        name: of its file, without the ending.
        text: what it shows, for those who do not see it.
        draw: draws it into a matplotlib figure.
        height: inches.

    Raises:
        HawAdaError: if matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise HawAdaError(
            "pictures need matplotlib: pip install 'hawada_peft[report]', or leave them out (pictures=False)"
        ) from None
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # names may hold dollars
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), COLOURS["ink"]),
        **dict.fromkeys(("xtick.color", "ytick.color"), COLOURS["muted"]),
        "axes.edgecolor": COLOURS["line"],
        "figure.facecolor": COLOURS["paper"],
    }
    files: dict[str, bytes] = {}
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        for ending in ("svg", "png"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=160, metadata={"Date": None} if ending == "svg" else None)
            files[ending] = buffer.getvalue()
    return Picture(name, text, files["svg"], files["png"])


def _mixed(part: float) -> tuple[float, ...]:
    """Between the first and the second colour."""
    from matplotlib.colors import to_rgb

    ends = to_rgb(COLOURS["first"]), to_rgb(COLOURS["second"])
    return tuple(a + part * (b - a) for a, b in zip(*ends, strict=True))


def _map(axes: Any, parts: Sequence[Sequence[float] | None]) -> None:
    """Rows of cells, filled as much as stays; None is a layer that is gone."""
    from matplotlib.patches import Rectangle

    columns = max(len(row) for row in parts if row is not None)
    for layer, row in enumerate(parts):
        if row is None:
            axes.add_patch(
                Rectangle((0, layer - 0.4), columns, 0.8, fill=False, edgecolor=COLOURS["line"], linewidth=1)
            )
            axes.text(columns / 2, layer, "dropped", ha="center", va="center", fontsize=8, color=COLOURS["muted"])
            continue
        for column, part in enumerate(row):
            axes.add_patch(
                Rectangle((column + 0.05, layer - 0.4), 0.9, 0.8, facecolor=COLOURS["line"], alpha=0.45, linewidth=0)
            )
            axes.add_patch(
                Rectangle((column + 0.05, layer - 0.4), 0.9, 0.8, facecolor=COLOURS["first"], alpha=part, linewidth=0)
            )
    axes.set_xlim(0, columns)
    axes.set_ylim(len(parts) - 0.5, -0.5)
    every = max(1, -(-len(parts) // 16))
    axes.set_yticks(range(0, len(parts), every))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _group_parts(plan: Plan, layer: int) -> list[float] | None:
    """What of each KV group's heads stays."""
    heads = plan.kept(HEADS, layer)
    if heads is None:
        return None
    size = plan.dense.heads_per_group
    return [sum(h // size == group for h in heads) / size for group in range(plan.dense.num_key_value_heads or 1)]


def _bin_parts(plan: Plan, layer: int) -> list[float] | None:
    """What of each part of the FFN's channels stays."""
    channels = plan.kept(FFN, layer)
    if channels is None:
        return None
    total = plan.dense.sizes()["intermediate_size"]
    bins = min(BINS, total)
    ends = [total * place // bins for place in range(bins + 1)]
    return [sum(a <= c < b for c in channels) / (b - a) for a, b in pairwise(ends)]


def _ms(point: Mapping[str, Any]) -> float:
    return float(point["estimate_ms"] if point["measured_ms"] is None else point["measured_ms"])


def _loss(point: Mapping[str, Any]) -> float:
    return float(point["predicted_loss"] if point["measured_loss"] is None else point["measured_loss"])


def _columns(points: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Any]]:
    return [point[0] for point in points], [point[1] for point in points]


def _thinned(entries: Sequence[Any]) -> list[Any]:
    step = -(-len(entries) // MOST_STEPS) or 1
    return [*entries[:-1:step], *entries[-1:]]


def _first_hard(entries: Sequence[Mapping[str, Any]]) -> int | None:
    return next((entry["step"] for entry in entries if entry["phase"] == "hard"), None)


def legend(figure: Any, axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, labelcolor=COLOURS["ink"],
        borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip


def write_pngs(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write the PNG files into a folder that exists. Returns their paths."""
    paths = []
    for picture in pictures:
        paths.append(folder / f"{picture.name}.png")
        paths[-1].write_bytes(picture.png)
    return paths
