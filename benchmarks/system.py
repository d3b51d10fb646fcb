"""
The whole system on one machine: budgets asked and met, training steps, exports, tables, searches, and how they grow.

On a GPU, with Llama-3.2-1B and ViT-B/16 shapes, and on a CPU with smaller ones:

    python benchmarks/system.py run --device cuda --out rows.jsonl --work-dir /some/disk --curves curves.json
    python benchmarks/system.py run --preset cpu --out rows.jsonl
    python benchmarks/system.py write --rows rows.jsonl --page docs/benchmarks.md

`run` adds a row to --out for each measurement, with date, device, versions and command, and skips what is there; a
measurement that fails leaves its error there, is tried again by the next run, and makes the exit code 1. `--parts`
takes some of budgets, steps, export, search, scaling. `write` puts the section `system` into the page, with plots.

Weights are random. The search needs losses: curves of a small teacher (`budget_search.py --save-curves`), or else an
illustration, as the rows say.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from document import circumstances, replace_section
from system_bench.budgets import Curves, measure_budgets, measure_searches
from system_bench.exports import measure_exports
from system_bench.page import write_text
from system_bench.presets import PRESETS
from system_bench.rows import Rows, read_rows
from system_bench.scaling import measure_scaling
from system_bench.steps import measure_steps

from hawada_peft.errors import UnsettledTimingWarning

PARTS = ("budgets", "steps", "export", "search", "scaling")


def run(options: argparse.Namespace) -> int:
    """Measure what is not in the rows yet; 1 if anything failed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.preset or ("gpu" if torch.device(options.device).type == "cuda" else "cpu")
    preset = PRESETS[name].quick() if options.quick else PRESETS[name]
    rows, curves, device = Rows(options.out, circumstances(options.device)), Curves(options.curves), options.device
    with tempfile.TemporaryDirectory(dir=options.work_dir) as work, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        warnings.simplefilter("ignore", UnsettledTimingWarning)  # answers are timed again, and the rows say how often
        parts: dict[str, Callable[[], None]] = {
            "budgets": lambda: measure_budgets(rows, preset, device, curves),
            "steps": lambda: measure_steps(rows, preset, device),
            "export": lambda: measure_exports(rows, preset, device, Path(work)),
            "search": lambda: measure_searches(rows, preset, device, curves),
            "scaling": lambda: measure_scaling(rows, preset, device, curves),
        }
        gc.freeze()  # what the imports made; the collections between the measurements need not look at it
        for part in PARTS:
            if part in options.parts:
                rows.attempt(part, parts[part])
        gc.unfreeze()
    if rows.failed:
        print("failed:", *rows.failed, sep="\n  ")
    return int(bool(rows.failed))


def write(options: argparse.Namespace) -> int:
    """Write the section and its plots."""
    rows = read_rows(*options.rows)
    if not rows:
        raise SystemExit(f"no rows in {', '.join(map(str, options.rows))}: `system.py run --out` writes them")
    folder = options.page.parent / "pictures"
    replace_section(options.page, "system", write_text(rows, folder, folder.name))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("run", help="measure")
    first.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    first.add_argument("--out", type=Path, required=True, help="a file of rows, JSON lines; those in it are skipped")
    first.add_argument("--device", default="cpu")
    first.add_argument("--preset", choices=sorted(PRESETS), help="gpu or cpu, by the device, if left out")
    first.add_argument("--quick", action="store_true", help="fewer budgets, repeats and sizes")
    first.add_argument("--curves", default="", help="losses of a small teacher, from budget_search.py --save-curves")
    first.add_argument("--work-dir", type=Path, help="for checkpoints, on the disk to measure (10 GB for the GPU's)")
    first.add_argument("--threads", type=int, default=0, help="torch's CPU threads; 0: as torch decides")
    first.set_defaults(do=run)
    second = commands.add_parser("write", help="write the rows into a page")
    second.add_argument("--rows", type=Path, nargs="+", required=True)
    second.add_argument("--page", type=Path, required=True)
    second.set_defaults(do=write)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = parser.parse_args(arguments)
    return options.do(options)


if __name__ == "__main__":
    raise SystemExit(main())
