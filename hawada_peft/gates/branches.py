"""
Where a factor scales what a layer adds to its input: found by running one layer with random weights.

A layer's gate belongs there. Before a norm a factor would be undone by the norm, and where the layer norms its own sum
no factor inside of it makes it the identity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..discovery.inputs import example_inputs
from ..discovery.parts.branches import linear_branches
from ..errors import UnsupportedModelError
from ..vanilla.family import Layout
from ..vanilla.legality import build_sizes
from ..vanilla.resize import edit_config
from ..vanilla.shape import Shape
from ..vanilla.skeleton import build_empty

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Hidden sizes of the layer that is run, in units of the attention heads."""

FFN_SIZE = 16
"""Its FFN channels."""

POSITIONS = 6
"""Of its input, where the model's own example inputs cannot be drawn."""

Call = Callable[[], torch.Tensor]
"""Runs the layer on its input: (rows, positions, features)."""


def branches_of(layout: Layout) -> tuple[str, ...]:
    """
    The modules of a layer whose outputs its gate multiplies: with all of them at 0 the layer is the identity, and in
    each of them alone it is linear. The last such modules in the order of execution.

    Args:
        layout: the dense model's, with its class and config.

    Returns:
        Their names, relative to a layer. Empty if there are none: the layer norms its sum, as post-norm encoders do,
        and a gate can only blend its output with its input.

    Raises:
        UnsupportedModelError: if a layer does not run on its own, and the family's row does not tell.
    """
    if layout.known is not None:
        return tuple(dict.fromkeys(name for each in layout.known.branches for name in each))
    declared = layout.family.branches
    return layout.once("branches", lambda: _find(layout)) if declared is None else declared


def branches_at(layout: Layout, layer: int) -> tuple[str, ...]:
    """As `branches_of`, of one layer: in stacks of layers of several kinds they may have other modules."""
    return branches_of(layout) if layout.known is None else layout.known.branches[layer]


def _find(layout: Layout) -> tuple[str, ...]:
    try:
        return _linear(layout)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"a layer of {layout.model_class.__name__} does not run on inputs drawn at random "
            f"({type(error).__name__}: {error}), so it is not known where its gate belongs: name `branches` in the "
            f"family row of {layout.model_type!r}, or leave 'layers' and 'blocks' out of the config's `gates`"
        ) from error


def _linear(layout: Layout) -> tuple[str, ...]:
    with torch.random.fork_rng(devices=()), torch.inference_mode(), torch.device("cpu"):
        torch.manual_seed(0)
        layer, x, call = _layer(layout)
        return linear_branches(layer, x, call, gated=True)[::-1]


def _layer(layout: Layout) -> tuple[nn.Module, torch.Tensor, Call]:
    """A layer with random weights, as small as its class allows, in float64; its input; and how to run it."""
    shape, depth = _small(layout), min(2, layout.dense.sizes()["num_hidden_layers"])
    config = edit_config(layout, replace(shape, num_hidden_layers=depth), layers=tuple(range(depth)))
    config._attn_implementation = "eager"  # others look at the values of masks, and here are none
    config._experts_implementation = "eager"  # it knows float64
    model = build_empty(layout.model_class, config).eval().float()  # towers may have dtypes of their own
    empty = model.get_submodule(f"{layout.stack}.{depth - 1}")
    stack = [f"{layout.stack}.{index}" for index in range(depth)]
    kwargs = _arguments(model, [model.get_submodule(name) for name in stack])
    if kwargs is None:  # it looks at values on the way, as rotary embeddings do that depend on the length
        model = layout.model_class(config).eval().float()
        kwargs = _arguments(model, [model.get_submodule(name) for name in stack])
    layer = copy.deepcopy(empty).to_empty(device="cpu").double()
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(0.3 * torch.randn_like(tensor) + float(tensor.ndim == 1 and name.endswith("weight")))
        else:
            tensor.zero_()
    x = torch.randn(2, POSITIONS, shape.hidden_size or layout.hidden_size, dtype=torch.float64)
    if kwargs is None:
        return layer, x, partial(_first, layer, (x,), {})
    args, named = kwargs
    args = tuple(_value(each) for each in args)
    named = {name: _value(value) for name, value in named.items()}
    x = args[0] if args else named["hidden_states"]
    return layer, x, partial(_first, layer, args, named)


def _first(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    output = layer(*args, **kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def _small(layout: Layout) -> Shape:
    """A legal shape of few and narrow units."""
    found, dense = layout.dense, layout.dense.sizes()
    grouped = dense["num_key_value_heads"] < dense["num_attention_heads"]
    pair = Shape(num_attention_heads=2, num_key_value_heads=1 if grouped else 2)
    wishes = [
        [replace(pair, hidden_size=2 * layout.head_dim)],
        [pair],
        [Shape(hidden_size=width * dense["num_attention_heads"]) for width in WIDTHS],
    ]
    wishes = wishes[:1] if _exists(layout, wishes[0][0].complete(found)) else wishes[1:]
    for each in wishes:
        found = next((wish for size in each if _exists(layout, wish := size.complete(found))), found)
    unit = found.hidden_size or layout.hidden_size
    sizes = (unit, 2 * unit, 4 * unit) if layout.family.ffn_unit else (FFN_SIZE,)
    narrow = [replace(found, intermediate_size=size) for size in sizes if size < dense["intermediate_size"]]
    return next((wish for wish in narrow if _exists(layout, wish)), found)


def _exists(layout: Layout, shape: Shape) -> bool:
    wide = shape.hidden_size is not None and shape.hidden_size > layout.hidden_size
    return not wide and build_sizes(layout, shape) is None


def _arguments(model: PreTrainedModel, layers: list[nn.Module]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a model, with or without values, gives to the last of its layers that it gets to; None if to none."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        # Some look at the values of a mask, others at those of the positions without one, or of tokens of an image.
        for masked, alone in ((True, False), (False, False), (True, True), (False, True)):
            if not seen:
                _try(model, masked=masked, alone=alone)
    return seen[-1] if seen else None


def _try(model: PreTrainedModel, *, masked: bool, alone: bool) -> None:
    """Run a model as far as it goes: nothing after the layer matters."""
    try:
        inputs = example_inputs(model)
        if alone:
            inputs = {name: value for name, value in inputs.items() if name.endswith("input_ids")} or inputs
        if "input_ids" in inputs:
            inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])} if masked else {}
            inputs["use_cache"] = False
        model(**inputs)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError):
        return


def _value(given: Any) -> Any:
    """Numbers for an argument without values: random ones, no position masked, no cache."""
    if isinstance(given, tuple | list):
        return type(given)(_value(each) for each in given)
    if isinstance(given, Cache) or not isinstance(given, torch.Tensor):
        return None if isinstance(given, Cache) else given
    if given.is_floating_point():
        return torch.randn(given.shape, dtype=torch.float64)
    return (
        torch.ones(given.shape, dtype=given.dtype)
        if given.dtype is torch.bool
        else torch.zeros(given.shape, dtype=given.dtype)
    )
