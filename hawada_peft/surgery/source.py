"""Where each tensor of a slim model comes from: the dense tensor, and the rows of it that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..vanilla.buffers import has_sentinel, initialise, owners, sentinel, unsaved
from ..vanilla.family import Layout
from ..vanilla.shape import BY_NAME, HEADS, KV_GROUPS, SliceRule
from ..vanilla.skeleton import build_empty
from .conformity import below


class StreamChange(Protocol):
    """New coordinates of the residual stream, or inside of heads, folded into the dense tensors."""

    @property
    def write(self) -> torch.Tensor | None:
        """(features, new features): the stream x becomes `x @ write`; None if its coordinates stay."""

    @property
    def in_heads(self) -> bool:
        """Whether the first features of each head are those that a plan keeps."""

    @property
    def tied(self) -> bool:
        """Whether one embedding still serves as the output projection too, if it does in the dense model."""

    def tensor(self, name: str, lookup: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A dense tensor in the new coordinates, by its name; `lookup` gives dense tensors."""

    def restored(self, dense: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The last hidden states of a new model without a head as the dense model has them."""


def rows_of(rule: SliceRule, layout: Layout, plan: Plan, layer: int) -> torch.Tensor:
    """The indices that stay along a rule's dimension, in the layer at a position of the plan."""
    offset, rows, sizes = 0, [], layout.full.to_dict()

    def left(axis: str) -> tuple[int, ...] | None:
        return plan.at(axis, rule.place) if rule.place else plan.units(axis, layer)

    def features(axis: str, width: int) -> int:
        """Of so many rows of a unit those that stay, the first ones: features of a head, not an entry for each."""
        narrowed = plan.head_dim is not None and axis in (HEADS, KV_GROUPS) and width == layout.head_dim
        return plan.head_dim or width if narrowed else width

    if rule.units:
        stays = torch.ones(len(rule.units[0]), dtype=torch.bool)
        for axis, units in zip(rule.segments, rule.units, strict=True):
            stay, total, each = left(axis), sizes[BY_NAME[axis].field], torch.tensor(units)
            if stay and len(stay) < total:
                here = torch.zeros(total + 1, dtype=torch.bool)
                here[[*stay, -1]] = True  # -1: a row of none of its units
                stays &= here[each]
            for unit in range(total if axis in (HEADS, KV_GROUPS) and plan.head_dim is not None else 0):
                mine = (each == unit).nonzero()[:, 0]
                stays[mine[features(axis, len(mine)) :]] = False
        return stays.nonzero()[:, 0]
    for axis in rule.segments:
        total = sizes[BY_NAME[axis].field]
        kept = left(axis) or range(total)
        starts = offset + torch.tensor(kept) * rule.width
        rows.append((starts[:, None] + torch.arange(features(axis, rule.width))).flatten())
        offset += total * rule.width
    return torch.cat(rows)


def build_tied(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """
    A model on the meta device whose tied weights are those that are the same in the model it is made from.

    Args:
        model_class: the class.
        config: of the new model; its `tie_word_embeddings` is switched off where the tied weights differ.
        tensors: the dense model's, by name; outside of the layers the names are those of the new model.

    Raises:
        UnsupportedModelError: if weights differ that the class ties in any case.
    """
    built = build_empty(model_class, config)
    differing = _untied(built, tensors)
    if differing and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        built = build_empty(model_class, config)
        differing = _untied(built, tensors)
    if differing:
        raise UnsupportedModelError(
            f"{model_class.__name__} ties {' and '.join(differing)}, and here they differ: no model of this class can "
            "hold both"
        )
    return built


def _untied(built: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The first names that are one tensor in a built model, and not in the one it is made from."""
    first: dict[int, str] = {}
    for name, tensor in built.state_dict(keep_vars=True).items():
        other = first.setdefault(id(tensor), name)
        if other == name or not {name, other} <= tensors.keys():
            continue
        one, two = tensors[other], tensors[name]
        if one is not two and one.data is not two.data and (one.is_meta or two.is_meta or not torch.equal(one, two)):
            return [other, name]
    return []


def materialise(
    model: nn.Module, result: PreTrainedModel, source_of: Callable[[str], str], sizes: Mapping[str, int]
) -> None:
    """
    Give a slim model the tensors that a state dict does not hold (rotary frequencies): its class computes them.

    As in `from_pretrained`; those of the dense model may have been changed by a long input or by a cast. What the
    class does not compute is taken from the dense model.

    Args:
        model: the dense model, adapters in it or not.
        result: on the meta device but for what its state dict holds.
        source_of: gives the dense name of a slim one.
        sizes: of the slim model, for messages.

    Raises:
        UnsupportedModelError: if something is in neither.
    """
    for name, module, owner in owners(result):
        missing = unsaved(module)
        if not missing:
            continue
        source = source_of(f"{name}.").removesuffix(".") if name else ""
        dense = below_at(model, source)
        for key in missing:
            theirs, mine = getattr(dense, key), getattr(module, key)
            if theirs.is_meta:
                continue  # a model without weights, made into another one
            if key in module._buffers and has_sentinel(mine):
                setattr(module, key, sentinel(mine, theirs.device))
        initialise(owner, module)
        for key in missing:
            theirs, mine = getattr(dense, key), getattr(module, key)
            if theirs.is_meta or not (mine.is_meta or torch.equal(mine, sentinel(mine, mine.device))):
                continue
            if theirs.shape != mine.shape:
                raise UnsupportedModelError(
                    f"{source + '.' if source else ''}{key} is not saved with the model, and its shape "
                    f"{tuple(theirs.shape)} would have to become {tuple(mine.shape)}: this class cannot be slimmed to "
                    f"{dict(sizes)}"
                )
            setattr(module, key, theirs.detach().clone())


def below_at(model: nn.Module, name: str) -> nn.Module:
    """A module by the name that it has without adapters in the model, from below them."""
    module = below(model)
    for part in name.split(".") if name else []:
        module = below(module.get_submodule(part))
    return module
