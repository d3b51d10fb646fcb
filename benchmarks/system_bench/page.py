"""The section `system` of the benchmarks' page: every number comes from the rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .budgets import ANCESTOR_FRACTION
from .rows import Row

PUBLISHED = {"dense_ms": 58.1, "asked_ms": 34.9, "ms": 48.2, "agreement": 84.1, "device": "NVIDIA H100"}
"""The ancestor project's own run: HawAda (https://github.com/miosipof/hawada), the JSON files in `assets/` at commit
5572c9b; ViT-B/16, float32, batch 64, 20 epochs; agreement with the dense model's classes in %."""

SOURCE = "HawAda, `assets/` of github.com/miosipof/hawada at 5572c9b"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def slug(device: str) -> str:
    """A device's name for file names."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_text(rows: list[Row], pictures: Path, link: str) -> str:
    """
    The section's text, device by device; plots are written beside.

    Args:
        rows: of any number of devices.
        pictures: the folder of the plots.
        link: that folder as the page refers to it.
    """
    ordered = sorted(rows, key=lambda row: row["circumstances"]["device"])
    parts = []
    for device, mine in groupby(ordered, key=lambda row: row["circumstances"]["device"]):
        parts.append(device_text(device, list(mine), pictures, link))
    return "## System bench\n\n" + "\n\n".join(parts)


def device_text(device: str, rows: list[Row], pictures: Path, link: str) -> str:
    """What was measured on one device."""
    good = {part: [row["result"] for row in rows if row["part"] == part and row["error"] is None] for part in SECTIONS}
    parts = [f"### {device}", circumstances_text(rows)]
    for part, write in SECTIONS.items():
        if good[part]:
            parts += write(good[part], pictures, link, slug(device))
    failed = [f"- {row['part']}: {row['name']}: {row['error'].splitlines()[0]}" for row in rows if row["error"]]
    if failed:
        parts += ["#### Failed", "\n".join(failed)]
    return "\n\n".join(parts)


def circumstances_text(rows: list[Row]) -> str:
    """Date, versions and command of every run that the rows are from."""
    runs = {tuple(row["circumstances"].items()): dict(row["circumstances"]) for row in rows}
    lines = [f"- {run['date']}; {run['versions']}: `{run['command']}`" for run in runs.values()]
    seconds = sum(row["seconds"] for row in rows)
    return "\n".join([*lines, f"- {len(rows)} measurements in {seconds:.0f} s. Random weights throughout."])


def budgets_text(results: list[Row], pictures: Path, link: str, device: str) -> list[str]:
    """Budgets asked and met, and the ancestor's case."""
    found = [result for result in results if "asked" in result]
    tables = [result for result in results if "table" in result]
    met = [result for result in found if "infeasible" not in result]
    if not found:
        return []
    lines = [
        [result["case"], f"{result['speedup_asked']:.2f}x", *measured(result), f"{result.get('search_s', 0):.1f}"]
        for result in found
    ]
    losses = "; ".join(sorted({result["losses"] for result in found}))
    text = [
        "#### Budgets asked and met",
        "The answer of the search and the dense model are built and timed anew afterwards; over 1 would be over the "
        f"budget. Losses that the search went by: {losses}; so the shapes illustrate, and the latencies are real.",
        table(
            ["case", "asked", *MEASURED, "search, s"],
            lines,
        ),
    ]
    if tables:
        timed = ", ".join(f"{row['table_s']:.0f} s ({row['table']['regime']['dtype']}, "
                          f"{row['table']['regime']['mode']})" for row in tables)  # fmt: skip
        errors = [row["errors"]["median"] for row in tables if row["errors"]]
        known = f"; median error of a table's estimates {min(errors):.1%} to {max(errors):.1%}" if errors else ""
        text.append(f"The tables took {timed}{known}.")
    cases: dict[str, list[tuple[float, float]]] = {}
    for result in met:
        cases.setdefault(result["case"].rpartition(",")[0], []).append((result["speedup_asked"], result["speedup"]))
    theirs = PUBLISHED["dense_ms"] / PUBLISHED["asked_ms"], PUBLISHED["dense_ms"] / PUBLISHED["ms"]
    if cases:
        from .pictures import plot_budgets

        picture = f"system-budgets-{device}.png"
        plot_budgets(pictures / picture, cases, (f"HawAda as published, {PUBLISHED['device']}", theirs))
        text.append(f"![Speedup asked against speedup measured]({link}/{picture})")
    ours = [result for result in found if result["of_ancestor"]]
    if ours:
        text += ancestor_text(ours)
    return text


