"""Bases inside of heads, and what they make of the weights around them, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import InvalidPlanError
from ...gates.reading import head_maps
from ...planning.plan import Plan
from ...vanilla.family import Layout, locate
from ...vanilla.shape import HEADS
from .projections import Projections, find_projections

MISSING = (
    "the plan keeps features of a basis inside of each head, and there is none: it is in the adapter that the plan "
    "was made with, or in the file beside the plan; pass it as `basis`"
)


@dataclass(frozen=True)
class HeadBasis:
    """
    In every head of every layer that has some: bases of its features, the most important directions first.

    Args:
        query (`Tensor`): (layers, heads, features, directions), queries `q` become `q query`.
        key (`Tensor`): (layers, heads, directions, features), its inverse: keys `k` become `k key^T`.
        value (`Tensor`): (layers, heads, features, directions), of values and of what heads give.
        back (`Tensor`): (layers, heads, directions, features), its inverse.
        mean (`Tensor`): (layers, heads * features), of what heads give; zeros where no bias takes up what it loses.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    back: torch.Tensor
    mean: torch.Tensor

    def cpu(self) -> HeadBasis:
        """The same with its tensors on the CPU."""
        return replace(self, **{name: tensor.cpu() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of the fields."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def nbytes(self) -> int:
        """Bytes that it adds to an adapter."""
        return sum(tensor.numel() * 4 for tensor in self.tensors().values())


@dataclass(frozen=True)
class HeadTurn:
    """
    The weights of attention in the bases of a model's heads: of each head the first directions are what a plan keeps.

    Args:
        layout: the dense model's row and sizes.
        projections: of its attention.
        basis: inside of its heads.
        plan: how many features stay, and in which heads.
    """

    layout: Layout
    projections: Projections
    basis: HeadBasis
    plan: Plan

    def touches(self, name: str) -> bool:
        """Whether a dense tensor becomes another one."""
        return self._place(name) is not None

    def tensor(self, name: str, lookup: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """
        A dense tensor in the new coordinates: of the same shape, from which the first features of each head are to be
        kept. The class divides scores by the root of the head's size, which the queries make up for; the bias behind
        heads takes up what their means lose.

        Args:
            name: its name in the dense model.
            lookup: gives dense tensors by name: this one, and what is folded into it.

        Returns:
            Of the dense tensor's dtype, on its device; the dense tensor itself if it has no part in it.
        """
        place, tensor = self._place(name), lookup(name)
        if place is None:
            return tensor
        at, end = place
        wide, which = tensor.double(), name.rpartition(".")[2]
        query, key, value, back, mean = (each[at].to(wide) for each in self.basis.tensors().values())
        heads, size, _ = query.shape
        kept = self.plan.head_dim or size
        if end == self.projections.out and which == "weight":
            found = torch.einsum("ohd,hjd->ohj", wide.unflatten(1, (heads, size)), back).flatten(1)
        elif end == self.projections.out:
            lost = mean.view(heads, 1, size)
            lost = lost - lost @ value[..., :kept] @ back[:, :kept]
            stays = torch.zeros(heads, 1, 1).to(wide)
            stays[list(self.plan.kept(HEADS, self.projections.layers[at]) or ())] = 1
            weight = lookup(f"{name.rpartition('.')[0]}.weight").double()
            found = wide + weight @ (stays * lost).flatten()
        else:
            maps = {
                self.projections.query: (kept / size) ** 0.5 * query.mT,
                self.projections.key: key,
                self.projections.value: value.mT,
            }
            found = (maps[end] @ wide.reshape(heads, size, -1)).reshape(wide.shape)
        return found.to(tensor.dtype).contiguous()

    def _place(self, name: str) -> tuple[int, str] | None:
        """The place of its layer among those that have heads, and its projection relative to that."""
        inside = self.layout.within(name.rpartition(".")[0])
        if inside is None or inside[0] not in self.projections.layers or inside[1] not in self.projections.names:
            return None
        return self.projections.layers.index(inside[0]), inside[1]


def head_turn(model: PreTrainedModel, plan: Plan, basis: HeadBasis | None) -> HeadTurn | None:
    """
    The change of coordinates inside of heads that a plan asks for; None if it leaves them as they are.

    Args:
        model: the dense vanilla model.
        plan: what stays.
        basis: inside of the model's heads, where the plan may narrow them.

    Raises:
        InvalidPlanError: if the plan narrows heads, and there is no basis.
        UnsupportedModelError: as `find_projections`.
    """
    if plan.head_dim is None:
        return None
    if basis is None:
        raise InvalidPlanError(MISSING)
    layout = locate(model, plan.tower or None)
    return HeadTurn(layout, find_projections(layout), basis, plan)


def basis_in_heads(base: nn.Module, layout: Layout, adapter_name: str) -> HeadBasis | None:
    """The bases inside of heads of an adapter, if it has some."""
    maps = head_maps(base, layout, adapter_name)
    if not maps:
        return None
    found = [(query.into, query.back, out.into, out.back, out.mean) for query, out in maps]
    columns = [[each.detach().to(column[0].device) for each in column] for column in zip(*found, strict=True)]
    return HeadBasis(*map(torch.stack, columns))


def set_in_heads(base: nn.Module, layout: Layout, adapter_name: str, basis: HeadBasis) -> None:
    """Give an adapter that has bases inside of heads their values."""
    for at, (query, out) in enumerate(head_maps(base, layout, adapter_name)):
        into, key, value, back, mean = (each[at] for each in basis.tensors().values())
        query.set(into, key, torch.zeros_like(query.mean))
        out.set(value, back, mean)
