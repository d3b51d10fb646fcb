"""Examples out of files: text, arrays, safetensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ..errors import HawAdaError
from ..vanilla.loading import load_skeleton


def load_examples(path: Path, model: str, *, length: int, count: int | None = None) -> dict[str, torch.Tensor]:
    """
    Examples from a file.

    Args:
        path: a `.safetensors` file of input tensors, each (examples, ...) under the name of a forward argument; a
            `.txt` file, which the model's tokenizer cuts into windows; or a `.npy` file of tokens, one stream or
            (examples, tokens), or of pixel values (images, channels, height, width).
        model: where the tokenizer is.
        length: tokens per window of a stream.
        count: examples at most; all if left out.

    Returns:
        Keyword arguments of the forward pass, each (examples, ...).

    Raises:
        HawAdaError: on another kind of file, or one with too little in it.
    """
    readers = {".safetensors": _read_safetensors, ".txt": _read_text, ".npy": _read_array}
    if path.suffix not in readers:
        raise HawAdaError(f"data must be a file of {sorted(readers)}, got {path}")
    return {name: tensor[:count] for name, tensor in readers[path.suffix](path, model, length).items()}


def windows_of(tokens: torch.Tensor, length: int, source: object) -> torch.Tensor:
    """
    A stream cut into windows, without its end: (windows, length).

    Args:
        tokens: (tokens,).
        length: of a window.
        source: for the message.

    Raises:
        HawAdaError: if there is not one window in it.
    """
    windows = len(tokens) // length
    if windows == 0:
        raise HawAdaError(f"{source} holds {len(tokens)} tokens, less than one window of {length}")
    return tokens[: windows * length].reshape(windows, length).long()


def _read_safetensors(path: Path, model: str, length: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(path)
    if len({len(tensor) for tensor in tensors.values()}) != 1:
        raise HawAdaError(f"the tensors in {path} must have the same number of rows, one per example")
    cls = type(load_skeleton(model))
    allowed = inspect.signature(cls.forward).parameters
    if unknown := sorted(set(tensors) - set(allowed)):
        raise HawAdaError(f"{path} holds {unknown}, which {cls.__name__} does not take; it takes {list(allowed)[1:]}")
    return tensors


def _read_text(path: Path, model: str, length: int) -> dict[str, torch.Tensor]:
    tokens = AutoTokenizer.from_pretrained(model)(path.read_text(encoding="utf-8"))["input_ids"]
    return {"input_ids": windows_of(torch.tensor(tokens), length, path)}


def _read_array(path: Path, model: str, length: int) -> dict[str, torch.Tensor]:
    array = np.load(path, allow_pickle=False)
    whole = np.issubdtype(array.dtype, np.integer)
    if whole and array.ndim in (1, 2):
        tokens = torch.from_numpy(array.astype(np.int64))
        return {"input_ids": windows_of(tokens, length, path) if array.ndim == 1 else tokens}
    if not whole and array.ndim == 4:
        return {"pixel_values": torch.from_numpy(array.astype(np.float32))}
    raise HawAdaError(
        f"{path} must hold whole numbers of one or two dimensions (tokens), or floats of four (pixel values), got "
        f"{array.dtype} of shape {array.shape}"
    )


def batches_of(examples: Mapping[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """The examples in batches of at most `size`."""
    parts = {name: tensor.split(size) for name, tensor in examples.items()}
    return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]
