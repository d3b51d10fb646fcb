"""What commands share: calibration examples from a file, the gates that are judged by them, and how hard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..config import HawAdaConfig
from ..latency.effort import Effort
from ..recipes.readers import batches_of, load_examples

EXAMPLES, BATCH, SEQ_LEN = 64, 8, 256
"""Calibration examples at most, examples per batch, and tokens per example of a text, if nothing else is said."""

BATCH_TOKENS = BATCH * SEQ_LEN
"""Of longer texts so many tokens per batch, or one text: importance keeps a batch's activations."""


def read_batches(
    path: Path, model: str, *, seq_len: int | None, examples: int | None
) -> list[dict[str, torch.Tensor]]:
    """
    Batches of keyword arguments of the forward pass.

    Args:
        path: of the file.
        model: folder or id: its tokenizer is used, and it says what can be taken.
        seq_len: tokens per example of a text.
        examples: at most.

    Raises:
        HawAdaError: on what cannot be read, or is not for this model.
    """
    length = seq_len or SEQ_LEN
    found = load_examples(path, model, length=length, count=examples or EXAMPLES)
    return batches_of(found, max(1, min(BATCH, BATCH_TOKENS // length)))


def gates_of(base: PreTrainedModel, adapter: str | None, *, hidden: bool) -> PeftModel:
    """
    The model with trained gates, or with fresh ones.

    Args:
        base: the dense model.
        adapter: folder or id of trained gates.
        hidden: whether fresh gates are put on the channels of the residual stream, too.
    """
    if adapter is not None:
        return PeftModel.from_pretrained(base, adapter)
    kinds = ("heads", "ffn", "layers", *(["hidden"] if hidden else []))
    return get_peft_model(base, HawAdaConfig(gates=kinds))


def effort_of(level: str, *, fresh: bool) -> Effort:
    """How hard is measured and searched, at `"quick"`, `"normal"` or `"thorough"`."""
    makes: dict[str, Callable[..., Effort]] = {"quick": Effort.quick, "normal": Effort, "thorough": Effort.thorough}
    return makes[level](fresh=fresh)
