"""
Least-squares reconstruction: the slim model's output projections refitted to the dense model's hidden states.

Long because what a refit takes, holds and gives is documented in full.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..processes import Reduce, all_reduced
from ..progress import Progress, progress_bar
from ..vanilla.batches import Batch
from ..vanilla.family import Layout, locate
from ..vanilla.mode import evaluating
from ..vanilla.modules import parameters_of
from .checks import check_options, coordinates_of, masks_of, projections_of
from .fidelity import Expected
from .held_out import HELD_OUT, split
from .layerwise import Known, KnownStream, Stream
from .projections import Refit
from .sweep import refit_layers

logger = logging.getLogger(__name__)

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
"""What the damping of each projection is chosen from."""

CORRECTION = 0.5
"""The part of the error left by earlier layers that each projection is asked to make up for."""


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
        plan: the one it was made with; of several towers those that lose something are refitted one after the
            other, as they are run.
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
    tell(result)
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
    check_options(dampings, held_out, correction)
    teacher = Teacher(dense, calibration, held_out=held_out, reduce=reduce)
    return teacher.refit(
        slim, plan, dampings=dampings, correction=correction, coordinates=coordinates, progress=progress
    )


class Teacher:
    """
    A dense model on calibration batches, to which slim models are refitted.

    Args:
        dense: the model; left as it is.
        calibration: batches, keyword arguments of its forward pass.
        held_out: as in `reconstruct`.
        room: bytes that may be kept of what its layers give, for where several models are refitted to it.
        reduce: sums over ranks.

    Raises:
        HawAdaError: if there is too little calibration data to hold some out.
        BadDataError: if a batch holds what the model cannot take.
        UnsupportedModelError: if the model has adapters in it.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        calibration: Iterable[Batch],
        *,
        held_out: float = HELD_OUT,
        room: int = 0,
        reduce: Reduce,
    ) -> None:
        _check_vanilla(dense)
        self.dense, self._reduce, self._known = dense, reduce, Known(room)
        self.fitted, self.held = split(calibration, dense, dense.device, held_out, reduce)
        self._expected = Expected(dense, self.held)
        self._streams: dict[str, KnownStream] = {}

    def refit(
        self,
        slim: PreTrainedModel,
        plan: Plan,
        *,
        dampings: Sequence[float] = DAMPINGS,
        correction: float = CORRECTION,
        coordinates: torch.Tensor | None = None,
        progress: Progress | None = None,
    ) -> Reconstruction:
        """
        `reconstruct` of a slim model, without its log and warning.

        Args:
            slim, plan, dampings, correction, coordinates, progress: as there.
        """
        _check_vanilla(slim)
        if plan.beside:
            order = [name for name, _ in slim.named_modules()]
            places = {part.tower: order.index(locate(slim, part.tower).stack) for part in plan.parts}
            ordered = sorted(plan.cut_parts or plan.parts, key=lambda part: places[part.tower])  # as they are run
            refit = partial(self.refit, slim, dampings=dampings, correction=correction, progress=progress)
            return _together([refit(each) for each in ordered])
        dense, batches = self.dense, [*self.fitted, *self.held]
        teacher_layout, layout = locate(dense, plan.tower or None), locate(slim, plan.tower or None)
        coordinates = coordinates_of(teacher_layout, layout, plan, coordinates)
        if coordinates is not None:
            coordinates = coordinates.to(slim.device)
        with evaluating(dense, slim), torch.no_grad():
            metric, before = self._expected.divergence(slim, self._reduce)
            teacher, student = self._stream(teacher_layout), Stream.start(slim, layout, batches)
            projections = projections_of(student)
            plain = {name: [p.data for p in parameters_of(module)] for name, module in projections.items()}
            applied, masks = False, masks_of(student, batches)
            try:
                layers = refit_layers(
                    teacher, student, plan, masks, len(self.fitted), dampings, correction, coordinates, self._reduce
                )
                refits = tuple(
                    progress_bar(progress, iterable=layers, total=len(projections), desc="reconstructing", leave=False)
                )
                _, after = self._expected.divergence(slim, self._reduce)
                applied = after < before
            finally:  # also when a layer fails: never a model that is refitted in part
                if not applied:
                    for name, module in projections.items():
                        for parameter, tensor in zip(parameters_of(module), plain[name], strict=True):
                            parameter.data = tensor
        return Reconstruction(refits, metric, before, after, applied)

    def _stream(self, layout: Layout) -> Stream:
        """The dense model's before the first layer of a tower."""
        if layout.tower not in self._streams:
            start = Stream.start(self.dense, layout, [*self.fitted, *self.held])
            self._streams[layout.tower] = KnownStream(**vars(start), known=self._known)
        return self._streams[layout.tower].again()


def _check_vanilla(model: PreTrainedModel) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "reconstruct() takes vanilla models, and one of these has adapters in it: use "
            "`merge_and_unload(calibration=...)` on the PEFT model, or `unload()` or merge it first"
        )


def tell(result: Reconstruction) -> None:
    """Log what was done, or warn that nothing came of it."""
    if result.applied or result.before == 0:
        logger.info("%s", result)
    else:
        warnings.warn(
            f"the slim model keeps its plain weights: {result}. More calibration batches, of the data that the model "
            "is for, may change that.",
            stacklevel=3,
        )


def _together(towers: Sequence[Reconstruction]) -> Reconstruction:
    """What was done to several towers, one after the other."""
    return Reconstruction(
        refits=tuple(refit for tower in towers for refit in tower.refits),
        metric=towers[0].metric,
        before=towers[0].before,
        after=next((tower.after for tower in reversed(towers) if tower.applied), towers[-1].after),
        applied=any(tower.applied for tower in towers),
    )
