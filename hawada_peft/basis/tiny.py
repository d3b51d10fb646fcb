"""A tiny copy of a model: the same class and config, narrow and shallow, with random weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

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
    depth = min(2, layout.dense.sizes()["num_hidden_layers"])
    heads = layout.dense.sizes()["num_attention_heads"]
    wide = layout.full
    units = layout.head_dim if layout.family.heads_follow else heads
    for width in WIDTHS:
        size = width * units
        if (
            max(16, 4 * layout.head_dim * layout.family.heads_follow) <= size < layout.hidden_size
            and build_sizes(layout, layout.narrowed(size)) is None
        ):
            wide = layout.narrowed(size)
            break
    config = edit_config(layout, Shape(num_hidden_layers=depth).complete(wide), layers=tuple(range(depth)))
    if layout.known is not None and layout.hidden_size <= SMALL:  # nothing has to be found of another config
        config = copy.deepcopy(layout.config)
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
