"""
One column of the benchmarks on two CPU cores, from nothing but the installed packages: `make bench-quick`.

    python benchmarks/quick.py --folder quick-output

A small Llama is trained on the language reference that Python carries (the demo's teacher, for longer); then ours,
depth alone and two more peers are held against each other as in `frontier.py`: the same measured speedup, calibration
examples and steps of recovery. Nothing is fetched. Time is the thread's processor time, so a busy machine gives the
same ratios. An interrupted run goes on where it stopped; `--page` also puts the table into a page.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import frontier
import numpy as np
import torch
from document import replace_section
from frontier_bench.entries import entries_of
from frontier_bench.page import comparison, table
from peers.registry import PEERS
from rows import append_row, read_rows

from hawada_peft.demo.data import VOCABULARY, WINDOW, load_topics, stack
from hawada_peft.demo.tasks import TOPICS, Schedule
from hawada_peft.demo.teachers import train_teacher

CONTESTANTS = ("hawada_one_shot", "minitron_depth", "flap", "tp_taylor")
"""Ours; depth alone; and two of width alone, by activations and by gradients."""

TEACHER = Schedule(steps=1600, batch_size=8, learning_rate=3e-3)
STEPS = 300


def make_teacher(folder: Path, schedule: Schedule) -> tuple[Path, Path, Path]:
    """
    A trained teacher in a folder of its own, with its training text and held-out text as tokens.

    Returns:
        The teacher's folder, and the files of the training and the held-out windows, both (windows, 64).
    """
    teacher, train, held_out = folder / "teacher", folder / "train.npy", folder / "held_out.npy"
    if not held_out.exists():
        data = load_topics()
        train_teacher(TOPICS, data, schedule, teacher)
        np.save(train, stack(data.train)["input_ids"].numpy())
        np.save(held_out, stack(data.held_out)["input_ids"].numpy())
    return teacher, train, held_out


def bench(folder: Path, options: argparse.Namespace) -> str:
    """All stages; the table and what follows from it, as Markdown."""
    teacher, train, held_out = make_teacher(folder, replace(TEACHER, steps=options.teacher_steps))
    work = ["--teacher", str(teacher), "--data", str(train), "--length", str(WINDOW), "--batch-size", "16"]
    work += ["--calibration", "64", "--steps", str(options.steps), "--seeds", *map(str, options.seeds)]
    work += ["--contestants", *options.contestants]
    timing = ["--regime", f"prefill:8x{WINDOW}:float32:eager", "--threads", "1", "--clock", options.clock]
    timing += ["--budgets", str(options.budget), "--timing-seconds", "2", "--timing-rounds", "9"]
    timing += ["--table", str(folder / "table.json")]
    shapes, quality = (str(folder / f"{stage}.jsonl") for stage in ("shapes", "quality"))
    tested = ["--eval", str(held_out), "--eval-length", str(WINDOW), "--eval-examples", "194"]
    frontier.main(["shapes", *work, *timing, "--out", shapes])
    frontier.main(["quality", *work, *tested, "--shapes", shapes, "--out", quality])
    rows = read_rows(quality)
    entries = entries_of(read_rows(shapes), rows, PEERS)
    return f"{table(entries, rows[0], 'text')}\n\n{comparison(entries, 'text')}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("quick-output"), help="for the teacher and the rows")
    parser.add_argument("--budget", type=float, default=2.0, help="the speedup")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="several give a spread")
    parser.add_argument("--steps", type=int, default=STEPS, help="of recovery")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER.steps)
    parser.add_argument("--clock", choices=("cpu", "wall", "toy"), default="cpu", help="as in `frontier.py`")
    parser.add_argument(
        "--contestants", nargs="+", default=list(CONTESTANTS), metavar="NAME", help="as in `frontier.py`"
    )
    parser.add_argument("--page", type=Path, help="a page that gets the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # at these sizes a second thread waits more than it works
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        found = bench(options.folder, options)
    finally:
        append_row(options.folder / "seconds.jsonl", {"cpu": time.process_time()})
    spent = sum(row["cpu"] for row in read_rows(options.folder / "seconds.jsonl"))
    first = read_rows(options.folder / "shapes.jsonl")[0]
    text = (
        f"A Llama of 0.9M parameters (vocabulary {VOCABULARY}, windows of {WINDOW} tokens), made by the bench itself; "
        f"{first['regime']}, processor time; {options.steps} steps of recovery by AdamW. {first['device']} "
        f"({first['date']}; {first['versions']}): {spent:,.0f} s of processor time in all.\n\n{found}"
    )
    print(f"\n{text}")
    if options.page is not None:
        replace_section(options.page, "quick", text)


if __name__ == "__main__":
    main()
