"""
Least-squares reconstruction: the slim model's output projections refitted to the dense model's hidden states.

Long because the method is explained where it is called, and its layers share their targets.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..errors import HawAdaError, IncompatibleBaseError, UnsupportedModelError
from ..planning.plan import Plan
from ..progress import Progress, progress_bar
from ..vanilla.batches import Batch, check_batch, main_input, position_mask, rows_of, without_labels
from ..vanilla.family import locate
from ..vanilla.mode import evaluating
from ..vanilla.modules import parameters_of
from .fidelity import Expected, Reduce, all_reduced
from .layerwise import Gains, Stream, residual_gains
from .projections import Refit, as_projection, choose, new_moments

logger = logging.getLogger(__name__)

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
"""What the damping of each projection is chosen from."""

CORRECTION = 0.5
"""The part of the error left by earlier layers that each projection is asked to make up for."""

HELD_OUT = 0.125
"""The part of the calibration batches that nothing is fitted to."""


@dataclass(frozen=True)
class Reconstruction:
    """
    What `reconstruct` did.

    Args:
        refits (`tuple[Refit, ...]`): one per output projection, in the order of the slim model.
        metric (`str`): `"kl"` in nats per prediction, of classes or labels; or `"mse"`, the mean squared difference of
            one output, of regression, of the last hidden states of a model without a head.
        before (`float`): divergence from the dense model on held-out batches, of the plain slim model.
        after (`float`): the same, reconstructed.
        applied (`bool`): whether the slim model has the reconstructed weights; False if they were not better.
    """

    refits: tuple[Refit, ...]
    metric: str
    before: float
    after: float
    applied: bool

    def __str__(self) -> str:
        refitted = sum(refit.damping is not None for refit in self.refits)
        return (
            f"{refitted} of {len(self.refits)} projections refitted, held-out {self.metric} {self.before:.4g} -> "
            f"{self.after:.4g}: {'applied' if self.applied else 'not applied'}"
        )


def reconstruct(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    calibration: Iterable[Batch],
    *,
    dampings: Sequence[float] = DAMPINGS,
    held_out: float = HELD_OUT,
    correction: float = CORRECTION,
    coordinates: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """
    Refit the slim model's output projections (attention, FFN) to the dense model, layer by layer.

    Each one's inputs X are those of the slim model with all projections before it already refitted. Its target Y is
    what the dense block would add to the slim residual stream, plus a part of what is then still missing to the dense
    stream; what dropped layers added is asked of the FFN before them. `W' = W + (Y'X - W X'X) (X'X + D)^-1` with W the
    slim weight and D = damping * diag(X'X); moments are centred where the projection has a bias, which is refitted
    too. Where the plan narrows the stream, the dense block cannot be asked about the slim stream: its targets are what
    it adds to its own, in the slim stream's coordinates. At the end both models are compared on held-out batches, and
    the plain weights come back if the reconstructed ones are not better.

    Holds in memory, besides both models: the hidden states of all batches in both models and twice more for the
    targets, the inputs and the moments of one projection, the plain weights of the slim model's projections, and up to
    1 GiB of the dense model's outputs on held-out batches. Where
    `torch.distributed` is in use every rank passes its own batches, and all get the same weights.

    Args:
        dense: the teacher; left as it is.
        slim: what `slim(dense, plan)` gave, trained since or not, re-homed or not, on the same device. The weights of
            its output projections change in place.
        plan: the one it was made with.
        calibration: batches, keyword arguments of the forward pass: a list, a DataLoader. Labels are not used, and
            positions where `attention_mask` is 0 do not count.
        dampings: how close to stay to the weights of `slim`; chosen per projection by held-out error.
        held_out: the part of the batches (of the rows, if there is one batch) that nothing is fitted to.
        correction: the part of the error left by earlier layers that is added to the targets, from 0 to 1.
        coordinates: (hidden size, slim hidden size), which take the dense residual stream to the slim one; the plan's
            kept channels if left out.
        progress: makes a progress bar, as `tqdm.tqdm`; none is shown if left out.

    Returns:
        `Reconstruction`: the errors, and whether it was applied.

    Raises:
        IncompatibleBaseError: if the plan does not lead from the dense model's sizes to the slim model's.
        HawAdaError: if there is too little calibration data to hold some out, or an option out of its range.
        BadDataError: if a batch holds what the models cannot take.
        UnsupportedModelError: if a model has adapters in it or no family row, or its projections are not linear.

    References:
        Frantar, Alistarh, "Optimal Brain Compression" (2022) for the closed form.
    """
    result = refit_model(
        dense,
        slim,
        plan,
        calibration,
        dampings=dampings,
        held_out=held_out,
        correction=correction,
        coordinates=coordinates,
        progress=progress,
        reduce=all_reduced,
    )
    if result.applied or result.before == 0:
        logger.info("%s", result)
    else:
        warnings.warn(
            f"the slim model keeps its plain weights: {result}. More calibration batches, of the data that the model "
            "is for, may change that.",
            stacklevel=2,
        )
    return result


def refit_model(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    calibration: Iterable[Batch],
    *,
    dampings: Sequence[float] = DAMPINGS,
    held_out: float = HELD_OUT,
    correction: float = CORRECTION,
    coordinates: torch.Tensor | None = None,
    progress: Progress | None = None,
    reduce: Reduce,
) -> Reconstruction:
    """
    `reconstruct` without its log and warning.

    Args:
        dense, slim, plan, calibration, dampings, held_out, correction, coordinates, progress: as there.
        reduce: sums over ranks.
    """
    problems = [f"damping must be above 0, got {damping}" for damping in dampings if not damping > 0]
    if not dampings:
        problems.append("dampings must name at least one")
    if not 0 < held_out <= 0.5:
        problems.append(f"held_out must be above 0 and at most 0.5, got {held_out}")
    if not 0 <= correction <= 1:
        problems.append(f"correction must be from 0 to 1, got {correction}")
    if problems:
        raise HawAdaError("\n".join(problems))
    if any(isinstance(module, BaseTunerLayer) for model in (dense, slim) for module in model.modules()):
        raise UnsupportedModelError(
            "reconstruct() takes vanilla models, and one of these has adapters in it: use "
            "`merge_and_unload(calibration=...)` on the PEFT model, or `unload()` or merge it first"
        )
    teacher_layout, layout = locate(dense), locate(slim)
    plan.check_base(teacher_layout.full)
    if teacher_layout.complete(plan.shape) != teacher_layout.complete(layout.full):
        raise IncompatibleBaseError(
            f"the plan leads to {plan.shape.to_dict()}, the slim model has {layout.full.to_dict()}; pass the plan "
            "that it was made with"
        )
    if plan.rotated and coordinates is None:
        raise HawAdaError("the plan keeps directions of a basis of the residual stream: pass their `coordinates`")
    if plan.hidden is not None and coordinates is None:
        coordinates = torch.eye(teacher_layout.hidden_size)[:, list(plan.hidden)]
    if coordinates is not None:
        coordinates = coordinates.to(slim.device)
    fitted, held = _split(calibration, slim, held_out, reduce)
    with evaluating(dense, slim), torch.no_grad():
        expected = Expected(dense, held)
        metric, before = expected.divergence(slim, reduce)
        teacher, student = (
            Stream.start(model, row, [*fitted, *held]) for model, row in ((dense, teacher_layout), (slim, layout))
        )
        streams = zip([*fitted, *held], student.hidden, strict=True)
        masks = [position_mask(batch, hidden.shape[:2]) for batch, hidden in streams]
        ends = [name(i) for i in range(len(student.layers)) for name in (layout.attention_out, layout.ffn_out)]
        projections = {name: as_projection(slim.get_submodule(name), name) for name in ends}
        plain = {name: [p.data for p in parameters_of(module)] for name, module in projections.items()}
        applied = False
        try:
            layers = _refit_layers(
                teacher, student, plan, masks, len(fitted), dampings, correction, coordinates, reduce
            )
            refits = tuple(
                progress_bar(progress, iterable=layers, total=len(ends), desc="reconstructing", leave=False)
            )
            _, after = expected.divergence(slim, reduce)
            applied = after < before
        finally:  # also when a layer fails: never a model that is refitted in part
            if not applied:
                for name, module in projections.items():
                    for parameter, tensor in zip(parameters_of(module), plain[name], strict=True):
                        parameter.data = tensor
    return Reconstruction(refits, metric, before, after, applied)


def _refit_layers(
    teacher: Stream,
    student: Stream,
    plan: Plan,
    masks: Sequence[torch.Tensor | None],
    fit_count: int,
    dampings: Sequence[float],
    correction: float,
    coordinates: torch.Tensor | None,
    reduce: Reduce,
) -> Iterator[Refit]:
    """Refit layer after layer; the first `fit_count` batches are fitted to, the others choose the damping."""
    ends = [*plan.layers[1:], plan.dense.sizes()["num_hidden_layers"]]
    for layer in range(plan.layers[0]):
        teacher.advance(layer)
    for index, (layer, end) in enumerate(zip(plan.layers, ends, strict=True)):
        gains, dense_gains = residual_gains(student, index), residual_gains(teacher, layer)
        if gains is None or dense_gains is None:
            gains = dense_gains = None
        targets = _targets(teacher, layer, end, dense_gains, coordinates)
        names = student.layout.attention_out(index), student.layout.ffn_out(index)
        for which, (name, wanted) in enumerate(zip(names, targets, strict=True)):
            module = as_projection(student.model.get_submodule(name), name)
            fit, held = new_moments(module), new_moments(module)
            kept: list[tuple[torch.Tensor, torch.Tensor]] = []
            for number, mask in enumerate(masks):
                inputs, stream = student.inputs_at(module, index, number, gains)
                added = wanted[number].output.float()
                if dense_gains is not None:
                    block = wanted[number].block
                    added = _local(teacher, layer, number, which, stream, dense_gains) if block is None else block
                    added = added + wanted[number].dropped
                    added = added + correction * (wanted[number].output.float() - stream.float() - added)
                rows = slice(None) if mask is None else mask.flatten()
                moments = fit if number < fit_count else held
                moments.add(inputs.flatten(0, -2)[rows], added.flatten(0, -2)[rows])
                if gains is not None and which == 1:
                    kept.append((inputs, stream))
            wanted.clear()
            gain = None if gains is None else gains[which]
            yield choose(name, module, fit.reduced(reduce), held.reduced(reduce), gain, dampings)
            for number, (inputs, stream) in enumerate(kept):
                student.hidden[number] = stream + gain * module(inputs)
        if gains is None:
            student.advance(index)
        logger.debug("layer %d of %d is refitted", index + 1, len(plan.layers))


@dataclass(frozen=True)
class _Target:
    """
    Where the teacher arrives on one batch.

    Args:
        output: (batch, positions, hidden_size), its residual stream after a block; without gains the output of the
            block's projection.
        dropped: what layers that the slim model does not have added to that, float32; 0 if there are none.
        block: what the block added to the teacher's stream, float32, where that is not the student's in width.
    """

    output: torch.Tensor
    dropped: torch.Tensor | float = 0.0
    block: torch.Tensor | None = None

    def narrowed(self, coordinates: torch.Tensor, block: torch.Tensor) -> _Target:
        """In the coordinates of a narrower stream."""
        output, block = self.output.float(), block.float()
        matrix = coordinates.to(output)
        dropped = self.dropped @ matrix if isinstance(self.dropped, torch.Tensor) else self.dropped
        return _Target(output @ matrix, dropped, block @ matrix)


def _targets(
    teacher: Stream, layer: int, end: int, gains: Gains, coordinates: torch.Tensor | None
) -> tuple[list[_Target], list[_Target]]:
    """
    Take the teacher through a layer, and through those after it up to `end`, which the slim model does not have: what
    they add is for the FFN of the layer before them to make up for.

    Returns:
        Per batch the target of the attention, and that of the FFN.
    """
    if gains is None and coordinates is not None:
        raise UnsupportedModelError(
            f"layer {layer} does not add its blocks to the residual stream: what is narrower cannot be refitted to it"
        )
    attention, ffn, blocks = [], [], []
    for number, stream in enumerate(teacher.hidden):
        output, from_attention, from_ffn = teacher.outputs(layer, number)
        if gains is not None and coordinates is not None:
            blocks.append((gains[0] * from_attention, gains[1] * from_ffn))
        attention.append(_Target(from_attention if gains is None else stream + gains[0] * from_attention))
        ffn.append(_Target(from_ffn if gains is None else output))
        teacher.hidden[number] = output
    for dropped in range(layer + 1, end):
        teacher.advance(dropped)
    if gains is not None and end > layer + 1:
        arrived = zip(teacher.hidden, ffn, strict=True)
        ffn = [_Target(hidden, hidden.float() - before.output.float()) for hidden, before in arrived]
    if coordinates is None:
        return attention, ffn
    return (
        [target.narrowed(coordinates, block) for target, (block, _) in zip(attention, blocks, strict=True)],
        [target.narrowed(coordinates, block) for target, (_, block) in zip(ffn, blocks, strict=True)],
    )


def _local(
    teacher: Stream,
    layer: int,
    number: int,
    which: int,
    stream: torch.Tensor,
    gains: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """What the teacher's attention (0) or FFN (1) would add to the student's stream, in float32."""
    attention, ffn = teacher.attention_out(layer), teacher.ffn_out(layer)
    if which == 0:
        output = teacher.output_on(attention, layer, number, stream)
    else:  # the stream already holds what the student's attention added
        output = teacher.output_on(ffn, layer, number, stream, silent=attention)
    return gains[which].float() * output.float()


def _split(
    calibration: Iterable[Batch], slim: PreTrainedModel, held_out: float, reduce: Reduce
) -> tuple[list[Batch], list[Batch]]:
    """The batches to fit and those to hold out, on the device, without labels; the rows, if there is one batch."""
    batches: list[Batch] = []
    for batch in calibration:
        check_batch(slim, batch)
        batches.append(without_labels(batch, slim.device))
    if len(batches) == 1:
        total = len(main_input(slim, batches[0]))
        cut = total - max(1, round(held_out * total))
        parts = [rows for rows in (slice(cut), slice(cut, total)) if rows.stop > (rows.start or 0)]
        batches = [rows_of(batches[0], rows, total) for rows in parts]
    period = max(2, round(1 / held_out))
    held = [batch for index, batch in enumerate(batches) if index % period == period - 1] or batches[-1:]
    fitted = [batch for batch in batches if all(batch is not other for other in held)]
    counts = torch.tensor([len(fitted), len(held), not batches], device=slim.device)
    if min(reduce(counts)[:2].tolist()) == 0 or counts[2]:
        raise HawAdaError(
            f"{len(batches)} calibration batch(es) here; reconstruction needs at least one on every rank, and two "
            "rows in all: some to fit and some to hold out"
        )
    return fitted, held
