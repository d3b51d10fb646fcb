"""A tiny copy of a model: the same class and config, narrow and shallow, with random weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..vanilla.family import Layout
from ..vanilla.legality import build_sizes
from ..vanilla.resize import edit_config
from ..vanilla.shape import Shape

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Hidden sizes that are tried, in units of the attention heads; of the features of one, where heads follow them."""

SMALL = 96
"""Up to this hidden size a model without a row is its own tiny copy."""


def tiny_copy(layout: Layout, dtype: torch.dtype = torch.float32, *, every_kind: bool = False) -> PreTrainedModel:
    """
    A model of the same class and config with few layers and the least hidden size that the class allows.

    No weight has a special value: no bias is zero, no norm's weight one. The caller's random state stays.

    Args:
        layout: the dense model's, with its class and config.
        dtype: of the copy.
        every_kind: it has a layer of each kind that the config's lists tell apart, instead of the first two at most.

    Returns:
        In evaluation mode, on the CPU.
    """
    if layout.known is not None and layout.hidden_size <= SMALL:  # nothing has to be found of another config
        config = copy.deepcopy(layout.config)
    else:
        config = _smallest(layout, every_kind)
    config._attn_implementation = "eager"  # kernels of half precision, or of a GPU, do not run the copy
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.manual_seed(0)
        tiny = layout.model_class(config)
        tiny.to(dtype=dtype)  # type: ignore[call-arg]  # PreTrainedModel hides the signature
        with torch.no_grad():
            for parameter in tiny.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for module in tiny.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx].normal_(0, 0.05)
    return tiny.eval()


def _smallest(layout: Layout, every_kind: bool) -> PreTrainedConfig:
    """The least hidden size that the class allows, and some of its layers."""
    layers = _kinds(layout) if every_kind else tuple(range(min(2, layout.dense.sizes()["num_hidden_layers"])))
    units, least = layout.dense.sizes()["num_attention_heads"], 16
    if layout.family.heads_follow:
        units, least = layout.head_dim, max(least, 4 * layout.head_dim)
    sizes = (width * units for width in WIDTHS)
    fits = (
        layout.narrowed(size)
        for size in sizes
        if least <= size < layout.hidden_size and build_sizes(layout, layout.narrowed(size)) is None
    )
    wide = next(fits, layout.full)
    return edit_config(layout, Shape(num_hidden_layers=len(layers)).complete(wide), layers=layers)


def _kinds(layout: Layout) -> tuple[int, ...]:
    """The first layer of each kind, by what the lists of the config say of it."""
    config, depth = layout.tower_config.to_dict(), layout.dense.sizes()["num_hidden_layers"]
    lists = [value for value in config.values() if isinstance(value, list) and len(value) == depth]
    indices = [config.get(name) or [] for name in layout.family.layer_indices]
    firsts: dict[str, int] = {}
    for layer in range(depth):
        said = [each[layer] for each in lists], [layer in each for each in indices]
        firsts.setdefault(repr(said), layer)
    return tuple(firsts.values())
