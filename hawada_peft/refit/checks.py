"""What a refit needs to be true of its models, its plan and its options; in memory or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import HawAdaError, IncompatibleBaseError, UnsupportedModelError
from ..planning.plan import Plan
from ..vanilla.batches import Batch, position_mask
from ..vanilla.family import Layout
from .layerwise import Stream
from .projections import Projection, as_projection


def check_options(dampings: Sequence[float], held_out: float, correction: float) -> None:
    """
    Raises:
        HawAdaError: listing the options of `reconstruct` that are out of their range.
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


def coordinates_of(dense: Layout, slim: Layout, plan: Plan, coordinates: torch.Tensor | None) -> torch.Tensor | None:
    """
    The coordinates in which a slim model's stream is compared; None if it is as wide as the dense one.

    Args:
        dense, slim: where both models' layers are, and their sizes.
        plan: from one to the other.
        coordinates: as in `reconstruct`.

    Raises:
        IncompatibleBaseError, HawAdaError: as `reconstruct`.
    """
    plan.check_base(dense.full)
    if dense.complete(plan.shape) != dense.complete(slim.full):
        raise IncompatibleBaseError(
            f"the plan leads to {plan.shape.to_dict()}, the slim model has {slim.full.to_dict()}; pass the plan "
            "that it was made with"
        )
    if plan.rotated and coordinates is None:
        raise HawAdaError("the plan keeps directions of a basis of the residual stream: pass their `coordinates`")
    if plan.hidden is not None and coordinates is None:
        coordinates = torch.eye(dense.hidden_size)[:, list(plan.hidden)]
    return coordinates


def projections_of(student: Stream) -> dict[str, Projection]:
    """
    The slim model's output projections by name, in order.

    Raises:
        UnsupportedModelError: if a layer has another kind of module there, or none that is known.
    """
    layout = student.layout
    ends = [name(i) for i in range(len(student.layers)) for name in (layout.attention_out, layout.ffn_out)]
    if "" in ends:
        raise UnsupportedModelError(
            f"layers of {type(student.model).__name__} have no attention or FFN output that is known: leave out the "
            "calibration"
        )
    return {name: as_projection(student.model.get_submodule(name), name) for name in ends}


def masks_of(student: Stream, batches: Sequence[Batch]) -> list[torch.Tensor | None]:
    """Per batch which positions count; None for all."""
    streams = zip(batches, student.hidden, strict=True)
    return [position_mask(batch, hidden.shape[:2]) for batch, hidden in streams]
