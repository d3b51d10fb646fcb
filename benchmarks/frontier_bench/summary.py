"""The frontier of several teachers at one budget as one short table, for a page that has no room for more."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from document import replace_section
from peers.peer import Peer
from rows import read_rows

from frontier_bench.entries import METRICS, STAGES, best_of, entries_of
from frontier_bench.page import number
from frontier_bench.quality import HAWADA

UNMET, ABSENT = "out of reach", "not run"


def summarise(options: argparse.Namespace, peers: Mapping[str, Peer]) -> None:
    """Put the section `frontier` into the page: a picture, and a row per contestant, teacher after teacher."""
    page = Path(options.page)
    columns, parts, titles = [], [], {"dense": "dense"}
    for shapes_file, quality_file, words in zip(options.shapes, options.quality, options.words, strict=True):
        shapes, quality = read_rows(shapes_file), read_rows(quality_file)
        dense = next(row for row in quality if row["budget"] is None)
        metric = METRICS[dense["kind"]][0]
        entries = [entry for entry in entries_of(shapes, quality, peers) if entry.budget == options.budget]
        tried = {row["contestant"] for row in shapes if row["budget"] == options.budget}
        titles |= {entry.contestant: entry.title for entry in entries}
        for stage, when in STAGES.items():
            columns.append(f"{words}: {metric} {when}")
            best = best_of(entries, stage, dense["kind"])
            cells = dict.fromkeys(tried, UNMET) | {"dense": number(dense[stage][metric])}
            for entry in entries:
                text = number(entry.mean(stage, metric)) if entry.met else UNMET
                cells[entry.contestant] = f"**{text}**" if entry is best else text
            parts.append(cells)
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name in sorted(titles, key=["dense", *HAWADA, *peers].index):
        row = [cells.get(name, ABSENT) for cells in parts]
        if set(row) - {UNMET, ABSENT}:
            lines.append(f"| {titles[name]} | " + " | ".join(row) + " |")
    link = Path(os.path.relpath(options.picture, page.parent)).as_posix()
    text = f"Asked for {options.budget:g}x, measured; means over seeds, best in bold:"
    replace_section(
        page, "frontier", "\n\n".join([f"![quality against measured speedup]({link})", text, "\n".join(lines)])
    )
