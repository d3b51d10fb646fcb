"""Models and processors out of folders or off the Hub. A folder, or what looks like one, is never asked of the Hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..errors import InvalidRegimeError, UnsupportedModelError
from .skeleton import auto_class_of, skeleton_of

logger = logging.getLogger(__name__)

MODEL_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
KINDS = {MODEL_FILE: "a model", ADAPTER_FILE: "an adapter"}
"""Which file makes a folder what it is."""

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""Of the HTTP library that the Hub's client is built on: not the same one in all versions."""

TIMEOUT = 10.0
"""Seconds that the Hub may take to say whether it has a name."""


def check_source(name: str | os.PathLike[str], file: str = MODEL_FILE) -> None:
    """
    Check that a model or an adapter is there, before a library looks for it: those ask the Hub for whatever is no
    folder of theirs, again and again, and report that it could not be reached.

    Args:
        name: a folder, or an id on the Hub.
        file: what must be in it: `MODEL_FILE` or `ADAPTER_FILE`.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a model on the Hub, or in its cache.
        UnsupportedModelError: if the folder holds something else.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / file).is_file():
            return
        (other,) = KINDS.keys() - {file}
        swapped = f", but {KINDS[other]}: name the dense model first, then its adapter"
        found = swapped if (folder / other).is_file() else f": there is no {file} in it"
        raise UnsupportedModelError(f"the folder {name} does not hold {KINDS[file]}{found}")
    missing = f"there is no folder {name}"
    if folder.is_file():
        raise FileNotFoundError(f"{missing}: it is a file, and {KINDS[file]} is a folder")
    if folder.is_absolute() or name.startswith((".", "~")) or (len(folder.parts) > 1 and folder.parent.is_dir()):
        raise FileNotFoundError(missing)
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return
        HfApi().model_info(name, timeout=TIMEOUT)
    except (HFValidationError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{missing}, and no model {name} that the Hub or its cache could give: {why}"
        ) from None


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
