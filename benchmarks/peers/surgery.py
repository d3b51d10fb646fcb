"""Cutting a transformers model in place, each layer to its own size; its own forward runs on, cache and all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hawada_peft.errors import InvalidPlanError, UnsupportedModelError
from hawada_peft.surgery.slicing import slice_linear
from hawada_peft.vanilla.family import Layout, locate
from hawada_peft.vanilla.shape import FFN, HEADS, KV_GROUPS

ROUNDING = 8
"""FFN channels stay in multiples of it, as kernels want (an odd size can be slower than the dense one)."""


@dataclass(frozen=True)
class Block:
    """
    An attention or an FFN: linear maps with one row per feature of a unit, and one that reads these features.

    owner: the module. out: its child whose input columns are the units' features. rows: its other linear children, and
        whether their rows belong to query heads, KV groups or FFN channels.
    """

    owner: nn.Module
    out: str
    rows: Mapping[str, str]

    def linear(self, name: str) -> nn.Linear:
        """A linear child."""
        module = self.owner.get_submodule(name)
        assert isinstance(module, nn.Linear)  # `_block` has looked
        return module

    @property
    def output(self) -> nn.Linear:
        """The child that reads the units."""
        return self.linear(self.out)

    def weights(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Each weight, and its dimension along which the units lie."""
        yield from ((self.linear(name).weight, 0) for name in self.rows)
        yield self.output.weight, 1

    def parameters(self) -> int:
        """The weights of all units together."""
        return sum(weight.numel() for weight, _ in self.weights())


@dataclass(frozen=True)
class Keep:
    """
    What stays of a layer; None for all of it.

    heads: query heads. A KV group without any goes as well; those that stay must keep equally many.
    channels: of the FFN.
    """

    heads: Sequence[int] | None = None
    channels: Sequence[int] | None = None


def blocks_of(model: PreTrainedModel) -> list[tuple[Block, Block]]:
    """Attention and FFN of each layer of a dense model."""
    layout = locate(model)
    layers = range(layout.dense.sizes()["num_hidden_layers"])
    return [(attention(model, layout, layer), ffn(model, layout, layer)) for layer in layers]


def attention(model: PreTrainedModel, layout: Layout, layer: int) -> Block:
    """A layer's attention."""
    sizes, width = layout.dense.sizes(), layout.head_dim
    axes = {
        sizes["num_key_value_heads"] * width: KV_GROUPS,
        sizes["num_attention_heads"] * width: HEADS,  # last: if the numbers are equal, groups are heads
    }
    return _block(model, layout.attention_out(layer), axes)


def ffn(model: PreTrainedModel, layout: Layout, layer: int) -> Block:
    """A layer's FFN."""
    return _block(model, layout.ffn_out(layer), {layout.dense.sizes()["intermediate_size"]: FFN})


def _block(model: PreTrainedModel, name: str, axes: Mapping[int, str]) -> Block:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    linears = {child: module for child, module in owner.named_children() if isinstance(module, nn.Linear)}
    unknown = [child for child in linears if child != leaf and linears[child].out_features not in axes]
    if leaf not in linears or len(linears) < 2 or unknown:
        raise UnsupportedModelError(
            f"{parent!r} should hold {leaf!r} and linear maps with {sorted(axes)} rows, holds "
            f"{ {child: module.out_features for child, module in linears.items()} }"
        )
    rows = {child: axes[module.out_features] for child, module in linears.items() if child != leaf}
    return Block(owner, leaf, rows)


def all_heads(layout: Layout, groups: Sequence[int]) -> list[int]:
    """The query heads of KV groups."""
    per_group = layout.dense.heads_per_group
    return [group * per_group + head for group in sorted(groups) for head in range(per_group)]


