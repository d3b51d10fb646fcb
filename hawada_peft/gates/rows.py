"""Batches whose rows differ: another adapter for every row, or a theta of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .adapter import GateAdapter
from .kinds import SigmoidGate


@contextmanager
def adapter_per_row(model: nn.Module, adapter_names: Sequence[str], *, beams: int = 1) -> Iterator[None]:
    """
    Within the context every adapter applies, row by row, the gates of the adapter named for the row.

    Args:
        model: a transformers model, or any module tree.
        adapter_names: one per row of the batch; `"__base__"` for none.
        beams: rows per input in beam search. An encoder does not see them repeated.
    """
    names = list(adapter_names)
    repeated = [name for name in names for _ in range(beams)]
    encoder = getattr(model, "get_encoder", lambda: None)() if beams > 1 else None
    inside = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_names, adapter_names=names if module in inside else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, (GateAdapter, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def theta_per_row(gates: Iterable[SigmoidGate], rows: int) -> Iterator[list[torch.Tensor]]:
    """
    Within the context every row of a batch has a theta of its own, of the value that the gate's theta has.

    The gradient of a sum of losses, one of each row, by a row's thetas is then that of the row's loss by theta.

    Args:
        gates: those that get them; others stay as they are.
        rows: of the batch. They are taken to be the first axis of what the gates scale; a forward pass in which that
            axis has another length raises `RowsError`.

    Yields:
        For each gate (rows, ...), with the axes of theta behind, to be differentiated by.
    """
    gates = list(gates)
    try:
        thetas = []
        for gate in gates:
            theta = gate.theta.detach()
            gate.row_thetas = theta.expand(rows, *theta.shape).clone().requires_grad_()
            thetas.append(gate.row_thetas)
        yield thetas
    finally:
        for gate in gates:
            gate.row_thetas = None


def _pass_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}
