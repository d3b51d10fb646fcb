"""
The page of the bench on a real model: its rows as tables, what they say (where we are behind first), and a picture.

    python benchmarks/real_page.py keep OUT/rows.jsonl --into benchmarks/results/smollm2-135m.jsonl
    python benchmarks/real_page.py write benchmarks/results/smollm2-135m.jsonl --readme README.md

`keep` adds rows that are no errors to a file that is small enough to be committed; of the same cell on the same kind
of device the last one counts. `write` makes everything else from that file: the section `real-model` of the page, its
picture, and the same picture with a short table in the README.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from document import replace_section
from frontier_bench.entries import METRICS, STAGES, Entry, best_of
from frontier_bench.page import number
from frontier_bench.picture import draw
from peers.peer import Peer
from real_cells import MUON, OURS
from rows import Row, read_rows

LEFT_OUT = ("traceback", "race", "latencies", "timed", "timings", "lengths")
"""Of a row, in what is kept."""

DEFAULTS = ("searched", "race")
"""What the package does unless told otherwise; with a search, where one was measured."""

TITLES = {
    "searched": "hawada (search and race)",
    "race": "hawada (race, the default)",
    "race_tenth": "hawada, race of a tenth of the steps",
    "race_prepared": "hawada, preparations race too",
    "race_short": "hawada, short race",
    "race_plain": "hawada, race of plans as cut",
    "race_anew": "hawada, race, winner trained anew",
    "race_long": "hawada, long race",
    "no_race": "hawada, no race",
    "no_race_magnitude": "hawada, no race, magnitude",
    "no_race_cosine": "hawada, no race, cosine",
    "no_race_least_squares": "hawada, no race, least squares",
    "no_race_close": "hawada, no race, least squares, close",
}


def kept(rows: Iterable[Row], had: Iterable[Row] = ()) -> list[Row]:
    """Rows of cells without what is bulky or names a machine's folders; of a cell the last one."""
    found: dict[tuple[object, ...], Row] = {}
    for row in (*had, *rows):
        if "contestant" in row and "error" not in row:
            small = {name: value for name, value in row.items() if name not in LEFT_OUT}
            if "command" in small:
                small["command"] = ""  # it names folders
            found[tuple(row[name] for name in ("contestant", "budget", "seed", "steps", "device"))] = small
    return list(found.values())


def title_of(name: str, peers: Mapping[str, Peer]) -> str:
    """A contestant's name for people, with the optimizer of its recovery."""
    if name in OURS:
        return f"{TITLES[name]}, Muon"
    return f"{peers[name.removesuffix(MUON)].name}, {'Muon' if name.endswith(MUON) else 'AdamW'}"