def keep_units(model: PreTrainedModel, keeps: Mapping[int, Keep]) -> None:
    """
    Remove heads and FFN channels.

    Args:
        model: dense; changed in place. Layers may end up with different sizes, so it cannot be saved as a vanilla
            model.
        keeps: by layer; layers that are left out stay whole.

    Raises:
        InvalidPlanError: if KV groups would keep different numbers of query heads, or nothing.
    """
    layout = locate(model)
    per_group, width = layout.dense.heads_per_group, layout.head_dim
    for layer, keep in keeps.items():
        if keep.heads is not None:
            heads = sorted(keep.heads)
            groups = sorted({head // per_group for head in heads})
            counts = [sum(head // per_group == group for head in heads) for group in groups]
            if not heads or len(set(counts)) > 1:
                raise InvalidPlanError(
                    f"KV groups {groups} of layer {layer} must keep equally many heads, got {counts}"
                )
            block = attention(model, layout, layer)
            _slice(block, {HEADS: features_of(heads, width), KV_GROUPS: features_of(groups, width)}, HEADS)
            _state(
                block.owner,
                num_attention_heads=len(heads),
                num_heads=len(heads),
                num_key_value_heads=len(groups),
                num_key_value_groups=counts[0],
                all_head_size=len(heads) * width,
            )
        if keep.channels is not None:
            channels = sorted(keep.channels)
            block = ffn(model, layout, layer)
            _slice(block, {FFN: channels}, FFN)
            _state(block.owner, intermediate_size=len(channels))


@torch.no_grad()
def zero_units(model: PreTrainedModel, keeps: Mapping[int, Keep]) -> None:
    """Close what `keep_units` would remove: the columns that read it become zero. Computes the same."""
    layout = locate(model)
    for layer, keep in keeps.items():
        if keep.heads is not None:
            _zero(attention(model, layout, layer).output, features_of(keep.heads, layout.head_dim))
        if keep.channels is not None:
            _zero(ffn(model, layout, layer).output, keep.channels)


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """
    Remove all other layers of a dense model, in place. Its config says so, and the cache's indices follow.

    Raises:
        InvalidPlanError: if none would stay, or one does not exist.
    """
    layout = locate(model)
    total, layers = layout.dense.sizes()["num_hidden_layers"], sorted(layers)
    if not layers or layers[0] < 0 or layers[-1] >= total:
        raise InvalidPlanError(f"layers to keep must exist, and one must stay: got {layers} of {total}")
    parent, _, leaf = layout.stack.rpartition(".")
    stack = model.get_submodule(layout.stack)
    assert isinstance(stack, nn.ModuleList)  # `locate` has looked
    kept = nn.ModuleList(stack[layer] for layer in layers)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            _state(module, layer_idx=index)
    setattr(model.get_submodule(parent), leaf, kept)
    model.config.num_hidden_layers = len(layers)
    for field in layout.family.layer_lists:
        entries = getattr(model.config, field, None)
        if entries is not None:
            setattr(model.config, field, [entries[layer] for layer in layers])


@torch.no_grad()
def add_bias(linear: nn.Linear, bias: torch.Tensor) -> None:
    """Add to the bias of a linear map; it gets one if it has none."""
    bias = bias.to(linear.weight)
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)


def _slice(block: Block, rows: Mapping[str, Sequence[int]], columns: str) -> None:
    for name, axis in block.rows.items():
        setattr(block.owner, name, slice_linear(block.linear(name), keep_out=rows[axis]))
    setattr(block.owner, block.out, slice_linear(block.output, keep_in=rows[columns]))


def _zero(linear: nn.Linear, kept: Sequence[int]) -> None:
    mask = torch.zeros(linear.in_features, device=linear.weight.device)
    mask[torch.as_tensor(kept, device=mask.device)] = 1
    linear.weight.mul_(mask)


def features_of(units: Sequence[int], width: int) -> list[int]:
    """The features of units that have `width` each, ascending."""
    return [unit * width + feature for unit in sorted(units) for feature in range(width)]


def _state(module: nn.Module, **sizes: int) -> None:
    """Correct the sizes that a module holds; which of them it holds depends on its class and transformers' version."""
    for name, size in sizes.items():
        if name in vars(module):
            setattr(module, name, size)