MEASURED = ("dense, ms", "limit, ms", "measured, ms", "over asked", "speedup", "layers", "heads, KV", "FFN", "rounds")


def measured(result: Row) -> list[str]:
    """The cells of a budget that was met, or of one that cannot be."""
    if "infeasible" in result:
        return [*["-"] * 3, "cannot be met", *["-"] * 5]
    shape, dense = result["shape"], result["dense"]
    return [
        f"{result['dense_ms']:.3f}",
        f"{result['limit_ms']:.3f}",
        f"{result['ms']:.3f}",
        f"{result['over_asked']:.3f}",
        f"{result['speedup']:.2f}x",
        f"{shape['num_hidden_layers']}/{dense['num_hidden_layers']}",
        f"{shape['num_attention_heads']}, {shape['num_key_value_heads']}",
        str(shape["intermediate_size"]),
        str(result["rounds"]),
    ]


def ancestor_text(ours: list[Row]) -> list[str]:
    """The ancestor's case: its published run beside ours."""
    theirs = PUBLISHED
    rows = [
        [
            f"ancestor, as published ({theirs['device']})",
            "ViT-B/16: forward 64, float32",
            theirs["dense_ms"],
            theirs["asked_ms"],
            theirs["ms"],
            f"{theirs['ms'] / theirs['dense_ms']:.3f}",
            f"{theirs['dense_ms'] / theirs['ms']:.2f}x",
            f"{theirs['agreement']}% after 20 epochs",
        ]
    ]
    for result in ours:
        cells = ["-"] * 5
        if "infeasible" not in result:
            cells = [f"{result[name]:.2f}" for name in ("dense_ms", "limit_ms", "ms")]
            cells += [f"{result['ms'] / result['dense_ms']:.3f}", f"{result['speedup']:.2f}x"]
        rows.append(["here", result["case"], *cells, "not measured: random weights"])
    return [
        f"The ancestor of this project asked for {ANCESTOR_FRACTION} of the latency of a ViT-B/16 (source: {SOURCE}). "
        "Only latency is compared: the devices differ, and what is searched here has random weights.",
        table(
            ["run", "case", "dense, ms", "asked, ms", "measured, ms", "of dense", "speedup", "agreement with dense"],
            rows,
        ),
    ]


def steps_text(results: list[Row], pictures: Path, link: str, device: str) -> list[str]:
    """Training steps beside LoRA and IA3."""
    from step_cost import table as step_table

    text = [
        "#### A training step beside LoRA and IA3",
        "Teacher and student logits from one copy of the weights, KL divergence, backward, AdamW; adapters take "
        "turns, medians. The peak is the base weights, the adapter with its optimizer, and what a step holds at most.",
    ]
    for result in results:
        text += [f"{result['title']}; {result['rounds']} steps of each:", step_table(result["adapters"])]
    return text


def export_text(results: list[Row], pictures: Path, link: str, device: str) -> list[str]:
    """Export time and memory."""
    rows = [
        [
            result["model"],
            result["what"],
            f"{result['dense_mib']:,.0f}",
            f"{result['slim_mib']:,.0f}",
            f"{result['s']:.3f}",
            f"{result['dense_mib'] / result['s']:,.0f}",
            f"{result['peak_mib']:,.0f}",
            result["repeats"],
        ]
        for result in results
    ]
    copies = [f"{r['copy_s']:.2f} s for {r['dense_mib']:,.0f} MiB" for r in results if "copy_s" in r]
    plain = f" A plain copy of the dense files, flushed like the export, took {', '.join(copies)}." if copies else ""
    return [
        "#### Export",
        "To half the heads, half the FFN and 3/4 of the layers. The peak is what was held above what was there before "
        "(the dense model; for `reconstruct` the dense and the slim one): allocated memory on a GPU, resident memory "
        f"of the process on a CPU and on disks, mapped files included.{plain}",
        table(["model", "what", "dense, MiB", "slim, MiB", "s", "dense MiB/s", "peak, MiB", "repeats"], rows),
    ]


