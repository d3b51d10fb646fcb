"""Mixed batches: another adapter for every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .base import GateAdapter


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


def _pass_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}
