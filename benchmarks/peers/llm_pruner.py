"""LLM-Pruner: structures by the first-order Taylor term of their elements."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hawada_peft.vanilla.family import locate

from .criteria import uniform
from .peer import Peer, Prepared, Work
from .surgery import Block, attention, ffn, keep_units


def pruned_layers(total: int) -> range:
    """The layers that are cut: of 32 the first 4 and the last 2 stay whole, so here an eighth and a sixteenth."""
    first, last = max(1, round(total / 8)), max(1, round(total / 16))
    return range(first, total - last) if total > first + last else range(total)


def _scores(block: Block, units: int) -> torch.Tensor:
    """The sum over a unit's elements of |weight times gradient|."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, dim in block.weights():
        assert weight.grad is not None
        salience = (weight.detach() * weight.grad).abs().sum(1 - dim, dtype=torch.float64)
        total = total.to(salience.device) + salience.reshape(units, -1).sum(1)
    return total


def prepare(work: Work) -> Prepared:
    """The gradient of the loss over all calibration batches."""
    model = work.load().requires_grad_(False)
    layout = locate(model)
    sizes = layout.dense.sizes()
    layers = pruned_layers(sizes["num_hidden_layers"])
    attentions = {layer: attention(model, layout, layer) for layer in layers}
    ffns = {layer: ffn(model, layout, layer) for layer in layers}
    for block in (*attentions.values(), *ffns.values()):
        for weight, _ in block.weights():
            weight.requires_grad_(True)
    for batch in work.batches:
        model(**batch).loss.backward()
    groups = {layer: _scores(block, sizes["num_key_value_heads"]) for layer, block in attentions.items()}
    channels = {layer: _scores(block, sizes["intermediate_size"]) for layer, block in ffns.items()}

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        keep_units(dense, uniform(locate(dense), amount, groups, channels))
        return dense

    return Prepared(cut)


LLM_PRUNER = Peer(
    name="LLM-Pruner",
    source="Ma et al., NeurIPS 2023, arXiv:2305.11627; horseee/LLM-Pruner: block-wise, Taylor `param_first`, groups "
    "reduced by sum, KV groups as in its llama3.py",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted="Of 32 layers its examples leave the first 4 and the last 2 whole; here the first eighth and the last "
    "sixteenth, at least one each. A query head's elements count for its own KV group (the code's folding counts them "
    "for another). FFN sizes are rounded to multiples of 8. On a ViT with the classification loss, each head a group: "
    "the paper has language models only. Its LoRA tuning is replaced by the recovery that all contestants get.",
)