def entries_of(rows: Sequence[Row], steps: int, peers: Mapping[str, Peer]) -> list[Entry]:
    """One entry per contestant and budget for a number of steps, ours first."""
    order = [*OURS, *(f"{name}{end}" for name in peers for end in ("", MUON))]
    groups: dict[tuple[float, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["steps"] == steps:
            groups[row["budget"], row["contestant"]].append(row)
    entries = []
    for (budget, name), group in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        entry = Entry(name, title_of(name, peers), name in OURS, budget)
        for row in group:
            entry.speedups.append(row["speedup"])
            entry.parameters.append(row["parameters"])
            entry.met &= row["met"]
            for stage in STAGES:
                if stage in row:
                    for metric, value in row[stage].items():
                        entry.stages.setdefault(stage, {}).setdefault(metric, []).append(value)
        entries.append(entry)
    return entries


def kind_of(entry: Entry) -> str:
    """Of its teacher, by what was measured."""
    return next(kind for kind, metrics in METRICS.items() if metrics[0] in entry.stages["before"])


def metric_of(entry: Entry) -> str:
    """What decides."""
    return METRICS[kind_of(entry)][0]


def best_peer(entries: Sequence[Entry], stage: str) -> Entry | None:
    """The best of those that meet the budget."""
    peers = [entry for entry in entries if not entry.ours]
    return best_of(peers, stage, kind_of(peers[0])) if peers else None


def headline(entries: Sequence[Entry]) -> Entry | None:
    """Ours of a budget: the default, or of what was measured over most seeds the first."""
    ours = [entry for entry in entries if entry.ours and entry.met]
    return next(
        (entry for name in DEFAULTS for entry in ours if entry.contestant == name),
        max(ours, key=lambda entry: len(entry.values("after", metric_of(entry))), default=None),
    )


def claims(entries: Sequence[Entry], steps: int) -> list[str]:
    """Ours against the best peer at each budget and stage, where we are behind first."""
    lines = []
    for budget in sorted({entry.budget for entry in entries}):
        here = [entry for entry in entries if entry.budget == budget]
        for stage, words in STAGES.items():
            ours, peer = headline(here), best_peer(here, stage)
            if ours is None or peer is None or not ours.values(stage, metric := metric_of(ours)):
                continue
            means = ours.mean(stage, metric), peer.mean(stage, metric)
            gain = means[1] - means[0] if kind_of(ours) == "text" else means[0] - means[1]
            spread = math.hypot(ours.spread(stage, metric), peer.spread(stage, metric))
            seeds = min(len(entry.values(stage, metric)) for entry in (ours, peer))
            sure = f"{'within' if abs(gain) <= spread else 'outside'} the spread of {number(spread)}"
            lines.append(
                (
                    gain,
                    f"- {'Ahead' if gain > 0 else '**Behind**'} by {number(abs(gain))} at {budget:g}x, {words} "
                    f"({steps} steps), {sure if seeds > 1 else 'one seed'}: {ours.title} "
                    f"{number(means[0])}, {peer.title} {number(means[1])}.",
                )
            )
    return [line for gain, line in sorted(lines, key=lambda pair: pair[0] > 0)]


def table(entries: Sequence[Entry]) -> str:
    """A line per contestant, the budgets beside each other, the best of a column in bold."""
    budgets = sorted({entry.budget for entry in entries})
    head = ["contestant, optimizer of the recovery", "seeds"]
    head += [f"{budget:g}x {stage}" for budget in budgets for stage in STAGES]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    found = {(entry.contestant, entry.budget): entry for entry in entries}
    best = {
        (budget, stage): best_of([each for each in entries if each.budget == budget], stage, kind_of(entries[0]))
        for budget in budgets
        for stage in STAGES
    }
    for name in dict.fromkeys(entry.contestant for entry in entries):
        mine = [entry for entry in entries if entry.contestant == name]
        counts = sorted({len(entry.speedups) for entry in mine})
        cells = [mine[0].title, "/".join(map(str, counts))]
        for budget in budgets:
            for stage in STAGES:
                entry = found.get((name, budget))
                text = "" if entry is None else _cell(entry, stage)
                cells.append(f"**{text}**" if entry is not None and entry is best[budget, stage] else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(entry: Entry, stage: str) -> str:
    if not entry.met:
        return f"out of reach ({max(entry.speedups):.2f}x)"
    parts = []
    for metric in METRICS[kind_of(entry)]:
        if entry.values(stage, metric):
            spread = entry.spread(stage, metric)
            parts.append(number(entry.mean(stage, metric)) + (f" ±{number(spread)}" if spread else ""))
    return " / ".join(parts)


def leaders(rows: Iterable[Row]) -> tuple[int, int]:
    """How often the leader after a race's first rung won it, and of how many races: all that had a second rung."""
    raced = [row for row in rows if row.get("race_steps")]
    return sum(row["led_throughout"] for row in raced), len(raced)


def frontier(entries: Sequence[Entry], stage: str) -> list[Entry]:
    """Ours and the best peer at each budget, as two lines of a picture."""
    chosen = []
    for budget in sorted({entry.budget for entry in entries}):
        here = [each for each in entries if each.budget == budget and each.values(stage, metric_of(each))]
        for entry, title in (
            (headline(here), "hawada"),
            (best_peer(here, stage), "best peer"),
        ):
            if entry is not None:
                parts = (title, title, entry.ours, budget, entry.speedups, entry.parameters, entry.met, entry.stages)
                chosen.append(Entry(*parts))
    return chosen


def write(options: argparse.Namespace, peers: Mapping[str, Peer]) -> None:
    """Put the sections and the picture in their places."""
    rows = read_rows(options.rows)
    dense = next(row for row in rows if row["contestant"] == "dense")
    rows = [row for row in rows if row["contestant"] != "dense"]
    lengths = sorted({row["steps"] for row in rows})
    by_length = {steps: entries_of(rows, steps, peers) for steps in lengths}
    first, words = by_length[lengths[0]], f"{lengths[0]} steps of recovery"
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    metric = metric_of(first[0])
    draw(options.picture, frontier(first, "after"), "after", metric, dense["after"], f"{options.title}, {words}")
    said = [line for steps, entries in by_length.items() for line in claims(entries, steps)]
    said.sort(key=lambda line: not line.startswith("- **Behind"))
    won, raced = leaders(rows)
    dates, devices, versions = (
        "; ".join(sorted({row[name] for row in rows})) for name in ("date", "device", "versions")
    )
    parts = [
        f"{metric.capitalize()}, dense {number(dense['after'][metric])}; {dense['regime']}; {devices} ({dates}; "
        f"{versions}). Mean and standard deviation over seeds. *Before* is as cut and prepared; the best of a column "
        "is bold.",
        f"![{metric} against measured speedup, after recovery]({_link(options.picture, options.page)})",
        "\n".join(said),
        f"The leader after the first rung of a race won {won} of {raced} races.",
        *(f"**{steps} steps in all**\n\n{table(entries)}" for steps, entries in by_length.items()),
    ]
    replace_section(options.page, options.name, "\n\n".join(parts))
    if options.readme:
        lines = ["| measured speedup | hawada before recovery | after | best peer before | after |", "|---" * 5 + "|"]
        for budget in sorted({entry.budget for entry in first}):
            here = [entry for entry in first if entry.budget == budget]
            ours = headline(here)
            cells = [_cell(ours, stage) if ours else "" for stage in STAGES]
            for stage in STAGES:
                peer = best_peer(here, stage)
                cells.append(f"{_cell(peer, stage)} ({peer.title})" if peer else "")
            lines.append(f"| {budget:g}x | " + " | ".join(cells) + " |")
        behind = [line.removeprefix("- ") for line in said if "**Behind**" in line]
        # The picture stands on the first screen already.
        replace_section(options.readme, "real-model", "\n\n".join(["\n".join(lines), *behind]))


def _link(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("keep")
    part.add_argument("rows", type=Path, nargs="+")
    part.add_argument("--into", type=Path, required=True)
    part = commands.add_parser("write")
    part.add_argument("rows", type=Path)
    part.add_argument("--name", default="real-model", help="of the section")
    part.add_argument("--title", default="SmolLM2-135M")
    part.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    part.add_argument("--picture", type=Path, default=Path("docs/pictures/smollm2-after.png"))
    part.add_argument("--readme", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "keep":
        rows = kept((row for path in options.rows for row in read_rows(path)), read_rows(options.into))
        options.into.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    from peers.registry import PEERS  # some need packages of their own

    write(options, PEERS)


if __name__ == "__main__":
    main()
