"""Models and calibration data from files, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from .errors import HawAdaError
from .export.skeleton import auto_class_of, skeleton_of


def load_skeleton(model: str) -> PreTrainedModel:
    """
    A model without weights, on the meta device: enough to time its shapes.

    Args:
        model: a folder or model id with a `config.json`.

    Raises:
        UnsupportedModelError: if the config does not say which class it is for.
    """
    return skeleton_of(AutoConfig.from_pretrained(model))


def load_model(model: str, device: str = "cpu") -> PreTrainedModel:
    """
    A dense model by its Auto class, in the dtype it was saved in.

    Args:
        model: a folder or model id.
        device: where to.
    """
    return auto_class_of(load_skeleton(model)).from_pretrained(model, dtype="auto", device_map=device).eval()


def load_examples(path: Path, model: str, *, length: int, count: int) -> dict[str, torch.Tensor]:
    """
    Calibration examples.

    Args:
        path: a `.safetensors` file of input tensors, each (examples, ...) under the name of a forward argument; or a
            `.txt` file, which the model's tokenizer cuts into windows.
        model: where the tokenizer is.
        length: tokens per window.
        count: examples at most.

    Returns:
        Keyword arguments of the forward pass, each (examples, ...).

    Raises:
        HawAdaError: on another kind of file, or one with too little in it.
    """
    if path.suffix == ".safetensors":
        tensors = {name: tensor[:count] for name, tensor in load_file(path).items()}
        if len({len(tensor) for tensor in tensors.values()}) != 1:
            raise HawAdaError(f"the tensors in {path} must have the same number of rows, one per example")
        return tensors
    if path.suffix == ".txt":
        tokens = AutoTokenizer.from_pretrained(model)(path.read_text(encoding="utf-8"))["input_ids"]
        windows = min(count, len(tokens) // length)
        if windows == 0:
            raise HawAdaError(f"{path} holds {len(tokens)} tokens, less than one window of {length}")
        return {"input_ids": torch.tensor(tokens[: windows * length]).reshape(windows, length)}
    raise HawAdaError(f"calibration data must be a .safetensors or a .txt file, got {path}")


def batches_of(examples: Mapping[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """The examples in batches of at most `size`."""
    parts = {name: tensor.split(size) for name, tensor in examples.items()}
    return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]
