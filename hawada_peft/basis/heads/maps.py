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
    into_q, into_k, into_v, from_v, mean = attention_maps(moments, layer, out)
    heads, old, _ = into_q.shape
    to_query = (size / old) ** 0.5 * into_q[..., :size]
    to_key, to_value = into_k.mT[..., :size], into_v[..., :size]
    dense, second = _wide(out[0]).T, _second(moments, layer, out)
    back = (from_v[:, :size] @ dense.unflatten(0, (heads, old))).flatten(0, 1)
    maps = torch.block_diag(*to_value)
    narrow = maps.T @ second
    gram = narrow @ maps
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    back = back + torch.linalg.solve(gram, narrow @ (dense - maps @ back))
    bias = None if out[1] is None else _wide(out[1]) + mean @ (dense - maps @ back)
    return [_mapped(to_query, query), _mapped(to_key, key), _mapped(to_value, value), (back.T, bias)]


def attention_maps(moments: HeadMoments, layer: int, out: Affine) -> tuple[torch.Tensor, ...]:
    """
    Bases inside of the heads of a layer, in float64 on the CPU: of scores those of `narrow_attention`, of values the
    principal directions of what each head adds to the residual stream. Of how many directions of them are kept, and
    of other heads, they do not depend.

    Args:
        moments: of all layers.
        layer: which of them.
        out: the projection behind the heads.

    Returns:
        As in `HeadBasis`, of one layer: of queries, keys, values, what takes these back, and the mean of what heads
        give; zeros if no bias takes up what it loses.
    """
    (root_q, inverse_q), (root_k, inverse_k) = (_roots(_wide(each[layer])) for each in (moments.query, moments.key))
    heads, old, _ = root_q.shape
    left, scores, right = torch.linalg.svd(root_q @ root_k)
    balance = scores[:, None].sqrt()
    query, key = inverse_q @ (left * balance), inverse_k @ (right.mT * balance)
    root_v, inverse_v = _roots(by_head(_second(moments, layer, out), heads))
    added = root_v @ _wide(out[0]).T.unflatten(0, (heads, old))
    directions = torch.linalg.eigh(added @ added.mT).eigenvectors.flip(-1)
    mean = _wide(moments.mean[layer])
    mean = torch.zeros_like(mean) if out[1] is None else mean
    return query, key.mT, inverse_v @ directions, directions.mT @ root_v, mean


def _second(moments: HeadMoments, layer: int, out: Affine) -> torch.Tensor:
    """Second moments of what heads give: about the mean, where a bias takes up what that loses."""
    mean, second = _wide(moments.mean[layer]), _wide(moments.output[layer])
    return second + mean[:, None] * mean if out[1] is None else second


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