def search_text(results: list[Row], pictures: Path, link: str, device: str) -> list[str]:
    """Table and search with the package's settings."""
    rows = [
        [
            result["case"],
            result["asked"],
            f"{result['table_s']:.1f}",
            f"{result['shapes']:,}",
            f"{result['pass_s']:.3f}",
            f"{result['search_s']:.1f}" if "search_s" in result else "cannot be met",
            result.get("rounds", "-"),
        ]
        for result in results
    ]
    return [
        "#### Table and search",
        "With the package's own settings; the tables and searches above are shorter. A pass is an estimate of all "
        "shapes and their frontier; a search builds and times shapes.",
        table(["case", "budget", "table, s", "shapes", "a pass, s", "search, s", "rounds"], rows),
    ]


SCALED: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "gate step": ("step", lambda row: row["adapters"][0]["ms"] / 1000),
    "LoRA step": ("step", lambda row: row["adapters"][1]["ms"] / 1000),
    "merge": ("export", lambda row: row["s"]),
    "table": ("search", lambda row: row["table_s"]),
    "search": ("search", lambda row: row.get("search_s")),
}
"""What is followed over the sizes: which rows, and the seconds in them."""


def lines_of(results: list[Row], axis: str) -> dict[str, list[tuple[float, float]]]:
    """(size, seconds) by what was timed, along one axis; the other one at the grid's base."""
    place = ("layers", "hidden").index(axis)
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, (what, seconds) in SCALED.items():
        for row in results:
            other = ("hidden", "layers")[place]
            value = seconds(row) if row["what"] == what and row[other] == row["base"][1 - place] else None
            if value is not None:
                lines.setdefault(name, []).append((row[axis], value))
    return lines


def exponent(points: list[tuple[float, float]]) -> str:
    """The slope of the logarithms, by least squares."""
    if len({size for size, _ in points}) < 2:
        return "-"
    sizes, seconds = np.log(np.array(points)).T
    return f"{np.polyfit(sizes, seconds, 1)[0]:.2f}"


def scaling_text(results: list[Row], pictures: Path, link: str, device: str) -> list[str]:
    """How everything grows."""
    first = results[0]
    along = {"layers": lines_of(results, "layers"), "hidden size": lines_of(results, "hidden")}
    rows = []
    for name in SCALED:
        for size, lines in along.items():
            points = sorted(lines.get(name, []))
            if points:
                shown = ", ".join(f"{x}: {seconds:.3g}" for x, seconds in points)
                rows.append([name, size, shown, exponent(points)])
    layers, hidden = first["base"]
    text = [
        "#### Scaling",
        f"Llama shapes, {first['grid_dtype']}, vocabulary {first['vocabulary']:,}, FFN four times the hidden size, "
        f"four query heads per KV group; {layers} layers and hidden size {hidden} where the other is varied. Steps of "
        f"{first['step_size']} tokens; merges on the device; tables and searches in miniature, {first['regime']}. "
        "An exponent of 1 is proportional.",
        table(["what", "over", "seconds", "exponent"], rows),
    ]
    if all(along.values()):
        from .pictures import plot_scaling

        picture = f"system-scaling-{device}.png"
        plot_scaling(pictures / picture, along)
        text.append(f"![Seconds over layers and hidden size]({link}/{picture})")
    return text


Write = Callable[[list[Row], Path, str, str], list[str]]
SECTIONS: dict[str, Write] = {
    "budgets": budgets_text,
    "steps": steps_text,
    "export": export_text,
    "search": search_text,
    "scaling": scaling_text,
}
"""What writes the rows of each part."""
