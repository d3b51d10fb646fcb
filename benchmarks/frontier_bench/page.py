"""Third stage of the frontier bench: tables, a comparison and two pictures, all from the rows of the first two."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from document import replace_section
from peers.peer import Peer
from rows import Row, read_rows

from frontier_bench.entries import METRICS, STAGES, Entry, best_of, entries_of

DIVIDING = ("--shard", "--out")
"""Options of a command that only say which part of the work it does."""

JOINED = ("--contestants", "--seeds")
"""Options whose values are put together where commands differ in nothing else."""


def table(entries: Sequence[Entry], dense: Row, kind: str) -> str:
    """The contestants of one budget; the best of a column is bold."""
    metrics = METRICS[kind]
    stages = [stage for stage in STAGES if any(stage in entry.stages for entry in entries)]
    head = ["contestant", "measured speedup", "parameters", "seeds"]
    head += [f"{' / '.join(metrics)} {STAGES[stage]}" for stage in stages]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = [" / ".join(number(dense[stage][metric]) for metric in metrics) for stage in stages]
    lines.append("| " + " | ".join(["dense", "1.00x", f"{dense['parameters']:,}", "", *cells]) + " |")
    best = {stage: best_of(entries, stage, kind) for stage in stages}
    for entry in entries:
        cells = []
        for stage in stages:
            parts = [_cell(entry, stage, metric) for metric in metrics if entry.values(stage, metric)]
            text = " / ".join(parts)
            cells.append(f"**{text}**" if entry is best[stage] else text)
        speed = _range([f"{speed:.2f}" for speed in sorted(entry.speedups)]) + "x"
        row = [
            entry.title,
            speed if entry.met else f"{speed} (budget not met)",
            _range([f"{count:,}" for count in sorted(entry.parameters)]),
            str(len(entry.speedups)),
        ]
        lines.append("| " + " | ".join(row + cells) + " |")
    return "\n".join(lines)


def comparison(entries: Sequence[Entry], kind: str) -> str:
    """For every budget and stage the best of ours against the best peer."""
    metric = METRICS[kind][0]
    lines = []
    for budget in sorted({entry.budget for entry in entries}):
        here = [entry for entry in entries if entry.budget == budget]
        for stage, words in STAGES.items():
            ours = best_of([entry for entry in here if entry.ours], stage, kind)
            peer = best_of([entry for entry in here if not entry.ours], stage, kind)
            if ours is None or peer is None:
                continue
            values = ours.mean(stage, metric), peer.mean(stage, metric)
            gain = (values[1] - values[0]) if kind == "text" else (values[0] - values[1])
            spread = math.hypot(ours.spread(stage, metric), peer.spread(stage, metric))
            seeds = min(len(entry.values(stage, metric)) for entry in (ours, peer))
            verdict = f"{'ahead' if gain > 0 else 'behind'} by {number(abs(gain))}"
            if seeds == 1:
                verdict += ", one seed"
            else:
                verdict += f", {'within' if abs(gain) <= spread else 'outside'} the spread of {number(spread)}"
            lines.append(
                f"- {budget:g}x, {words}: {ours.title} {number(values[0])}, {peer.title} {number(values[1])}: "
                f"{verdict}."
            )
    return "\n".join(lines)


def write(options: argparse.Namespace, peers: Mapping[str, Peer]) -> None:
    """Put the section and the pictures in their places."""
    from frontier_bench.picture import draw  # matplotlib, an extra

    shapes, quality = read_rows(options.shapes), read_rows(options.quality)
    dense = next(row for row in quality if row["budget"] is None)
    entries, kind = entries_of(shapes, quality, peers), dense["kind"]
    page, pictures = Path(options.page), Path(options.pictures)
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [f"### {options.title}", _intro(shapes, quality, dense, kind)]
    for stage, words in STAGES.items():
        measured = [entry for entry in entries if entry.values(stage, METRICS[kind][0])]
        if measured:
            path = pictures / f"{options.name}-{stage}.png"
            draw(path, measured, stage, METRICS[kind][0], dense[stage], f"{options.title}: {words}")
            link = Path(os.path.relpath(path, page.parent)).as_posix()
            parts.append(f"![{METRICS[kind][0]} against measured speedup, {words}]({link})")
    for budget in sorted({entry.budget for entry in entries}):
        here = [entry for entry in entries if entry.budget == budget]
        parts += [f"**Budget {budget:g}x**", table(here, dense, kind)]
        parts += filter(None, [out_of_reach(shapes, {entry.contestant for entry in here}, budget, peers)])
    found = comparison(entries, kind)
    if found:
        parts += [
            "The best of hawada against the best peer. The spread is the root of the sum of both variances over "
            "seeds; models that miss the budget do not count:",
            found,
        ]
    replace_section(page, options.name, "\n\n".join(parts))
    replace_section(
        page, "peers", "\n\n".join(["### The peers, and what is not as in their sources", _sources(peers)])
    )


def out_of_reach(shapes: Sequence[Row], shown: Collection[str], budget: float, peers: Mapping[str, Peer]) -> str:
    """The peers that no cut takes to a budget and that were not trained for it, with the fastest that was timed."""
    fastest: dict[str, float] = {}
    for row in shapes:
        name = row["contestant"]
        if row["budget"] == budget and not row["met"] and name in peers and name not in shown:
            fastest[name] = max(row["speedup"], fastest.get(name, 0.0))
    listed = ", ".join(f"{peers[name].name} ({speed:.2f}x)" for name, speed in fastest.items())
    return f"Out of reach, with the fastest that was timed: {listed}." if listed else ""


def _sources(peers: Mapping[str, Peer]) -> str:
    return "\n".join(f"- {peer.name}: {peer.source}. {peer.adapted}".rstrip() for peer in peers.values())


def _intro(shapes: Sequence[Row], quality: Sequence[Row], dense: Row, kind: str) -> str:
    size = (
        f"{dense['batch_size']} windows of {dense['length']} tokens"
        if kind == "text"
        else f"{dense['batch_size']} images"
    )
    tested = f"{dense['eval_examples']} held-out " + (
        f"windows of {dense['eval_length']} tokens" if kind == "text" else "images"
    )
    lines = [
        f"Latency: {_distinct(shapes, 'regime')}, timed in turns with the dense model on "
        f"{_distinct(shapes, 'device')} ({_distinct(shapes, 'date')}; {_distinct(shapes, 'versions')}). "
        f"Quality: on {tested}; {dense['calibration']} examples to calibrate, {dense['total_steps']} steps of {size} "
        f"in all, of which a contestant's own training is taken off; on {_distinct(quality, 'device')} "
        f"({_distinct(quality, 'date')}; {_distinct(quality, 'versions')}). Mean and standard deviation over seeds.",
        "",
        "```bash",
        *plain_commands({row["command"] for row in (*shapes, *quality)}),
        "```",
    ]
    changed = sum(not row.get("as_timed", True) for row in quality)
    if changed:
        lines += ["", f"{changed} of the models trained for this page differ in size from those that were timed."]
    return "\n".join(lines)


def plain_commands(commands: Iterable[str]) -> list[str]:
    """
    Commands without what only divides the work: the shard and the output's name, and the folders that files lay in.
    Those that then differ by contestants and seeds alone are one.
    """
    parts: dict[str, dict[str, list[str]]] = {}
    for command in commands:
        kept: list[str] = []
        lists: dict[str, list[str]] = {}
        option = ""
        for word in shlex.split(command):
            option = word if word.startswith("--") else option
            if option in DIVIDING:
                continue
            if option in JOINED:
                lists.setdefault(option, []).extend([word] if word != option else [])
                continue
            path = Path(word)
            inside = path.parts[-2:] if path.suffix == ".py" else path.parts[-1:]
            kept.append("/".join(inside) if "/" in word else word)
        joined = parts.setdefault(shlex.join(kept), {})
        for name, values in lists.items():
            joined[name] = sorted({*joined.get(name, ()), *values})
    return sorted(
        shlex.join([*shlex.split(command), *(word for name in joined for word in (name, *joined[name]))])
        for command, joined in parts.items()
    )


def number(value: float) -> str:
    """Two decimals; none from a thousand on."""
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _cell(entry: Entry, stage: str, metric: str) -> str:
    spread = entry.spread(stage, metric)
    return number(entry.mean(stage, metric)) + (f" ±{number(spread)}" if spread else "")


def _range(texts: Sequence[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _distinct(rows: Sequence[Row], name: str) -> str:
    return "; ".join(dict.fromkeys(row[name] for row in rows))
