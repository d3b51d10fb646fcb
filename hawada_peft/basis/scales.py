"""What narrow norms are multiplied by: one number for each norm and width, by least squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..gates.hidden import narrow_norm, plain_norm
from ..gates.stream_basis import WIDTHS
from ..progress import Progress, progress_bar
from ..vanilla.batches import Batch, without_labels
from ..vanilla.family import Layout
from .moments import counted, kind_of, watching

FACTORS = "factors of the norms"
"""What it is shown as."""

PART = 4
"""One in so many calibration batches is used: there is one number to fit for each norm."""

ENOUGH = 1024
"""Positions that suffice for that; no further batch is used."""


def fit_scales(
    model: nn.Module,
    layout: Layout,
    batches: Sequence[Batch],
    vectors: torch.Tensor,
    *,
    centred: bool,
    progress: Progress | None = None,
) -> torch.Tensor:
    """
    The factors that bring the norms of a narrow stream closest to those of the dense one.

    With m what a narrow norm makes of the narrow model's stream, and n what the dense norm makes of the dense model's,
    in the kept directions U, it is `<n U, m> / <m, m>` over positions: the lost part of the stream makes m too small,
    the error that earlier layers have gathered makes it too large. Each forward pass uses the factors of its batch, so
    every norm is fitted with those before it in place; the sums over batches give the result.

    Args:
        model, layout, batches, progress: as in `collect_moments`; no gradients are taken.
        vectors: (features, units), the basis.
        centred: whether LayerNorms read the stream.

    Returns:
        (widths, sites), by `WIDTHS`; 1 where all units are kept.

    References:
        Ashkboos et al., "SliceGPT" (2024), which leaves the norms as they are.
    """
    device, dtype = kind_of(model)
    vectors = vectors.to(device=device, dtype=dtype)
    directions = vectors - vectors.mean(0) if centred else vectors
    products, squares = torch.zeros(2, len(WIDTHS), len(layout.norms), device=device, dtype=dtype)
    positions = 0
    for batch in progress_bar(progress, iterable=batches[::PART], desc=FACTORS, leave=False):
        if positions >= ENOUGH:
            break
        inputs = without_labels(batch, device)
        dense: list[torch.Tensor] = []

        def keep(
            site: int, norm: nn.Module, x: torch.Tensor, output: torch.Tensor, dense: list[torch.Tensor] = dense
        ) -> torch.Tensor:
            dense.append(plain_norm(norm, x))
            return output

        with torch.no_grad(), watching(model, layout, keep):
            model(**inputs)
        positions += len(counted(dense[0], inputs))
        for place, part in enumerate(WIDTHS[:-1]):
            kept = directions[:, : max(1, round(part * vectors.shape[1]))]

            def narrow(
                site: int,
                norm: nn.Module,
                x: torch.Tensor,
                output: torch.Tensor,
                dense: list[torch.Tensor] = dense,
                inputs: Batch = inputs,
                place: int = place,
                kept: torch.Tensor = kept,
            ) -> torch.Tensor:
                units = kept.to(x.dtype)
                mine, wanted = narrow_norm(norm, x, units), dense[site] @ units
                flat, target = counted(mine, inputs).to(dtype), counted(wanted, inputs).to(dtype)
                product, square = (flat * target).sum(), flat.square().sum()
                products[place, site] += product
                squares[place, site] += square
                y = ((mine * (product / square).to(mine)) @ units.T) * norm.get_parameter("weight")
                bias = norm._parameters.get("bias")
                return y if bias is None else y + bias

            with torch.no_grad(), watching(model, layout, narrow):
                model(**inputs)
    squares[-1] = products[-1] = 1
    return products / squares
