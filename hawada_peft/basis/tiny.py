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


def tiny_copy(layout: Layout, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """
    A model of the same class and config with at most two layers and the least hidden size that the class allows.

    No weight has a special value: no bias is zero, no norm's weight one. The caller's random state stays.

    Args:
        layout: the dense model's, with its class and config.
        dtype: of the copy.

    Returns:
        In evaluation mode, on the CPU.
    """
    if layout.known is not None and layout.hidden_size <= SMALL:  # nothing has to be found of another config
        config = copy.deepcopy(layout.config)
    else:
        config = _smallest(layout)
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


def _smallest(layout: Layout) -> PreTrainedConfig:
    """At most two layers, and the least hidden size that the class allows."""
    depth = min(2, layout.dense.sizes()["num_hidden_layers"])
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
    return edit_config(layout, Shape(num_hidden_layers=depth).complete(wide), layers=tuple(range(depth)))
