"""FLAP: what fluctuates least goes, wherever it is, and its mean becomes a bias."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hawada_peft.adapters.huggingface import locate

from .criteria import Moments, best, left, observe
from .peer import Peer, Prepared, Work
from .surgery import ROUNDING, Keep, add_bias, all_heads, attention, ffn, keep_units


def prepare(work: Work) -> Prepared:
    """Mean and variance of what the output projections read, in the dense model."""
    model = work.load()
    layout = locate(model)
    layers = range(layout.dense.sizes()["num_hidden_layers"])
    blocks = [(attention(model, layout, layer), ffn(model, layout, layer)) for layer in layers]
    moments = [(Moments(), Moments()) for _ in layers]
    flat = [(block.output, seen.see) for pair, sums in zip(blocks, moments, strict=True)
            for block, seen in zip(pair, sums, strict=True)]  # fmt: skip
    observe(model, work.batches, dict(flat))
    groups = layout.dense.sizes()["num_key_value_heads"]
    # WIFV: the variance of a feature times the squared norm of the weights that read it.
    wifv = [
        [seen.variance * block.output.weight.double().square().sum(0) for block, seen in zip(pair, sums, strict=True)]
        for pair, sums in zip(blocks, moments, strict=True)
    ]
    heads = torch.stack([_standard(scores.square()).reshape(groups, -1).mean(1) for scores, _ in wifv])
    channels = torch.stack([_standard(scores) for _, scores in wifv])
    price = blocks[0][0].parameters() / groups / (blocks[0][1].parameters() / channels.shape[1])
    prices = torch.cat([torch.full((heads.numel(),), price), torch.ones(channels.numel())]).double()
    order = torch.argsort(torch.cat([heads.flatten(), channels.flatten()]), descending=True, stable=True).cpu()
    spent = torch.cumsum(prices[order], 0)
    means = [(attention_seen.mean, ffn_seen.mean) for attention_seen, ffn_seen in moments]

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        left(1, amount)  # checks the amount
        stays = torch.zeros(len(order), dtype=torch.bool)
        stays[order[: 1 + int((spent - spent[-1] * (1 - amount)).abs().argmin())]] = True
        groups_left = stays[: heads.numel()].reshape(heads.shape).sum(1).tolist()
        channels_left = stays[heads.numel() :].reshape(channels.shape).sum(1).tolist()
        found = locate(dense)
        keeps = {}
        for layer in layers:
            width = left(channels.shape[1], 1 - channels_left[layer] / channels.shape[1], ROUNDING)
            kept = best(heads[layer], max(1, groups_left[layer]))
            keeps[layer] = Keep(all_heads(found, kept), best(channels[layer], width))
            features = torch.tensor(keeps[layer].heads)[:, None] * found.head_dim + torch.arange(found.head_dim)
            add_bias(*_missing(attention(dense, found, layer).output, means[layer][0], features.flatten()))
            add_bias(*_missing(ffn(dense, found, layer).output, means[layer][1], torch.tensor(keeps[layer].channels)))
        keep_units(dense, keeps)
        return dense

    return Prepared(cut)


def _standard(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean()) / scores.std().clamp(min=torch.finfo(scores.dtype).tiny)


def _missing(linear: torch.nn.Linear, mean: torch.Tensor, kept: torch.Tensor) -> tuple[torch.nn.Linear, torch.Tensor]:
    """The linear map, and what the features that go add to its output on average."""
    gone = mean.clone()
    gone[kept.to(gone.device)] = 0
    return linear, linear.weight.detach().double() @ gone


FLAP = Peer(
    name="FLAP",
    source="An et al., AAAI 2024, arXiv:2312.11983; CASIA-LMC-Lab/FLAP with its defaults WIFV and AL-AM",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted="Heads are cut as whole KV groups, as layers may not keep unlike groups; a group weighs by its parameters "
    "against an FFN channel's (the code's constant 512/3 is that for heads of 128 without groups). The amount is the "
    "share of these parameters, as in the code. Variances are exact, the code's skip the first example. At least "
    "one group and 8 channels stay in a layer, FFN sizes are rounded to multiples of 8. On a ViT each head is a "
    "group, and the bias is added to the one there is: the paper has language models only.",
)
