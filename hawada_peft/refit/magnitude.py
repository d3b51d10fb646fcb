"""The magnitude that dropped layers gave to the residual stream, made up for in the layers that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..processes import Reduce, all_reduced
from ..vanilla.batches import Batch, position_mask
from ..vanilla.family import locate
from .layerwise import Stream, residual_gains
from .projections import as_projection


def stream_magnitudes(dense: PreTrainedModel, batches: Sequence[Batch], reduce: Reduce = all_reduced) -> list[float]:
    """
    The mean norm of the residual stream before each layer and after the last one.

    Args:
        dense: vanilla, with a family row.
        batches: keyword arguments of its forward pass; positions where `attention_mask` is 0 do not count.
        reduce: sums over ranks.

    Returns:
        One number per layer, and one more.

    Raises:
        UnsupportedModelError: if a layer does not add its blocks to the stream as they are (a norm in between): then
            the scale of the stream cannot be moved into their weights.
    """
    layout, training = locate(dense), dense.training
    dense.eval()
    found = []
    try:
        with torch.no_grad():
            stream = Stream.start(dense, layout, batches)
            for layer in range(layout.dense.sizes()["num_hidden_layers"]):
                if residual_gains(stream, layer) is None:
                    raise UnsupportedModelError(
                        f"layer {layer} of {type(dense).__name__} does not add the outputs of its projections to the "
                        "residual stream as they are, so their scale says nothing there"
                    )
                found.append(_mean_norm(stream, batches, reduce))
                stream.advance(layer)
            found.append(_mean_norm(stream, batches, reduce))
    finally:
        dense.train(training)
    return found


def _mean_norm(stream: Stream, batches: Sequence[Batch], reduce: Reduce) -> float:
    sums = torch.zeros(2, dtype=torch.float64)
    for hidden, batch in zip(stream.hidden, batches, strict=True):
        norms = hidden.float().norm(dim=-1)
        mask = position_mask(batch, norms.shape)
        norms = norms.flatten() if mask is None else norms[mask]
        sums += torch.tensor([float(norms.double().sum()), float(len(norms))], dtype=torch.float64)
    total, count = reduce(sums.to(stream.hidden[0].device)).tolist()
    return float(total / count)


@torch.no_grad()
def compensate_magnitude(slim: PreTrainedModel, plan: Plan, magnitudes: Sequence[float]) -> tuple[float, ...]:
    """
    Give the residual stream of a slim model the magnitude that it lost with the layers that went.

    Where layers went, the stream ought to be larger by alpha, the ratio of the dense stream's mean norms after and
    before them. What reads the stream is a norm without regard for scale, so that the stream times alpha and all that
    is added later over alpha compute the same: the output projections (and biases) behind the gap are divided by it.

    Args:
        slim: what `slim(dense, plan)` gave; its output projections change in place.
        plan: the one it was made with.
        magnitudes: of the dense model, as `stream_magnitudes` gives them.

    Returns:
        What the projections of each slim layer were divided by.

    Raises:
        UnsupportedModelError: if a projection is not linear.

    References:
        "Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with Magnitude Compensation" (2025),
        arXiv:2507.18212.
    """
    layout, factor, before, factors = locate(slim), 1.0, -1, []
    for index, layer in enumerate(plan.layers):
        if layer > before + 1:
            factor *= magnitudes[layer] / magnitudes[before + 1]
        before = layer
        factors.append(factor)
        for name in (layout.attention_out(index), layout.ffn_out(index)):
            module = as_projection(slim.get_submodule(name), name)
            module.weight.div_(factor)
            if module.bias is not None:
                module.bias.div_(factor)
    return tuple(factors)
