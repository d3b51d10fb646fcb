"""Whether a search may cut the residual stream, and heads, along directions that the adapter has no gates on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..basis.attach import attach_directions, attach_in_heads, detach_directions, detach_in_heads
from ..basis.basis import Basis, basis_gate
from ..basis.find import ensure_basis, init_basis
from ..basis.heads.find import find_in_heads
from ..basis.heads.projections import queries_of
from ..basis.heads.turn import HeadBasis, set_in_heads
from ..errors import HawAdaError, UnsupportedModelError
from ..files.kept import Kept
from ..gates.attach import collect_gates
from ..gates.bases import BasisGate
from ..gates.reading import hidden_gate
from ..processes import in_main_process
from ..progress import Progress
from ..vanilla.batches import Batch
from ..vanilla.family import locate
from ..vanilla.mode import adapters_off
from .result import SearchResult

logger = logging.getLogger(__name__)


Found = tuple[SearchResult, Mapping[str, torch.Tensor] | None]
"""A search, and the importance that it took of gates, by the names of `collect_gates`."""


def with_directions(
    model: PeftModel,
    calibration: Sequence[Batch],
    rotate: bool | None,
    search: Callable[[], Found],
    *,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Found:
    """
    Search with gates on directions of the residual stream, where the adapter has none on it (`add_directions`), and
    with bases inside of heads (`add_in_heads`). They stay if the plan is about them; otherwise the adapter is
    afterwards what it was before.

    Args:
        model, calibration, rotate, progress, kept: as in `add_directions`.
        search: the search.
    """
    directions = add_directions(model, calibration, rotate, progress=progress, kept=kept)
    heads, plan = "", None
    try:
        heads = add_in_heads(model, calibration, rotate, progress=progress, kept=kept)
        result, importance = search()
        plan = result.plan
    finally:
        if directions.added and not (plan is not None and plan.rotated):
            detach_directions(model, directions.added)
        if heads and not (plan is not None and plan.head_dim is not None):
            detach_in_heads(model, heads)
    if directions.why:
        result = replace(result, steps={**result.steps, "hidden_size": directions.why})
    if importance is not None:
        gates = collect_gates(model)
        importance = {name: value for name, value in importance.items() if name in gates}
    return result, importance


@dataclass(frozen=True)
class Directions:
    """
    What became of the residual stream before a search.

    Args:
        added: the name of the adapter that was given gates on directions of it; empty if none was.
        why: no hidden size is searched; empty if some are.
    """

    added: str = ""
    why: str = ""


def add_directions(
    model: PeftModel,
    calibration: Sequence[Batch],
    rotate: bool | None = None,
    *,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Directions:
    """
    Put gates on directions of the residual stream into the active adapter, their basis found on calibration batches.

    An adapter that has gates on the stream keeps them as they are; if they are on directions and have no basis yet,
    it is found. In a training of several processes each has to call this, and the first one's batches decide.

    Args:
        model: with gates placed by a family row, one adapter active.
        calibration: batches, keyword arguments of the forward pass.
        rotate: `False` for none; `True` to be told by an error what forbids them; left out they are added where the
            rotation is exact and the batches say enough for a basis.
        progress: makes progress bars.
        kept: where the basis is kept.

    Raises:
        UnsupportedModelError: with `rotate=True`, if the rotation is not exact for the model, or the adapter gates
            the stream's channels.
        HawAdaError: with `rotate=True`, as `find_basis`.
    """
    names = list(model.active_adapters)
    if len(names) != 1 or model.peft_config[names[0]].to_dict()["base_sizes"] is None:
        return Directions(why="its gates were not placed by a family row")  # the search says so
    (name,) = names
    base = model.get_base_model()
    layout = locate(base)
    if hidden_gate(base, layout, name) is not None:
        ensure_basis(model, calibration)
        if rotate and basis_gate(base, layout, name) is None:
            raise UnsupportedModelError(
                f"rotate=True, and adapter {name!r} gates channels of the residual stream: leave 'hidden' out of its "
                "`gates`, or make it with HawAdaConfig(rotate=True)"
            )
        return Directions()
    if rotate is False:
        return Directions(why="has no gates: stays as it is")
    try:
        attach_directions(model, name)
    except UnsupportedModelError as error:
        return _refused(error, rotate)
    try:
        _find(model, calibration, progress, kept or Kept())
    except BaseException as error:
        detach_directions(model, name)
        if isinstance(error, HawAdaError):
            return _refused(error, rotate)
        raise
    return Directions(added=name)


def add_in_heads(
    model: PeftModel,
    calibration: Sequence[Batch],
    rotate: bool | None = None,
    *,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> str:
    """
    Put bases inside of heads into the active adapter, found on calibration batches, where heads can be narrowed and
    the batches say enough. One that has them keeps them; they are found if they were not yet.

    In a training of several processes each has to call this, and the first one's batches decide.

    Args:
        model: with gates placed by a family row, one adapter active.
        calibration: batches, keyword arguments of the forward pass.
        rotate: `False` for none.
        progress: makes progress bars.
        kept: where the bases are kept.

    Returns:
        The name of the adapter that was given them; empty if none was.
    """
    (name, *more) = model.active_adapters
    config = model.peft_config[name].to_dict()
    if more or config["base_sizes"] is None:
        return ""
    if config["narrow_heads"]:
        ensure_basis(model, calibration)
        return ""
    if rotate is False:
        return ""
    base = cast(PreTrainedModel, model.get_base_model())
    layout = locate(base)
    try:
        attach_in_heads(model, name)
    except UnsupportedModelError as error:
        logger.info("no size of heads is searched: %s", error)
        return ""

    def make() -> dict[str, torch.Tensor]:
        return in_main_process(lambda: find_in_heads(base, calibration, progress=progress).cpu()).tensors()

    try:
        with adapters_off(model):
            found = (kept or Kept()).tensors("in heads", make)
        set_in_heads(base, layout, name, HeadBasis(**found))
    except BaseException as error:
        detach_in_heads(model, name)
        if isinstance(error, HawAdaError):
            logger.info("no size of heads is searched: %s", error)
            return ""
        raise
    return name


def may_narrow_heads(model: PeftModel, rotate: bool | None = None) -> bool:
    """Whether `add_in_heads` will look for bases."""
    base, (name, *more) = model.get_base_model(), model.active_adapters
    config = model.peft_config[name].to_dict()
    if rotate is False or more or config["base_sizes"] is None or config["narrow_heads"]:
        return False
    try:
        return bool(queries_of(locate(base)))
    except UnsupportedModelError:
        return False


def may_add_directions(model: PeftModel, rotate: bool | None) -> bool:
    """Whether `add_directions` will look for a basis; what then forbids one is found on the way."""
    base, (name, *more) = model.get_base_model(), model.active_adapters
    if rotate is False or more or model.peft_config[name].to_dict()["base_sizes"] is None:
        return False
    return hidden_gate(base, locate(base), name) is None


def _find(model: PeftModel, calibration: Sequence[Batch], progress: Progress | None, kept: Kept) -> None:
    """`init_basis`, or the basis that is kept."""

    def make() -> dict[str, torch.Tensor]:
        basis = cast(Basis, init_basis(model, calibration, progress=progress).stream)
        return {"vectors": basis.vectors, "scales": basis.scales, "marks": basis.marks}

    base = model.get_base_model()
    gate = cast(BasisGate, basis_gate(base, locate(base), model.active_adapter))
    gate.set_basis(**kept.tensors("basis", make))


def _refused(error: HawAdaError, rotate: bool | None) -> Directions:
    if rotate:
        raise error
    logger.info("no hidden size is searched: %s", error)
    return Directions(why=f"stays as it is: {error}")
