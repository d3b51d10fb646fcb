"""The pictures of a search, of peers, and of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from ..vanilla.shape import BY_NAME, FFN, HEADS, LAYERS
from .drawing import COLOURS, Picture, legend, picture_of, wide_scale
from .known import SlimFacts

MOST_STEPS = 100
"""Moments of a training that are drawn at most."""

AXES = {HEADS: HEADS} | {name: BY_NAME[name].plural for name in (FFN, LAYERS)}


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
        if wide_scale(axes, [top, *(loss for _, loss, _ in [*timed, chosen])]):
            axes.set_ylim(0, top)
        else:
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


def milliseconds(facts: SlimFacts) -> Picture | None:
    """Where the milliseconds of the dense model and of the slim one go."""
    parts = (facts.search or {}).get("parts")
    if not parts:
        return None
    names = list(parts["dense"])
    shades = dict(zip(names, cycle(("first", "second", "third", "muted", "fourth", "fifth")), strict=False))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, form in enumerate(("slim", "dense")):
            left = 0.0
            for name in names:
                label = name if place == 0 else None
                axes.barh(place, parts[form][name], left=left, color=COLOURS[shades[name]], height=0.6, label=label)
                left += parts[form][name]
        axes.set_yticks([0, 1], ["slim", "dense"])
        axes.set_xlabel("latency, ms (by the table)")
        legend(figure, axes)

    said = "; ".join(
        f"{form}: " + ", ".join(f"{name} {parts[form][name]:.3g} ms" for name in names) for form in ("dense", "slim")
    )
    return picture_of("milliseconds", f"Where the milliseconds go. {said}.", draw, 3.0)


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
                    named = f"layer {layer}" if layer in (0, len(layers) - 1) else None
                    panel.plot(steps, values, color=colour, linewidth=1.2, label=named)
                if hard is not None:
                    panel.axvline(hard, color=COLOURS["muted"], linestyle=":", linewidth=1)
                panel.set_ylim(-0.04, 1.04)
                panel.set_title(f"{AXES[axis]}: {'kept' if what == 'keep' else 'gate'}", fontsize=10)
        for panel in panels[-1]:
            panel.set_xlabel("step")
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False, fontsize=9)

    last = entries[-1]
    ends = "; ".join(
        f"{AXES[axis]} kept {min(last[axis]['keep']):.2f} to {max(last[axis]['keep']):.2f}, gates "
        f"{min(last[axis]['gate']):.2f} to {max(last[axis]['gate']):.2f}"
        for axis in axes_there
    )
    text = f"One line per layer over {steps[-1]} steps: what is kept, and the mean gate. In the end: {ends}."
    return picture_of("gates", text, draw, 1.0 + 1.6 * len(axes_there))


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


def _mixed(part: float) -> tuple[float, ...]:
    """Between the first and the second colour."""
    from matplotlib.colors import to_rgb

    ends = to_rgb(COLOURS["first"]), to_rgb(COLOURS["second"])
    return tuple(a + part * (b - a) for a, b in zip(*ends, strict=True))


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
