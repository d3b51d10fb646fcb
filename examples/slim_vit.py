"""
Slim an image classifier until it is so many times as fast on this machine.

    python examples/slim_vit.py --model google/vit-base-patch16-224 --dataset folder/with/pictures --output out \
        --speedup 1.5 --batch-size 64
    python examples/slim_vit.py --tiny --output out

Training uses no labels. They only tell the quality, so they must be those that the model was trained on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import tiny
import torch
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from hawada_peft import DistillTrainer, HawAdaConfig, HawAdaTrainer, QualityChange
from hawada_peft.latency import measure_many
from hawada_peft.shipping import push_to_hub


@dataclass
class Arguments(common.Arguments):
    image_column: str = field(default="image", metadata={"help": "the column of pictures"})
    label_column: str = field(default="label", metadata={"help": "the column of classes: numbers or names"})


TINY = {
    "batch_size": 32,
    "train_batch_size": 32,
    "steps": 20,
    "learning_rate": 0.2,
    "recover_steps": 30,
    "recover_learning_rate": 1e-3,
}


@torch.inference_mode()
def accuracy(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Per cent of the pictures that get their label."""
    model.eval()
    found = [model(batch["pixel_values"].to(model.device, model.dtype)).logits.argmax(-1).cpu() for batch in batches]
    return 100 * (torch.cat(found) == torch.cat([batch["labels"] for batch in batches])).double().mean().item()


def main() -> None:
    args = common.parse(Arguments, __doc__, TINY)
    folder = Path(args.output)
    set_seed(0)
    if args.tiny:
        torch.set_num_threads(1)  # at these sizes more threads mostly wait for each other
        args.model = args.model or tiny.make_vit(folder / "teacher")

    # Data: rows as they are, in random order (many datasets are sorted by class). Pictures become tensors in batches.
    if args.dataset is None:
        train, held_out = tiny.digits()
    else:
        train, held_out = common.load_rows(args, lambda data: data.shuffle(seed=0))
    processor = AutoImageProcessor.from_pretrained(args.model)
    base = AutoModelForImageClassification.from_pretrained(args.model, dtype=torch.float32).to(args.device)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = [row[args.image_column].convert("RGB") for row in rows]
        labels = [row[args.label_column] for row in rows]
        numbers = [base.config.label2id[label] if isinstance(label, str) else label for label in labels]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(numbers)}

    data = {"train_dataset": train, "data_collator": collate}
    raw = {"remove_unused_columns": False}  # the collator reads them
    held_out = common.batches_of(held_out, args.held_out, args.train_batch_size, collate)
    calibration = common.batches_of(train, args.calibration, args.train_batch_size, collate)

    # Gates: a search finds the shape for the budget, then the gates learn which heads and channels stay.
    budget = common.budget_of(args)
    model = get_peft_model(base, HawAdaConfig())
    trainer = HawAdaTrainer(
        model,
        common.training_arguments(args, "gates", args.steps, args.learning_rate, **raw),
        budget=budget,
        **(tiny.TRAINER if args.tiny else {}),
        **data,
    )
    trainer.train()
    model.save_pretrained(folder / "adapter")
    plan = model.applied_plan()
    print(plan)

    # Merge: what the plan closes is removed, what stays is refitted by least squares.
    slimmed = dataclasses.replace(model.slim(calibration=calibration), search=trainer.search)
    dense, slim = slimmed.dense, slimmed.model
    print(slimmed.reconstruction)

    # Recovery: the dense model teaches the slim one.
    if args.recover_steps:
        arguments = common.training_arguments(args, "recovery", args.recover_steps, args.recover_learning_rate, **raw)
        DistillTrainer(slim, arguments, teacher=dense, **data).train()

    # What came of it, in the dtype and the regime that were asked for.
    dtype = getattr(torch, args.dtype)
    dense, slim = dense.to(dtype).eval(), slim.to(dtype).eval()
    what = f"{sum(len(batch['labels']) for batch in held_out)} held-out pictures"
    quality = QualityChange("accuracy in %", accuracy(dense, held_out), accuracy(slim, held_out), what)
    regime = budget.regime(generates=dense.can_generate(), dtype=dtype, device=args.device)
    timings = measure_many({"dense": dense, "slim": slim}, regime, effort=tiny.EFFORT if args.tiny else None)
    slimmed.save(
        folder / "slim",
        processor=processor,
        base=args.model,
        latency=timings,
        quality=[quality],
        repo_id=args.push_to_hub,
    )
    ms = {name: timing.median_ms for name, timing in timings.items()}
    print(f"dense: {dense.num_parameters():,} parameters, {ms['dense']:.2f} ms, accuracy {quality.dense:.1f} %")
    print(f"slim:  {slim.num_parameters():,} parameters, {ms['slim']:.2f} ms, accuracy {quality.slim:.1f} %")
    print(f"speedup: {ms['dense'] / ms['slim']:.2f}x, asked for {args.speedup}x ({regime})")
    if args.push_to_hub:
        print(push_to_hub(folder / "slim", args.push_to_hub))


if __name__ == "__main__":
    main()
