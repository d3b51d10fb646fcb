"""A vanilla model whose residual stream is in a basis of its own: the same function, other channels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar, cast

import torch
from transformers import PreTrainedModel

from ..errors import UntiedEmbeddingsWarning
from ..planning.plan import Plan
from ..progress import Progress
from ..surgery.slimming import slim
from ..vanilla.batches import Batch
from ..vanilla.family import locate
from ..vanilla.modules import check_no_adapters, check_unquantized
from .basis import Basis, is_tied, turn_of
from .find import find_basis
from .proof import check_exact
from .turn import Turn

Model = TypeVar("Model", bound=PreTrainedModel)


def rotate(
    model: Model,
    calibration: Iterable[Batch],
    *,
    keep_tied: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """
    A new vanilla model of the same class that computes the same, its stream's channels in order of importance.

    The first k channels are the k directions of the residual stream that matter most (`find_basis`), so that its width
    is cut by keeping the first ones: `HawAdaConfig(gates=("hidden",))` and `model.plan(Shape(hidden_size=k))`, or
    `slim`. The same holds after LayerNorms, whose means the basis of the first k channels takes off (`helmert`).

    Outputs differ by rounding. Hidden states are in the new coordinates, also the last ones of a model without a head;
    the weight and bias of its last norm are left out of these.

    Args:
        model: a dense vanilla model, left as it is.
        calibration: batches, keyword arguments of the forward pass; as many positions as the stream has features or
            more. Labels are not used.
        keep_tied: make the weight of the last norm one number, its mean, where it must be for the embedding to stay
            the output projection as well. That changes what the model computes, for training to repair.
        seed: of the targets drawn from the model's predictions.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        A model of the same class in the same mode, on the same device.

    Raises:
        UnsupportedModelError: if the rotation is not exact for the model, with the reason; if it has adapters in it,
            or quantized weights.
        HawAdaError: as `find_basis`.

    Warns:
        UntiedEmbeddingsWarning: if tied embeddings became two, with what that costs.

    References:
        Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns" (2024).
    """
    layout = locate(model)
    check_no_adapters(model, "rotate")
    check_unquantized(model)
    check_exact(layout)
    basis = find_basis(model, calibration, seed=seed, progress=progress)
    return slim_in_basis(model, Plan.keep_all(layout.dense), basis, keep_tied=keep_tied)


def slim_in_basis(
    model: Model,
    plan: Plan,
    basis: Basis,
    *,
    factor: torch.Tensor | None = None,
    keep_tied: bool = False,
) -> Model:
    """
    The slim vanilla model of a plan that keeps some directions of the residual stream: `slim` in a basis.

    Args:
        model: a dense vanilla model, left as it is.
        plan: what to keep; its `hidden` are units of the basis.
        basis: of the model's stream.
        factor: what each unit is multiplied by where the stream is read, (units,); nothing if left out.
        keep_tied: as in `rotate`.

    Raises: as `slim`; InvalidPlanError if the plan removes the mean of a stream that LayerNorms read;
        IncompatibleBaseError if the basis was found on another model.

    Warns:
        UntiedEmbeddingsWarning: as `rotate`.
    """
    return slim(model, plan, turn=exported_turn(model, plan, basis, factor=factor, keep_tied=keep_tied))


def exported_turn(
    model: PreTrainedModel,
    plan: Plan,
    basis: Basis,
    *,
    factor: torch.Tensor | None = None,
    keep_tied: bool = False,
) -> Turn:
    """The change of the stream's coordinates for what is shipped. Arguments, errors and warning: `slim_in_basis`."""
    kept = None if plan.hidden is None else torch.tensor(plan.hidden)
    turn = turn_of(model, locate(model), basis, kept, factor)
    if is_tied(model) and not turn.tied:
        if keep_tied:
            return replace(turn, tied=True)
        warn_untied(model, turn.size)
    return turn


def warn_untied(model: PreTrainedModel, features: int) -> None:
    """
    Say what it costs that the embedding cannot stay the output projection.

    Args:
        model: the dense model, with tied embeddings.
        features: of the stream in the new model.
    """
    rows = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    size = rows * features * model.dtype.itemsize
    warnings.warn(
        f"the embeddings are tied no longer: what is read from the stream is scaled by the weight of the last norm, "
        f"which is not one number. The output projection is {rows} x {features} parameters of its own now "
        f"({size / 1e6:,.1f} MB more in memory and file; the latency stays). To prevent it cut other axes, or make "
        "that weight one number and train: `rotate(..., keep_tied=True)`",
        UntiedEmbeddingsWarning,
        stacklevel=3,
    )
