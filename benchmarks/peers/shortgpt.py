"""ShortGPT: the layers that turn the residual stream least go."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hawada_peft.vanilla.family import locate

from .criteria import best, left, observe
from .peer import Peer, Prepared, Work
from .surgery import keep_layers


class _Influence:
    """Block Influence: 1 - cos(input, output), summed over tokens."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)

    def see(self, x: torch.Tensor, y: torch.Tensor) -> None:
        cosines = functional.cosine_similarity(x.double(), y.double(), dim=-1)
        self.total = self.total.to(x.device) + (1 - cosines).sum()


def prepare(work: Work) -> Prepared:
    """The Block Influence of each layer of the dense model."""
    model = work.load()
    layout = locate(model)
    layers = list(model.get_submodule(layout.stack).children())
    influences = [_Influence() for _ in layers]
    observe(model, work.batches, [(layer, found.see) for layer, found in zip(layers, influences, strict=True)])
    scores = torch.stack([found.total for found in influences])

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        keep_layers(dense, best(scores, left(len(scores), amount)))
        return dense

    return Prepared(cut)


SHORTGPT = Peer(
    name="ShortGPT",
    source="Men et al., Findings of ACL 2025, arXiv:2403.03853",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted="None on a language model. On a ViT over all tokens, the class token among them: the paper has no ViT.",
)
