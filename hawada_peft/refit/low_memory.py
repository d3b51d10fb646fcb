"""Least squares of a model that is larger than memory: both models walked through layer by layer, from their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..processes import of_this_rank
from ..progress import Progress, progress_bar
from ..vanilla.batches import Batch
from ..vanilla.family import tower_names
from .checks import check_options, coordinates_of, masks_of, projections_of
from .fidelity import mean_divergence
from .held_out import HELD_OUT, split
from .layerwise import Keep, Stream
from .on_demand import OnDemand
from .reconstruction import CORRECTION, DAMPINGS, Reconstruction, tell
from .sweep import refit_layers


def start_stream(weights: OnDemand, batches: Sequence[Batch], keep: Keep) -> Stream:
    """
    The stream of a model that is larger than memory, before its first layer.

    One row of each kind of batch goes through all layers, as the class calls them.

    Args:
        weights: of the model.
        batches: keyword arguments of its forward pass, on the device that weights come to.
        keep: where hidden states are kept.

    Raises:
        UnsupportedModelError: if the model has several stacks of layers, or a layer takes more from the one before it
            than its hidden states.
    """
    name, towers = type(weights.model).__name__, tower_names(weights.model)
    if len(towers) > 1:
        raise UnsupportedModelError(
            f"{name} has several stacks of layers ({', '.join(tower or 'its own' for tower in towers)}), and one can "
            "be gone through layer by layer: load the model, and slim it in memory"
        )
    with weights.outside():
        stream = Stream.start(weights.model, weights.layout, batches, keep)
    if stream.between:
        raise UnsupportedModelError(
            f"{name} cannot be gone through layer by layer, on hidden states alone: {stream.between}. Load the model, "
            "and slim it in memory"
        )
    return stream


def refit_on_demand(
    dense: OnDemand,
    slim: OnDemand,
    plan: Plan,
    calibration: Iterable[Batch],
    *,
    keep: Keep,
    dampings: Sequence[float] = DAMPINGS,
    held_out: float = HELD_OUT,
    correction: float = CORRECTION,
    coordinates: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """
    `reconstruct` of models that are larger than memory: the same weights, in `slim.changed`, up to rounding.

    At once there are one layer of each model, or of one model a layer and all that is in no layer; the moments of one
    projection, in float64; and, with `keep` or in memory, what `reconstruct` holds of the hidden states. Every weight
    of the dense model is read twice, or three times where the layers behind it are dropped; of the slim one three
    times.

    Args:
        dense, slim: the weights of both models, on one device.
        plan, calibration, dampings, held_out, correction, coordinates, progress: as in `reconstruct`.
        keep: where hidden states and predictions are kept.

    Returns:
        `Reconstruction`: if it was not applied, nothing is in `slim.changed`.

    Raises:
        IncompatibleBaseError, HawAdaError, BadDataError, UnsupportedModelError: as `reconstruct` and `start_stream`.

    Warns:
        UserWarning: if the slim model keeps its plain weights.
    """
    check_options(dampings, held_out, correction)
    coordinates = coordinates_of(dense.layout, slim.layout, plan, coordinates)
    if coordinates is not None:
        coordinates = coordinates.to(slim.device)
    fitted, held = split(calibration, slim.model, slim.device, held_out, of_this_rank)
    batches, first = [*fitted, *held], len(fitted)
    with torch.no_grad():
        student = start_stream(slim, batches, keep)
        total, masks = len(projections_of(student)), masks_of(student, batches)
        teacher = start_stream(dense, batches, keep)
        plain = replace(student, hidden=student.hidden[first:], calls=student.calls[first:])
        for layer in range(len(plain.layers)):
            plain.advance(layer)
        layers = refit_layers(teacher, student, plan, masks, first, dampings, correction, coordinates, of_this_rank)
        refits = tuple(progress_bar(progress, iterable=layers, total=total, desc="reconstructing", leave=False))
        for weights in (dense, slim):
            weights.release()
        with dense.outside():
            expected = [keep(teacher.prediction(first + index, batch)) for index, batch in enumerate(held)]
        with slim.outside():
            (metric, before), (_, after) = (
                mean_divergence(
                    slim.model,
                    (
                        (batch, expected[index], stream.prediction(start + index, batch))
                        for index, batch in enumerate(held)
                    ),
                    of_this_rank,
                )
                for stream, start in ((plain, 0), (student, first))
            )
    applied = after < before
    if not applied:
        slim.changed.clear()
    result = Reconstruction(refits, metric, before, after, applied)
    tell(result)
    return result
