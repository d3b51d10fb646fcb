"""What commands share: calibration examples, the gates that are judged by them, and how hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..config import HawAdaConfig
from ..errors import HawAdaError
from ..latency.clock import Clock
from ..latency.effort import Effort
from ..latency.external import ExternalClock
from ..recipes.examples import batches_from, load_examples_of
from ..recipes.settings import DataSource
from .data import fields_of_data

EXAMPLES, BATCH, SEQ_LEN = 64, 8, 256
"""Calibration examples at most, examples per batch, and tokens per example of a text, if nothing else is said."""

BATCH_TOKENS = BATCH * SEQ_LEN
"""Of longer texts so many tokens per batch, or one text: importance keeps a batch's activations."""

Batches = list[dict[str, torch.Tensor]]


def read_batches(data: str, model: str, *, seq_len: int | None, examples: int | None) -> Batches:
    """
    Batches of keyword arguments of the forward pass: the first examples of the data.

    Args:
        data: a file, a folder, or a dataset: see `fields_of_data`.
        model: folder or id: its tokenizer or processor is used, and it says what can be taken.
        seq_len: tokens per example of a text.
        examples: at most.

    Raises:
        HawAdaError: on what cannot be read, or is not for this model.
    """
    rows, length = _rows(data, model, seq_len)
    return batches_from(rows, examples or EXAMPLES, _batch(length))


def read_last_batches(
    data: str, model: str, *, seq_len: int | None, examples: int | None, used: dict[str, Any] | None
) -> Batches:
    """
    Batches of the last examples of the data, none of which a slim model was calibrated on.

    Args:
        data: as for `read_batches`.
        model: as there.
        seq_len: as there.
        examples: at most.
        used: the calibration data in the slim model's report, if it is known.

    Raises:
        HawAdaError: on what cannot be read; if all of it was calibrated on.
    """
    from torch.utils.data import Subset

    from ..shipping.facts import calibration_facts

    rows, length = _rows(data, model, seq_len)
    first = 0
    if used is not None and used["examples"] <= len(rows):
        begin = calibration_facts(batches_from(rows, used["examples"], _batch(length)))
        first = used["examples"] if begin["sha256"] == used["sha256"] else 0
    count = min(examples or EXAMPLES, len(rows) - first)
    if count < 1:
        raise HawAdaError(f"the slim model was calibrated on all {len(rows)} examples of {data}: give other data")
    return batches_from(Subset(rows, range(len(rows) - count, len(rows))), count, _batch(length))


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


def effort_of(level: str, *, fresh: bool = False, clock_command: str | None = None) -> Effort:
    """How hard is measured and searched, at `"quick"`, `"normal"` or `"thorough"`, and by which program if any."""
    makes: dict[str, Callable[..., Effort]] = {"quick": Effort.quick, "normal": Effort, "thorough": Effort.thorough}
    clock = Clock() if clock_command is None else ExternalClock(clock_command)
    return makes[level](fresh=fresh, clock=clock)


def _rows(data: str, model: str, seq_len: int | None) -> tuple[Any, int]:
    length = seq_len or SEQ_LEN
    return load_examples_of(DataSource(**fields_of_data(data), seq_len=length), model), length


def _batch(length: int) -> int:
    return max(1, min(BATCH, BATCH_TOKENS // length))
