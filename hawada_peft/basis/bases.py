"""The bases of a model together, of its stream and inside of its heads, and the change that a plan asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError
from ..gates.placement import NO_MAPS
from ..planning.plan import Plan
from ..vanilla.family import Layout, locate
from .basis import Basis, basis_gate, gate_basis, turn_of
from .heads.turn import HeadBasis, HeadTurn, basis_in_heads, head_turn
from .turn import Lookup, Turn

MISSING = (
    "the plan keeps directions of a basis of the residual stream, and there is no basis: it is in the adapter that "
    "the plan was made with, or in the file beside the plan; pass it as `basis`"
)


@dataclass(frozen=True)
class Bases:
    """
    What plans of a model may keep the first directions of.

    Args:
        stream (`Basis`, *optional*): of its residual stream.
        heads (`HeadBasis`, *optional*): inside of its heads.
    """

    stream: Basis | None = None
    heads: HeadBasis | None = None

    @classmethod
    def of(cls, given: Basis | Bases | None) -> Bases:
        """Those of a user, who may have that of the stream alone, or none."""
        return given if isinstance(given, Bases) else cls(given)

    def cpu(self) -> Bases:
        """The same with its tensors on the CPU."""
        stream, heads = (None if each is None else each.cpu() for each in (self.stream, self.heads))
        return Bases(cast("Basis | None", stream), cast("HeadBasis | None", heads))


@dataclass(frozen=True)
class Change:
    """
    New coordinates of the residual stream, and inside of heads; what a plan leaves as it is does not change.

    Args:
        stream (`Turn`, *optional*): of the residual stream.
        heads (`HeadTurn`, *optional*): inside of heads.
    """

    stream: Turn | None
    heads: HeadTurn | None

    @property
    def write(self) -> torch.Tensor | None:
        """(features, new features): the stream x becomes `x @ write`; None if its coordinates stay."""
        return None if self.stream is None else self.stream.write

    @property
    def tied(self) -> bool:
        """Whether one embedding still serves as the output projection too, if it does in the dense model."""
        return self.stream is None or self.stream.tied

    @property
    def in_heads(self) -> bool:
        """Whether the first features of each head are those that a plan keeps."""
        return self.heads is not None

    def touches(self, name: str) -> bool:
        """Whether a dense tensor becomes another one."""
        return self.stream is not None or (self.heads is not None and self.heads.touches(name))

    def tensor(self, name: str, lookup: Lookup) -> torch.Tensor:
        """A dense tensor in the new coordinates, by its name; `lookup` gives dense tensors."""
        given = lookup if self.heads is None else partial(self.heads.tensor, lookup=lookup)
        return given(name) if self.stream is None else self.stream.tensor(name, given)

    def restored(self, dense: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The last hidden states of a new model without a head as the dense model has them."""
        return hidden if self.stream is None else self.stream.restored(dense, hidden)


def change_of(stream: Turn | None, heads: HeadTurn | None) -> Change | None:
    """Both together; None if there are none."""
    return None if stream is None and heads is None else Change(stream, heads)


def plan_turn(model: PreTrainedModel, plan: Plan, bases: Bases) -> Change | None:
    """
    The change of coordinates that a plan asks for; None if it leaves them as they are.

    `slim(model, plan, turn=turn)` makes the model, `refit_model(..., coordinates=turn.write)` refits it. No warning is
    given about embeddings that are untied: that is for what is shipped (`slim_in_basis`).

    Args:
        model: the dense vanilla model.
        plan: what stays.
        bases: of the model's stream, and inside of its heads, where the plan may keep directions of these.

    Raises:
        InvalidPlanError: if the plan keeps directions, and there is no basis.
        IncompatibleBaseError, InvalidPlanError, UnsupportedModelError: as `turn_of`, `head_turn`.
    """
    if plan.rotated and bases.stream is None:
        raise InvalidPlanError(MISSING)
    stream = None
    if plan.rotated and bases.stream is not None:
        stream = turn_of(model, locate(model), bases.stream, torch.tensor(plan.hidden))
    return change_of(stream, head_turn(model, plan, bases.heads))


def gated_bases(base: nn.Module, layout: Layout, adapter_names: Sequence[str]) -> Bases:
    """
    The bases that adapters have; the first of each kind.

    Args:
        base: the base model with adapters in it.
        layout: its family row and sizes.
        adapter_names: whose.
    """
    gates = [gate for name in adapter_names if (gate := basis_gate(base, layout, name)) is not None]
    heads = [found for name in adapter_names if (found := basis_in_heads(base, layout, name)) is not None]
    return Bases(gate_basis(gates[0]) if gates else None, heads[0] if heads else None)


def heads_basis(
    base: nn.Module, layout: Layout, adapter_names: Sequence[str], plan: Plan, given: HeadBasis | None = None
) -> HeadBasis | None:
    """
    The bases inside of heads that a plan keeps features of; None if it narrows none.

    Args:
        base: the base model with adapters in it.
        layout: its family row and sizes.
        adapter_names: whose.
        plan: what stays.
        given: those of a plan that was made without the adapters, if these have none.

    Raises:
        InvalidPlanError: if there are none, or several adapters have some.
    """
    if plan.head_dim is None:
        return None
    found = [each for name in adapter_names if (each := basis_in_heads(base, layout, name)) is not None]
    if found and len(adapter_names) > 1:
        raise InvalidPlanError(
            f"the adapters {list(adapter_names)} have different bases inside of heads: merge one of them at a time"
        )
    if not found and given is None:
        raise InvalidPlanError(NO_MAPS)
    return found[0] if found else given
