"""Models and processors out of folders or off the Hub."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..errors import InvalidRegimeError, UnsupportedModelError
from ..sources import check_source
from .skeleton import auto_class_of, skeleton_of

logger = logging.getLogger(__name__)


def checked_device(device: str) -> str:
    """
    The device, before any work on it.

    Raises:
        InvalidRegimeError: if torch does not know it, or sees no CUDA device where one is named.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InvalidRegimeError(f"device {device!r} is none: {error}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidRegimeError(f"device {device!r} was asked for, and torch sees no CUDA device here; use 'cpu'")
    return device


def load_skeleton(model: str) -> PreTrainedModel:
    """
    A model without weights, on the meta device: enough to time its shapes.

    Args:
        model: a folder or model id with a `config.json`.

    Raises:
        FileNotFoundError: if there is no such model.
        UnsupportedModelError: if the folder holds none, or the config is none that transformers knows, or does not say
            which class it is for.
    """
    check_source(model)
    try:
        config = AutoConfig.from_pretrained(model)
    except ValueError as error:  # of no known kind
        raise UnsupportedModelError(f"{model} is no model that transformers knows: {error}") from error
    return skeleton_of(config)


def load_model(model: str, device: str = "cpu", dtype: str = "auto") -> PreTrainedModel:
    """
    A dense model by its Auto class.

    Args:
        model: a folder or model id.
        device: where to.
        dtype: of the weights; `"auto"` is what they were saved in.
    """
    return auto_class_of(load_skeleton(model)).from_pretrained(model, dtype=dtype, device_map=device).eval()


def processor_of(model: str | os.PathLike[str]) -> Any:
    """A model's tokenizer or image processor, if it has one."""
    try:
        return AutoProcessor.from_pretrained(os.fspath(model))
    except (OSError, ValueError) as error:
        logger.info("no tokenizer or image processor is saved: %s", error)
        return None
