"""How a slim model is prepared before it is trained. To add one: a function and a line in `PREPARATIONS`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..processes import all_reduced
from ..refit.cosine import refine_cosine
from ..refit.magnitude import compensate_magnitude, stream_magnitudes
from ..refit.reconstruction import DAMPINGS, refit_model
from ..vanilla.batches import Batch
from ..vanilla.family import among, locate

logger = logging.getLogger(__name__)
Preparation = Callable[[PreTrainedModel, PreTrainedModel, Plan, Sequence[Batch], torch.Tensor | None], None]
"""
Takes the dense model, the slim one, its plan, calibration batches, and the coordinates of the slim model's stream in
the dense one's (None: channels); changes the slim model in place.
"""

PLAIN = "none"
CLOSE = (1.0,)
"""The damping of least squares that are held close to the weights: each feature counts twice as much, for them."""


def _nothing(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    coordinates: torch.Tensor | None,
) -> None:
    """The slim model as it was cut."""


def _least_squares(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    coordinates: torch.Tensor | None,
    dampings: Sequence[float],
) -> None:
    """As `reconstruct`."""
    if plan.rotated and coordinates is None:
        raise UnsupportedModelError("least squares need the coordinates of a rotated residual stream")
    report = refit_model(dense, slim, plan, batches, dampings=dampings, coordinates=coordinates, reduce=all_reduced)
    logger.debug("%s: %s", plan, report)


def _magnitude(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    coordinates: torch.Tensor | None,
) -> None:
    """As `compensate_magnitude`, in every tower that is cut."""
    _check_channels(plan, "magnitude")
    for part in plan.cut_parts:
        with _alone(dense, part), _alone(slim, part):
            compensate_magnitude(slim, part, stream_magnitudes(dense, batches))


def _cosine(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    coordinates: torch.Tensor | None,
) -> None:
    """As `refine_cosine`, in every tower that is cut."""
    _check_channels(plan, "cosine")
    for part in plan.cut_parts:
        with _alone(dense, part), _alone(slim, part):
            refine_cosine(dense, slim, part, batches)


def _alone(model: PreTrainedModel, part: Plan) -> AbstractContextManager[None]:
    """Within, the tower of a plan is the one that `locate` finds."""
    return among(model, [locate(model, part.tower or None)])


def _check_channels(plan: Plan, name: str) -> None:
    if any(part.hidden is not None for part in plan.parts):
        raise UnsupportedModelError(f"preparation {name!r} compares streams of one size, and the plan cuts the stream")


PREPARATIONS: dict[str, Preparation] = {
    PLAIN: _nothing,
    "least squares": partial(_least_squares, dampings=DAMPINGS),
    "least squares, close": partial(_least_squares, dampings=CLOSE),
    "magnitude": _magnitude,
    "cosine": _cosine,
}
"""By the names that records and settings use."""
