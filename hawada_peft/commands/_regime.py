"""Under which conditions is timed: what `measure` and `plan` share."""

from __future__ import annotations

from typing import TypedDict

import torch

from ..errors import InvalidRegimeError


class RegimeOptions(TypedDict, total=False):
    """
    The conditions of a latency, as in `LatencyBudget`; what is left out is the model's, or the default there.

    Args:
        mode (`str`, *optional*): `"forward"`, `"prefill"` or `"decode"`.
        batch_size (`int`): rows per call.
        seq_len (`int`, *optional*): tokens per row.
        image_size (`int`, *optional*): pixels along each side.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`.
        backend (`str`): `"eager"`, `"compile"` or `"cuda_graph"`.
        device (`str`): `"cpu"`, `"cuda"`, `"cuda:1"`, ...
    """

    mode: str | None
    batch_size: int
    seq_len: int | None
    image_size: int | None
    dtype: str | None
    backend: str
    device: str


DEVICE = "cpu"
"""Where is timed if nothing else is said."""


def checked_device(device: str | None) -> str:
    """
    The device, before any work on it; `DEVICE` if none is named.

    Raises:
        InvalidRegimeError: if torch does not know it, or sees no CUDA device where one is named.
    """
    try:
        kind = torch.device(device or DEVICE).type
    except RuntimeError as error:
        raise InvalidRegimeError(f"device {device!r} is none: {error}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidRegimeError(
            f"device {device!r} was asked for, and torch sees no CUDA device here; use {DEVICE!r}"
        )
    return device or DEVICE
