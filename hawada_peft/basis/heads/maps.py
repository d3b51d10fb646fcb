"""From second moments to narrower heads: new weights of an attention's projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .moments import HeadMoments, by_head

CLAMP = 1e-10
"""Of the largest eigenvalue of second moments: smaller ones count as that, so that their roots have inverses."""

RIDGE = 1e-6
"""Of the mean square of what heads give, in the joint least squares."""


Affine = tuple[torch.Tensor, torch.Tensor | None]
"""A weight, and a bias if there is one."""


def narrow_attention(moments: HeadMoments, layer: int, attention: Sequence[Affine], size: int) -> list[Affine]:
    """
    The projections of an attention whose heads are narrower, in float64 on the CPU; exact at the full size.

    Scores `q k^T` of rank `size`: the truncated SVD of `Rq Rk`, with Rq and Rk the roots of the second moments. The
    class divides scores by the root of the head's size, which the queries make up for. Values: of each head the
    principal directions of what it adds to the residual stream; then the projection behind the heads is fitted to
    what all of them add, by least squares, and its bias takes up what the means lose.

    Args:
        moments: of all layers.
        layer: which of them.
        attention: the projections to queries, keys and values, (features, stream) and (features,) as of a linear
            module, and the one behind the heads, (stream, features) and (stream,).
        size: features of the new heads.

    Returns:
        The same with fewer features.

    References:
        Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression" (2024).
    """
    query, key, value, out = attention
    (root_q, inverse_q), (root_k, inverse_k) = (_roots(_wide(each[layer])) for each in (moments.query, moments.key))
    heads, old, _ = root_q.shape
    left, scores, right = torch.linalg.svd(root_q @ root_k)
    balance = scores[:, None, :size].sqrt()
    to_query = (size / old) ** 0.5 * inverse_q @ (left[..., :size] * balance)
    to_key = inverse_k @ (right.mT[..., :size] * balance)

    dense, mean, second = _wide(out[0]).T, _wide(moments.mean[layer]), _wide(moments.output[layer])
    if out[1] is None:  # nothing takes up the means
        second = second + mean[:, None] * mean
    root_v, inverse_v = _roots(by_head(second, heads))
    added = root_v @ dense.unflatten(0, (heads, old))
    directions = torch.linalg.eigh(added @ added.mT).eigenvectors.flip(-1)[..., :size]
    to_value = inverse_v @ directions

    back, maps = (directions.mT @ added).flatten(0, 1), torch.block_diag(*to_value)
    narrow = maps.T @ second
    gram = narrow @ maps
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    back = back + torch.linalg.solve(gram, narrow @ (dense - maps @ back))
    bias = None if out[1] is None else _wide(out[1]) + mean @ (dense - maps @ back)
    return [_mapped(to_query, query), _mapped(to_key, key), _mapped(to_value, value), (back.T, bias)]


def _mapped(maps: torch.Tensor, projection: Affine) -> Affine:
    """A projection to heads, followed by a map of each head's features, (heads, size, new size)."""
    weight, bias = projection

    def through(rows: torch.Tensor) -> torch.Tensor:
        return (maps.mT @ _wide(rows).reshape(len(maps), maps.shape[1], -1)).flatten(0, 1)

    return through(weight), None if bias is None else through(bias)[:, 0]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def _roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric roots of second moments, (..., n, n), and their inverses; of none at all the identity."""
    values, vectors = torch.linalg.eigh(moments)
    top = values[..., -1:]
    roots = torch.where(top > 0, torch.maximum(values, CLAMP * top), 1).sqrt()
    return (vectors * roots[..., None, :]) @ vectors.mT, (vectors / roots[..., None, :]) @ vectors.mT
