"""What narrow norms are multiplied by: one number for each norm and width, by least squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..gates.bases import WIDTHS
from ..gates.hidden import narrow_norm, plain_norm, widened
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
    fits = NormFits(vectors, *kind_of(model), sites=len(layout.norms), centred=centred)
    positions = 0
    for batch in progress_bar(progress, iterable=batches[::PART], desc=FACTORS, leave=False):
        if positions >= ENOUGH:
            break
        inputs = without_labels(batch, fits.device)
        dense: list[torch.Tensor] = []

        def keep(
            site: int, norm: nn.Module, x: torch.Tensor, output: torch.Tensor, dense: list[torch.Tensor] = dense
        ) -> torch.Tensor:
            dense.append(plain_norm(norm, x))
            return output

        with torch.no_grad(), watching(model, layout, keep):
            model(**inputs)
        positions += len(counted(dense[0], inputs))
        for place in range(len(fits)):

            def narrow(
                site: int,
                norm: nn.Module,
                x: torch.Tensor,
                output: torch.Tensor,
                dense: list[torch.Tensor] = dense,
                inputs: Batch = inputs,
                place: int = place,
            ) -> torch.Tensor:
                return fits.narrow(place, site, norm, x, dense[site], inputs)

            with torch.no_grad(), watching(model, layout, narrow):
                model(**inputs)
    return fits.scales


class NormFits:
    """
    The sums of `fit_scales`, and the narrow norms of its models.

    Args:
        vectors: (features, units), the basis.
        device, dtype: of the sums.
        sites: norms that read the stream.
        centred: whether LayerNorms read it.
    """

    def __init__(
        self, vectors: torch.Tensor, device: torch.device, dtype: torch.dtype, *, sites: int, centred: bool
    ) -> None:
        self.device, self._dtype = device, dtype
        vectors = vectors.to(device=device, dtype=dtype)
        directions = vectors - vectors.mean(0) if centred else vectors
        units = vectors.shape[1]
        self._kept = [directions[:, : max(1, round(part * units))] for part in WIDTHS[:-1]]
        self._products, self._squares = torch.zeros(2, len(WIDTHS), sites, device=device, dtype=dtype)

    def __len__(self) -> int:
        """Widths that are fitted."""
        return len(self._kept)

    def narrow(
        self, place: int, site: int, norm: nn.Module, x: torch.Tensor, dense: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """
        The output of a narrow norm, with the factor that is best for a batch; the sums are added to.

        Args:
            place: of the width in `WIDTHS`.
            site: of the norm.
            norm: the dense one, with its weights.
            x: (..., features), the narrow model's stream.
            dense: like x, what the norm makes of the dense model's stream before its weight.
            batch: for its padding.
        """
        units = self._kept[place].to(x.dtype)
        mine, wanted = narrow_norm(norm, x, units), dense @ units
        flat, target = counted(mine, batch).to(self._dtype), counted(wanted, batch).to(self._dtype)
        product, square = (flat * target).sum(), flat.square().sum()
        self._products[place, site] += product
        self._squares[place, site] += square
        return widened(norm, mine * (product / square).to(mine), units)

    @property
    def scales(self) -> torch.Tensor:
        """(widths, sites), by `WIDTHS`."""
        self._squares[-1] = self._products[-1] = 1
        return self._products / self._squares
