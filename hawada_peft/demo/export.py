"""The demo's second process: `python -m hawada_peft.demo.export`. It knows nothing but saved folders."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from ..errors import UnsettledTimingWarning
from ..latency.measuring import measure_many
from ..search.timed import regime_of
from ..shipping.facts import ExportFacts, QualityChange
from ..shipping.save import save_slim
from ..shipping.write import write_card
from ..vanilla.family import locate
from ..vanilla.shape import Shape
from .measure import BATCH, agreement, logits_of, one_thread
from .table import Row
from .tasks import SEARCH_FILE, TASKS, Task, Work


def export_task(task: Task, folder: Path, work: Work) -> list[Row]:
    """
    Load a teacher and its adapter, merge, save, reload, and measure.

    Args:
        task: which model.
        folder: holds `teacher`, `adapter` and `held_out.safetensors`; gets `slim`.
        work: how many forward passes are timed.

    Returns:
        Rows for dense, masked, slim.
    """
    saved = load_file(folder / "held_out.safetensors")
    masked_logits = saved.pop("logits")  # of the process that trained the gates
    inputs = {name.removeprefix("inputs."): tensor for name, tensor in saved.items()}
    batch = {name: tensor[:BATCH] for name, tensor in inputs.items() if name != "labels"}

    model = PeftModel.from_pretrained(task.auto_class.from_pretrained(folder / "teacher"), folder / "adapter")
    plan = model.applied_plan()
    processor = None if task.processor_class is None else task.processor_class.from_pretrained(folder / "teacher")
    verification = save_slim(
        model.merge_and_unload(),
        folder / "slim",
        reference=masked_logits[:BATCH],
        inputs=batch,
        processor=processor,
    )

    dense = task.auto_class.from_pretrained(folder / "teacher").eval()
    slim = task.auto_class.from_pretrained(folder / "slim").eval()
    dense_logits, slim_logits = logits_of(dense, inputs), logits_of(slim, inputs)
    regime = regime_of(dense, task.budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsettledTimingWarning)
        timings = measure_many({"dense": dense, "slim": slim}, regime, effort=work.final)
    latency = {form: timing.median_ms for form, timing in timings.items()}

    quality = QualityChange(
        task.quality_name,
        dense=task.quality(dense_logits, inputs["labels"]),
        slim=task.quality(slim_logits, inputs["labels"]),
        data=f"{len(slim_logits)} {task.held_out}",
    )
    search = json.loads((folder / SEARCH_FILE).read_text(encoding="utf-8"))
    facts = ExportFacts(base=folder / "teacher", plan=plan, latency=timings, quality=(quality,), search=search)
    write_card(folder / "slim", facts, verification)

    def row(form: str, shape: Shape, parameters: int, logits: torch.Tensor, difference: float | None = None) -> Row:
        sizes = shape.sizes()
        return Row(
            task=task.name,
            title=task.title,
            form=form,
            parameters=parameters,
            layers=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            kv_heads=sizes["num_key_value_heads"],
            ffn=sizes["intermediate_size"],
            latency_ms=latency.get(form),
            budget=str(task.budget),
            regime=str(regime),
            device=regime.device_name,
            rounds=timings["slim"].rounds,
            quality=task.quality(logits, inputs["labels"]),
            quality_name=task.quality_name,
            examples=len(logits),
            held_out=task.held_out,
            agreement=agreement(logits, dense_logits),
            difference=difference,
        )

    difference = (slim_logits - masked_logits).abs().max().item()
    return [
        row("dense", locate(dense).dense, dense.num_parameters(), dense_logits),
        row("masked", plan.shape, dense.num_parameters(), masked_logits),
        row("slim", locate(slim).dense, slim.num_parameters(), slim_logits, difference),
    ]


def main() -> None:
    """Export the tasks named on the command line, and write their rows as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    with one_thread():
        for name in args.tasks:
            task = TASKS[name]
            rows = export_task(task, args.folder / name, task.quick if args.quick else task.full)
            (args.folder / name / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
