"""Second moments of what a model's heads compute, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import HawAdaError
from ...progress import Progress, progress_bar
from ...vanilla.batches import Batch, check_batch, position_mask, without_labels
from ...vanilla.family import Layout
from ...vanilla.mode import evaluating
from ..moments import kind_of
from .projections import Projections

MOMENTS = "moments of heads"
"""What it is shown as."""


@dataclass(frozen=True)
class HeadMoments:
    """
    Of every layer that has heads, in their order. The scale of each does not matter.

    Args:
        query: (layers, heads, size, size), of the queries.
        key: (layers, heads, size, size), of the keys about their mean in each example: what all keys of an example
            have in common, softmax does not see.
        output: (layers, features, features), of what heads give about its mean, heads side by side.
        mean: (layers, features), of what heads give.
    """

    query: torch.Tensor
    key: torch.Tensor
    output: torch.Tensor
    mean: torch.Tensor


def by_head(moments: torch.Tensor, heads: int) -> torch.Tensor:
    """Of moments of heads side by side, (features, features), those of each: (heads, size, size)."""
    size = len(moments) // heads
    blocks = moments.unflatten(0, (heads, size)).unflatten(2, (heads, size))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def collect_head_moments(
    model: nn.Module,
    layout: Layout,
    projections: Projections,
    batches: Iterable[Batch],
    *,
    progress: Progress | None = None,
) -> HeadMoments:
    """
    One forward pass per batch. Sums are float32, float64 for a float64 model, on the model's device: `heads * size`
    squared numbers per layer, and twice that by heads.

    Args:
        model: dense, in any mode.
        layout: its family row and sizes.
        projections: of its attention.
        batches: keyword arguments of its forward pass; labels are left out, and padding does not count.
        progress: makes a progress bar.

    Raises:
        HawAdaError: if there are no batches, fewer positions in them than heads have features, or something is not
            finite.
    """
    device, dtype = kind_of(model)
    heads, size = layout.dense.sizes()["num_attention_heads"], layout.head_dim
    features, layers = heads * size, len(projections.layers)
    query, key = (torch.zeros(layers, heads, size, size, device=device, dtype=dtype) for _ in range(2))
    output = torch.zeros(layers, features, features, device=device, dtype=dtype)
    total, origin = (torch.zeros(layers, features, device=device, dtype=dtype) for _ in range(2))
    counts = [0] * layers
    masks: list[Batch] = []

    def add(sums: torch.Tensor, rows: torch.Tensor) -> None:
        each = rows.reshape(-1, heads, size).transpose(0, 1)
        sums += each.mT @ each

    def see(kind: str, index: int, found: torch.Tensor) -> None:
        rows, mask = found.detach().to(dtype), position_mask(masks[-1], found.shape[:-1])
        weight = None if mask is None else mask.to(dtype)[..., None]
        if kind == "key":
            mean = rows.mean(-2, True) if weight is None else (rows * weight).sum(-2, True) / weight.sum(-2, True)
            rows = rows - mean
        rows = rows.flatten(0, -2) if mask is None else rows[mask]
        if kind != "output":
            add((query if kind == "query" else key)[index], rows)
            return
        if not counts[index]:  # sums about a vector near the mean round off less
            origin[index] = rows.mean(0)
        rows = rows - origin[index]
        output[index].addmm_(rows.T, rows)
        total[index] += rows.sum(0)
        counts[index] += len(rows)

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for index, layer in enumerate(projections.layers):
            of = f"{layout.stack}.{layer}."
            for kind in ("query", "key"):
                module = model.get_submodule(of + getattr(projections, kind))
                stack.callback(module.register_forward_hook(_on_output(see, kind, index)).remove)
            module = model.get_submodule(of + projections.out)
            stack.callback(module.register_forward_pre_hook(_on_input(see, "output", index)).remove)
        for batch in progress_bar(progress, iterable=batches, desc=MOMENTS, leave=False):
            check_batch(model, batch)
            masks[:] = [without_labels(batch, device)]
            model(**masks[0])
    _check(counts, features, query, key, output)
    number = torch.tensor(counts, device=device, dtype=dtype)[:, None]
    off = total / number
    return HeadMoments(query, key, output / number[..., None] - off[:, :, None] * off[:, None], origin + off)


def _check(counts: list[int], features: int, *sums: torch.Tensor) -> None:
    if not any(counts):
        raise HawAdaError("no calibration batches were given; pass at least one")
    if min(counts) < features:
        raise HawAdaError(
            f"the calibration batches hold {min(counts)} positions, and the heads of a layer have {features} features "
            f"together: give batches of {features} positions (tokens, patches) or more, better several times that"
        )
    if not all(bool(torch.isfinite(each).all()) for each in sums):
        raise HawAdaError(
            "what heads compute on the calibration batches holds NaN or infinity; check the model's weights and the "
            "data"
        )


See = Callable[[str, int, torch.Tensor], None]


def _on_output(see: See, kind: str, index: int) -> Callable[..., Any]:
    return lambda _module, _args, output: see(kind, index, output)


def _on_input(see: See, kind: str, index: int) -> Callable[..., Any]:
    return lambda _module, args: see(kind, index, args[0])
