"""Bases in which plans cut: of the residual stream, whose gate then acts on directions, and inside of heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .kinds import GateStart, HiddenGate


def helmert(size: int, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """
    An orthonormal basis of the vectors whose entries sum to zero.

    Column j is nonzero in its first j + 2 rows and constant in those before the last of them. So the first k rows hold
    the basis of size k in their first k - 1 columns, and a constant in every other column.

    Returns:
        (size, size - 1).

    References:
        Helmert (1876); Lancaster, "The Helmert Matrices" (1965).
    """
    j = torch.arange(1, size, dtype=dtype)
    rows = torch.arange(size, dtype=dtype)[:, None]
    columns = (rows < j).to(dtype) - j * (rows == j).to(dtype)
    return columns / (j * (j + 1)).sqrt()


WIDTHS = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
"""Kept parts of the units for which the factors of the norms are known; straight lines lie in between."""


def scale_at(scales: torch.Tensor, part: float) -> torch.Tensor:
    """
    The factors of the norms when a part of the units is kept.

    Args:
        scales: (widths, sites), by `WIDTHS`.
        part: in (0, 1].

    Returns:
        (sites,).
    """
    part = max(part, WIDTHS[0])
    above = next(place for place, width in enumerate(WIDTHS) if width >= part)
    below = max(0, above - 1)
    share = 1.0 if above == below else (part - WIDTHS[below]) / (WIDTHS[above] - WIDTHS[below])
    return (1 - share) * scales[below] + share * scales[above]


class BasisGate(HiddenGate):
    """
    The gate on directions of the residual stream, one for the whole model.

    Until `set_basis` it is the standard basis; after LayerNorms, which do not see the mean, that of `helmert`.

    Args:
        num_features (`int`): features of the stream.
        sites (`int`): norms that read it.
        centred (`bool`): whether these are LayerNorms. The first unit is the mean then, and always stays.
        group_size, dim, start, relative: as in `HiddenGate`.
    """

    is_factor = False  # of directions
    in_basis = True

    def __init__(
        self,
        num_features: int,
        group_size: int = 1,
        *,
        sites: int,
        centred: bool,
        dim: int = -1,
        start: GateStart | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__(num_features, group_size, dim=dim, start=start, relative=relative)
        self.centred = centred
        mean = torch.full((num_features, 1), num_features**-0.5)
        standard = torch.cat([mean, helmert(num_features, dtype=torch.float32)], 1) if centred else None
        self.vectors: torch.Tensor
        """(features, units): orthonormal columns."""
        self.scales: torch.Tensor
        """(widths, sites): the factor of each norm when only a part of the units is kept, by `WIDTHS`."""
        self.marks: torch.Tensor
        """(sites,): by which the base model it was found on is known again; zeros if it was never set."""
        # Buffers, so that they are saved with the adapter and never trained.
        self.register_buffer("vectors", torch.eye(num_features) if standard is None else standard)
        self.register_buffer("scales", torch.ones(len(WIDTHS), sites))
        self.register_buffer("marks", torch.zeros(sites))

    def set_basis(self, vectors: torch.Tensor, scales: torch.Tensor, marks: torch.Tensor) -> None:
        """Take the values of a basis, each of the shape given above."""
        with torch.no_grad():
            for mine, given in ((self.vectors, vectors), (self.scales, scales), (self.marks, marks)):
                mine.copy_(given)

    def directions(self, index: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The vectors of some units (all if None): (features, units)."""
        found = self.vectors if index is None else self.vectors.index_select(1, index.to(self.vectors.device))
        found = found.to(dtype)
        return found - found.mean(0) if self.centred else found  # exactly, also where the vectors are rounded

    def ranked(self, scores: torch.Tensor, *, trained: bool = True) -> torch.Tensor:
        """
        As in `HiddenGate`. The mean that LayerNorms take off has no score and comes first. Scores that are not the
        gates' values say how much the units count, and the basis in which order.
        """
        if not trained:
            return scores.sort(descending=True).values
        if not self.centred:
            return scores
        return torch.cat([scores.max().reshape(1), scores[1:]])

    def _apply(self, fn: Any, recurse: bool = True) -> BasisGate:
        # A basis in half precision would not be orthonormal: it follows the model to its device, not to its dtype.
        with no_narrower(self, ("vectors", "scales", "marks")):
            super()._apply(fn, recurse)
        return self

    def soft(self) -> torch.Tensor:
        """The factor of every unit, whatever a plan closes: (units,)."""
        kept, self.kept = self.kept, None
        try:
            return self.features(hard=True).detach().clone()
        finally:
            self.kept = kept

    def scale(self, site: int, kept: int) -> torch.Tensor:
        """A norm's factor when so many units are kept: ()."""
        return scale_at(self.scales, kept / len(self.vectors))[site]


class HeadMap(nn.Module):
    """
    Takes the features of heads x to `(x - mean) into back + mean`, with as many columns of `into` and rows of `back`
    as a plan keeps. All of them together are the identity, and then nothing is done.

    There is nothing soft, and nothing is trained: a plan says how many features stay in every head.

    Args:
        heads (`int`): side by side in the features.
        size (`int`): features of each.
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.into: torch.Tensor
        """(heads, features, directions), the most important direction first."""
        self.back: torch.Tensor
        """(heads, directions, features): its inverse."""
        self.mean: torch.Tensor
        """(heads * features,)."""
        # Buffers, so that they are saved with the adapter and never trained.
        self.register_buffer("into", torch.eye(size).repeat(heads, 1, 1))
        self.register_buffer("back", torch.eye(size).repeat(heads, 1, 1))
        self.register_buffer("mean", torch.zeros(heads * size))
        self.kept: int | None = None

    @property
    def found(self) -> bool:
        """Whether it was ever set."""
        return not torch.equal(self.into, torch.eye(self.into.shape[1]).to(self.into).expand_as(self.into))

    def set(self, into: torch.Tensor, back: torch.Tensor, mean: torch.Tensor) -> None:
        """Take values of the shapes given above."""
        with torch.no_grad():
            for mine, given in ((self.into, into), (self.back, back), (self.mean, mean)):
                mine.copy_(given)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        What is left of the features of heads.

        Args:
            x: (..., heads * features).
        """
        if self.kept is None:
            return x
        wide = torch.promote_types(self.into.dtype, torch.float32)
        through = (self.into[..., : self.kept].to(wide) @ self.back[:, : self.kept].to(wide)).to(x)
        heads, size, _ = self.into.shape
        mean = self.mean.to(x)
        narrow = torch.einsum("...hi,hij->...hj", (x - mean).unflatten(-1, (heads, size)), through)
        return narrow.flatten(-2) + mean

    def _apply(self, fn: Any, recurse: bool = True) -> HeadMap:
        with no_narrower(self, ("into", "back", "mean")):
            super()._apply(fn, recurse)
        return self


@contextmanager
def no_narrower(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it buffers that are moved and cast follow to another device, and to no dtype of lower precision."""
    before = {name: getattr(module, name) for name in names}
    yield
    for name, tensor in before.items():
        moved = getattr(module, name)
        if torch.promote_types(moved.dtype, tensor.dtype) != moved.dtype:
            setattr(module, name, tensor.to(moved.device))
