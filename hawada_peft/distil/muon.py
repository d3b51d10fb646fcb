"""The optimizer of recoveries: Muon for the matrices of the layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, HawAdaError
from .sharded import shards

RATE = 2.0
"""The rate of Muon, in rates of AdamW: what measured best in recoveries of some hundred steps."""

OPTIMIZERS = ("auto", "muon", "args")
"""How a training can be told its optimizer."""

_ADAMW = ("adamw_torch", "adamw_torch_fused")


class MuonAdamW(torch.optim.Optimizer):
    """
    Two optimizers as one: `torch.optim.Muon` for the matrices between layers, `torch.optim.AdamW` for the rest.

    Muon replaces the momentum of a matrix by the nearest matrix with orthonormal rows or columns, so that all
    directions move alike; its update is scaled to the root mean square that AdamW's usually has
    (`match_rms_adamw`), so that one learning rate serves both. State, groups and checkpoints are those of one ordinary
    optimizer.

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is Scalable
        for LLM Training" (2025), for the scale.

    Args:
        params: parameters or groups of them, as for any optimizer.
        lr (`float`): of AdamW, not below 0.
        matrices: those of the parameters that Muon takes, all of two axes; `matrices_of` finds them.
        muon_rate (`float`): the learning rate of Muon, in parts of `lr`.
        betas, eps: of AdamW.
        weight_decay (`float`): of both, decoupled, where a group does not say otherwise.

    Raises:
        HawAdaError: if this version of torch has no Muon, or a matrix has not two axes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        matrices: Collection[nn.Parameter],
        muon_rate: float = RATE,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        problems = [] if has_muon() else [_MISSING]
        problems += [f"Muon takes matrices, got a tensor of {tuple(p.shape)}" for p in matrices if p.ndim != 2]
        if problems:
            raise HawAdaError("\n".join(problems))
        given = list(params)
        groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
        chosen = {id(matrix) for matrix in matrices}
        own: dict[bool, dict[str, Any]] = {
            False: {"betas": betas, "eps": eps},
            True: {"adjust_lr_fn": "match_rms_adamw"},
        }
        parts: list[dict[str, Any]] = []
        for muon in (False, True):  # AdamW first: the first group's rate is the one that is logged
            for group in groups:
                members = [p for p in group["params"] if (id(p) in chosen) == muon]
                rate = group.get("lr", lr) * (muon_rate if muon else 1.0)
                parts += [{**own[muon], **group, "params": members, "lr": rate, "muon": muon}] if members else []
        super().__init__(parts, {"lr": lr, "weight_decay": weight_decay, "muon": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; what is added goes to AdamW unless it says `"muon": True`."""
        super().add_param_group(param_group)
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Both optimizers work on this one's groups and state, so that there is one of each."""
        kinds = ((torch.optim.AdamW, False), (torch.optim.Muon, True))
        self.parts: list[torch.optim.Optimizer] = []
        for kind, muon in kinds:
            groups = [group for group in self.param_groups if group["muon"] == muon]
            if groups:
                part = kind(groups)
                part.param_groups, part.state = groups, self.state
                self.parts.append(part)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        The inverse of `state_dict`.

        Raises:
            CheckpointError: if it is of another optimizer.
        """
        found = [group.get("muon") for group in state_dict["param_groups"]]
        if found != [group["muon"] for group in self.param_groups]:
            raise CheckpointError(
                "the checkpoint's optimizer is not Muon on the same matrices: resume with the `optimizer` that the "
                "training began with, or start anew from its weights"
            )
        super().load_state_dict(state_dict)


_MISSING = (
    f"torch {torch.__version__} has no torch.optim.Muon, which came with 2.9: install a newer torch, or pass "
    'optimizer="args" for AdamW'
)


def has_muon() -> bool:
    """Whether this version of torch has Muon."""
    return "Muon" in vars(torch.optim)


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """
    The weights that Muon is for: trained, of linear modules within the model's layers. Embeddings, heads, norms,
    convolutions, and whatever shares its weight with an embedding do not belong to them.

    Args:
        model: its layers are the members of its `nn.ModuleList`s.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    found: dict[int, nn.Parameter] = {}
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        for module in stack.modules():
            if isinstance(module, nn.Linear | Conv1D):
                weight = cast(nn.Parameter, module.weight)
                if weight.requires_grad and weight.ndim == 2 and id(weight) not in embeddings:
                    found[id(weight)] = weight
    return list(found.values())


def optimizer_problems(optimizer: Any, args: TrainingArguments | None = None) -> list[str]:
    """
    What is wrong with a choice of optimizer, one line each.

    Args:
        optimizer: one of `OPTIMIZERS`.
        args: of the training, if they are known.
    """
    if optimizer not in OPTIMIZERS:
        return [f"optimizer must be one of {list(OPTIMIZERS)}, got {optimizer!r}"]
    if optimizer != "muon":
        return []
    problems = [] if has_muon() else [_MISSING]
    if args is not None and _sharded(args):
        problems.append("Muon needs whole matrices, which FSDP and DeepSpeed do not leave: pass optimizer='args'")
    return problems


def optimizer_of(
    optimizer: str, model: nn.Module, args: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """
    What `Trainer` takes as `optimizer_cls_and_kwargs`; None for what `args` say.

    Args:
        optimizer: `"muon"`; `"args"`; or `"auto"`, which is Muon where all weights of a model are trained, torch has
            it, nothing is sharded, and `args.optim` is AdamW. Measured was no other case.
        model: what is trained.
        args: of the training.

    Raises:
        HawAdaError: with `"muon"`, if no matrix of a layer is trained.
    """
    if optimizer == "args":
        return None
    matrices = matrices_of(model)
    if optimizer == "auto":
        usual = args.optim in _ADAMW and not _sharded(args) and not isinstance(model, PeftModel)
        if not (usual and has_muon() and matrices):
            return None
    if not matrices:
        raise HawAdaError("no matrix of a layer requires gradients: Muon has nothing to train; pass optimizer='args'")
    betas = args.adam_beta1, args.adam_beta2
    return MuonAdamW, {"lr": args.learning_rate, "matrices": matrices, "betas": betas, "eps": args.adam_epsilon}


def _sharded(args: TrainingArguments) -> bool:
    return shards(args) or bool(args.deepspeed)
