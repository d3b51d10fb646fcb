"""Whether trained gates are better than those that they started from, on examples that nothing was trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset, Subset
from transformers.trainer_utils import has_length

from ..errors import CheckpointError, UnsupportedModelError
from ..planning.plan import Plan
from ..processes import Reduce, of_this_rank
from ..refit.fidelity import divergence, mean_divergence
from ..refit.reconstruction import refit_model
from ..search.timed import dense_model
from ..vanilla.batches import Batch, main_input, without_labels
from ..vanilla.mode import adapters_off
from ..vanilla.outputs import output_of

logger = logging.getLogger(__name__)

KEEPS = ("both", "sliced", "refitted", "never")
"""By what the better of two is kept."""

START_FILE = "hawada_start.safetensors"
"""Beside the adapter in a checkpoint: what was trained, as it was before, and the plan that it gave."""

PART = 8
"""At most one example in so many is set aside."""

_FORMAT = "hawada_plan"


@dataclass(frozen=True)
class Comparison:
    """
    Trained gates against their start, at the same shape.

    Args:
        metric (`str`): what the losses are: `"kl"` to the dense model in nats, or `"mse"`.
        start, trained (`dict`): the losses on examples that nothing was trained on, `"sliced"` and `"refitted"`
            (reconstructed on the calibration examples), where that could be done.
        keep (`str`): by which of them is decided.
        examples (`int`): how many examples that were.
    """

    metric: str
    start: Mapping[str, float]
    trained: Mapping[str, float]
    keep: str
    examples: int

    @property
    def kept(self) -> str:
        """`"trained"` if no loss that counts is higher than that of the start; otherwise `"start"`."""
        counts = [self.keep] if self.keep in self.start else list(self.start)
        return "trained" if all(self.trained[name] <= self.start[name] for name in counts) else "start"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"kept": self.kept}

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {self.start[name]:.4g} -> {self.trained[name]:.4g}" for name in self.start)
        kept = "the trained gates are kept" if self.kept == "trained" else "their start is put back"
        return f"{kept}: {self.metric} on {self.examples} examples set aside, before and after training: {losses}"


@dataclass(frozen=True)
class StartingPoint:
    """
    All that is trained, as it was before, and the plan that it gave.

    Args:
        plan (`Plan`): what would have stayed without any training.
        tensors: by the names of the model's parameters, on the CPU.
    """

    plan: Plan
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: PeftModel, plan: Plan) -> StartingPoint:
        """A copy of what a model has to train, gates and whatever is trained with them."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return cls(plan, {name: p.detach().to("cpu", copy=True) for name, p in trained.items()})

    @torch.no_grad()
    def put_into(self, model: Any) -> None:
        """Make a model what it was, under the plan, in training as well."""
        for name, tensor in self.tensors.items():
            model.get_parameter(name).copy_(tensor)
        applied = model.applied_plan()
        plan = self.plan if applied is None else self.plan.rounded(applied.all_roundings)
        model.apply_plan(plan, in_training=True)

    def save(self, folder: Path) -> None:
        """Write `START_FILE`."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / START_FILE, metadata={_FORMAT: json.dumps(self.plan.to_dict())})

    @classmethod
    def load(cls, folder: Path) -> StartingPoint:
        """
        The inverse of `save`.

        Raises:
            CheckpointError: if the file is missing or damaged.
        """
        path = folder / START_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: the checkpoint is not complete, or of a training with keep_better='never', with "
                "which it is resumed"
            )
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
                plan = Plan.from_dict(json.loads(file.metadata()[_FORMAT]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        return cls(plan, tensors)


def set_aside(data: Any, count: int) -> tuple[Any, Dataset[Any] | None]:
    """
    Part a data set into what is trained on and what is not.

    Args:
        data: as `Trainer` takes it.
        count: how many examples are set aside, evenly spread; one of eight at most. None of data without a length.

    Returns:
        What is left, and what was set aside: `data` and None if that is nothing.
    """
    if data is None or not has_length(data):
        return data, None
    examples, total = cast(Dataset[Any], data), len(data)
    count = min(count, total // PART)
    if count <= 0:
        return data, None
    chosen = {index * total // count for index in range(count)}
    return Subset(examples, [i for i in range(total) if i not in chosen]), Subset(examples, sorted(chosen))


def compare(
    model: Any,
    start: StartingPoint,
    held_out: Sequence[Batch],
    calibration: Sequence[Batch],
    keep: str,
    *,
    reduce: Reduce = of_this_rank,
) -> Comparison:
    """
    Measure a trained model under its plan, and what it was before. The model is as it was afterwards.

    Args:
        model (`PeftModel`): under a plan, one adapter active.
        start: before the training.
        held_out: batches that nothing was trained on.
        calibration: batches to refit on.
        keep: one of `KEEPS`.
        reduce: sums over ranks; each has held-out batches of its own then.
    """
    trained = StartingPoint.of(model, model.applied_plan())
    refits = keep != "sliced" and _can_refit(model, (start.plan, trained.plan), calibration)
    losses: list[dict[str, float]] = []
    try:
        for state in (trained, start):
            if state is start:
                start.put_into(model)
            name, sliced = _sliced(model, held_out, reduce)
            losses.append({"sliced": sliced})
            refitted = _refitted(model, held_out, calibration) if refits else None
            if refitted is None:
                refits = False
            else:
                losses[-1]["refitted"] = refitted
    finally:
        trained.put_into(model)
    after, before = losses
    if not refits:
        after.pop("refitted", None)
    base = dense_model(model)
    examples = torch.tensor(sum(len(main_input(base, batch)) for batch in held_out), device=base.device)
    return Comparison(name, before, after, keep, int(reduce(examples)))


def _sliced(model: Any, held_out: Sequence[Batch], reduce: Reduce) -> tuple[str, float]:
    """Of the model under its plan, which computes what the slim one does."""

    def pairs() -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        for batch in map(without_labels, held_out):
            with adapters_off(model):
                dense = output_of(model, batch)
            yield batch, dense, output_of(model, batch)

    return mean_divergence(model, pairs(), reduce)


def _refitted(model: Any, held_out: Sequence[Batch], calibration: Sequence[Batch]) -> float | None:
    """Of the slim model, refitted; None if that cannot be done here, which is no reason to lose a training."""
    try:
        with model.beside() as (dense, small):
            refit_model(dense, small, model.applied_plan(), calibration, reduce=of_this_rank)
            return divergence(dense, small, [without_labels(batch) for batch in held_out], of_this_rank)[1]
    except (UnsupportedModelError, torch.OutOfMemoryError) as error:
        logger.warning("trained gates and their start are compared as sliced alone, without refitting: %s", error)
        return None


def _can_refit(model: Any, plans: Sequence[Plan], calibration: Sequence[Batch]) -> bool:
    """Whether the slim models can be built and refitted here."""
    base = dense_model(model)
    rows = sum(len(main_input(base, batch)) for batch in calibration)
    whole = all(parameter.is_floating_point() for parameter in base.parameters())  # not quantized
    return rows > 1 and whole and all(plan.hidden is None and not plan.keeps_all for plan in plans)
