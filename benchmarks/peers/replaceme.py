"""ReplaceMe: a run of layers goes, and a linear map in the FFN before it takes their place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hawada_peft import Plan, slim
from hawada_peft.refit.cosine import refine_cosine
from hawada_peft.vanilla.family import Layout, locate

from .criteria import left, observe, unlabelled
from .peer import Batch, Peer, Prepared, Work


def turned(model: PreTrainedModel, batches: list[Batch]) -> torch.Tensor:
    """The mean of 1 - cos between the stream before a layer (row) and behind another (column), over tokens."""
    layout = locate(model)
    layers = list(model.get_submodule(layout.stack).children())
    total, tokens = torch.zeros(len(layers), len(layers), dtype=torch.float64), 0
    for batch in batches:
        ends: list[tuple[torch.Tensor, torch.Tensor]] = []
        observe(model, [batch], [(layer, lambda x, y, ends=ends: ends.append((x, y))) for layer in layers])
        tokens += ends[0][0][..., 0].numel()
        for first, (before, _) in enumerate(ends):
            for last, (_, after) in enumerate(ends[first:], first):
                cosines = functional.cosine_similarity(before.float(), after.float(), dim=-1)
                total[first, last] += (1 - cosines).double().sum().cpu()
    return total / tokens


def prepare(work: Work) -> Prepared:
    """How far each run of layers turns the dense model's stream."""
    distances = turned(work.load(), work.batches)
    batches = [unlabelled(batch) for batch in work.batches]

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        total = len(distances)
        length = total - left(total, amount)
        if not length:
            return dense
        # the first layer stays: the map goes into the FFN before the run
        start = min(range(1, total - length + 1), key=lambda first: float(distances[first, first + length - 1]))
        plan = without(locate(dense), range(start, start + length))
        small = slim(dense, plan)
        refine_cosine(dense, small, plan, batches)
        return small

    return Prepared(cut)


def without(layout: Layout, gone: range) -> Plan:
    """The plan that drops a run of layers and nothing else."""
    full = Plan.keep_all(layout.dense)
    kept = tuple(layer for layer in full.layers if layer not in gone)
    return replace(full, layers=kept, heads=full.heads[: len(kept)], channels=full.channels[: len(kept)])


REPLACEME = Peer(
    name="ReplaceMe",
    source="Shopkhoev et al., NeurIPS 2025, arXiv:2505.02819; github.com/mts-ai/ReplaceMe",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted="The map by the cosine objective (Adam, rate 1e-4, 10 epochs, from the identity), the paper's better one, "
    "by this package's `refine_cosine`. Calibrated on the examples that everybody has. The first layer stays, as the "
    "map needs an FFN before the run. On a ViT over all tokens, as on a language model.",
)
