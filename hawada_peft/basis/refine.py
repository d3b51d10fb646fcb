"""A basis of the residual stream in the loss's own metric: one rotation, good at every width at once."""

from __future__ import annotations

import torch

from ..progress import Progress, progress_bar

STEPS = 60
RATE = 2e-3

REFINING = "refining the basis"
"""What it is shown as."""


def principal_directions(moments: torch.Tensor) -> torch.Tensor:
    """
    The eigenvectors of the sum of second moments, each scaled to trace 1, in descending order of their values.

    Args:
        moments: (groups, features, features), symmetric.

    Returns:
        (features, features), float64 if the moments are, on their device; each column's largest entry is positive.
    """
    vectors = torch.linalg.eigh(pooled(moments)).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def pooled(moments: torch.Tensor) -> torch.Tensor:
    """The sum of second moments of (groups, features, features), each scaled to trace 1."""
    traces = moments.diagonal(dim1=1, dim2=2).sum(1)
    return (moments / traces.clamp(min=torch.finfo(moments.dtype).tiny)[:, None, None]).sum(0)


def refined(
    start: torch.Tensor,
    stream: torch.Tensor,
    gradient: torch.Tensor,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    progress: Progress | None = None,
) -> torch.Tensor:
    """
    Rotate a basis so that cutting its last directions costs the loss least.

    With D the projection onto what is cut, C the second moments of the stream and G those of the loss's gradients, the
    squared error of the loss is about `tr(G D C D) / tr(G C)`, summed over the norms (sites). In the coordinates of
    the basis, `A = Q^T G Q`, `B = Q^T C Q`, it is the sum of `A * B` over the cut rows and columns, so one product
    gives it at every width: the mean of its logarithm over widths from a quarter of the features up is minimised, by
    Adam over Q = QR of a free matrix.

    Args:
        start: (features, units), orthonormal columns.
        stream, gradient: (groups, features, features).
        steps, rate: of Adam.

    Returns:
        (features, units), spanning what the start spans; the start itself if there are no gradients.
    """
    stream, gradient = (start.T @ each @ start for each in (stream, gradient))
    scale = (stream * gradient).sum((1, 2))
    useful = scale > 0
    if not useful.any():
        return start
    gradient = gradient[useful] / scale[useful][:, None, None]
    stream = stream[useful]
    units = start.shape[1]
    first, last = max(1, units // 4), max(2, units - max(1, units // 16))
    free = torch.eye(units, dtype=start.dtype, device=start.device).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate)
    for _ in progress_bar(progress, iterable=range(steps), desc=REFINING, leave=False):
        with torch.enable_grad():
            rotation = _orthogonal(free)
        optimizer.zero_grad()
        rotation.backward(gradient=_slope(rotation.detach(), gradient, stream, first, last))
        optimizer.step()
    return start @ _orthogonal(free.detach())


def _slope(
    rotation: torch.Tensor, gradient: torch.Tensor, stream: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """
    The gradient of `refined`'s loss by the rotation, in closed form: (units, units).

    With P the sum of A * B, entry (i, j) of it is lost at every width up to min(i, j). With W the loss's derivative by
    P, which depends on that alone, it is `2 (G Q (W * B) + C Q (W * A))`: six products for each group of norms.
    """
    turned = [moments @ rotation for moments in (gradient, stream)]
    metric, moment = (rotation.T @ each for each in turned)
    product = (metric * moment).sum(0)
    cost = product.triu().sum(1) + product.tril(-1).sum(0)
    at_width = cost.flip(0).cumsum(0).flip(0)  # what is lost if that many units stay
    weight = torch.zeros_like(cost)
    floor = torch.finfo(cost.dtype).tiny
    weight[first:last] = (at_width[first:last] > floor) / (at_width[first:last].clamp(min=floor) * (last - first))
    weight = weight.cumsum(0)
    places = torch.arange(len(weight), device=weight.device)
    spread = weight[torch.minimum(places[:, None], places)]
    slopes = turned[0] @ (spread * moment) + turned[1] @ (spread * metric)
    return 2 * slopes.sum(0)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The Q of its QR decomposition with a positive diagonal of R: a continuous function of the matrix."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal().sign()
