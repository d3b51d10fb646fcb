"""An optimizer for short recoveries: Muon on the matrices of the layers, AdamW on everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import HawAdaError

RATE = 2.0
"""The rate of Muon, in rates of AdamW: what measured best in recoveries of some hundred steps."""


class MuonAdamW(torch.optim.Optimizer):
    """
    Two optimizers as one: `torch.optim.Muon` for matrices between layers, `torch.optim.AdamW` for the rest.

    Muon replaces a matrix's momentum by the nearest matrix with orthonormal rows, so that all directions move alike;
    its update is scaled to the size that AdamW's usually has (`match_rms_adamw`), so that one rate serves both.

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is Scalable
        for LLM Training" (2025), for the scale.

    Args:
        matrices: parameters of two axes, of layers; embeddings and heads do not belong here.
        others: all other parameters.
        lr (`float`): of AdamW, above 0.
        muon_rate (`float`): of Muon, in parts of `lr`, above 0.
        betas (`tuple[float, float]`): of AdamW.
        weight_decay (`float`): of both, not below 0.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        muon_rate: float = RATE,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__([*matrices, *others], {"lr": lr})
        muon = torch.optim.Muon(
            matrices, lr=lr * muon_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay)
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of both, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


class MuonFactory:
    """
    What `Trainer(optimizer_cls_and_kwargs=(MuonFactory, {"lr": ...}))` makes a `MuonAdamW` of a model by.

    Matrices are the weights of two axes inside of the model's list of layers.
    """

    def __call__(self, model: nn.Module, **options: Any) -> MuonAdamW:
        """
        The optimizer of a model's trainable parameters.

        Raises:
            HawAdaError: if no matrix of a layer is trained.
        """
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        inside = {id(p) for stack in stacks for p in stack.parameters() if p.ndim == 2}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if id(p) in inside]
        if not matrices:
            raise HawAdaError("no matrix of a layer requires gradients: Muon has nothing to train")
        return MuonAdamW(matrices, [p for p in trained if id(p) not in inside], **options)
