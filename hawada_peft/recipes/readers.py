"""Examples out of files: text, arrays, safetensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import HawAdaError
from ..vanilla.loading import load_skeleton


def load_examples(path: Path, model: str, *, length: int, count: int | None = None) -> dict[str, torch.Tensor]:
    """
    Examples from a file.

    Args:
        path: a `.safetensors` file of input tensors, each (examples, ...) under the name of a forward argument; a
            `.txt` or `.md` file, which the model's tokenizer cuts into windows; a `.jsonl` file with a `text` or with
            chat `messages` in every line, which go through the tokenizer's chat template; or a `.npy` file of tokens,
            one stream or (examples, tokens), or of pixel values (images, channels, height, width).
        model: a folder or id of the model that takes them: its tokenizer is used.
        length: tokens per window of a stream.
        count: examples at most; all if left out.

    Returns:
        Keyword arguments of the forward pass, each (examples, ...).

    Raises:
        FileNotFoundError: if there is no such file, or no such model.
        HawAdaError: on another kind of file, one with too little in it, or examples that the model cannot take.
    """
    readers = {
        ".safetensors": _read_safetensors,
        ".txt": _read_text,
        ".md": _read_text,
        ".jsonl": _read_lines,
        ".npy": _read_array,
    }
    if path.suffix not in readers:
        raise HawAdaError(f"data must be a file of {sorted(readers)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    skeleton = load_skeleton(model)
    examples = {name: tensor[:count] for name, tensor in readers[path.suffix](path, skeleton, model, length).items()}
    check_examples(examples, skeleton, path)
    return examples


def check_examples(examples: Mapping[str, torch.Tensor], model: PreTrainedModel, source: object) -> None:
    """
    Check that examples can be what a model takes, as far as that can be told without running it.

    Args:
        examples: (examples, ...) by the names of forward arguments.
        model: may be without weights.
        source: for the message.

    Raises:
        HawAdaError: with every problem.
    """
    cls, config = type(model), model.config
    allowed = list(inspect.signature(cls.forward).parameters)[1:]
    problems = []
    if unknown := sorted(set(examples) - set(allowed)):
        problems.append(f"holds {unknown}, which {cls.__name__} does not take; it takes {allowed}")
    elif model.main_input_name not in examples:
        problems.append(f"holds {sorted(examples)} and no {model.main_input_name}, which {cls.__name__} needs")
    for name, tensor in examples.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f"{name} holds NaN or infinite values")
        elif not tensor.numel():
            problems.append(f"{name} is empty: {tuple(tensor.shape)}")
    tokens, pixels = examples.get("input_ids"), examples.get("pixel_values")
    if tokens is not None and tokens.numel():
        problems += _token_problems(tokens, examples, model)
    if pixels is not None and pixels.ndim == 4 and pixels.shape[1] != getattr(config, "num_channels", pixels.shape[1]):
        problems.append(f"pixel_values has {pixels.shape[1]} channels, {cls.__name__} takes {config.num_channels}")
    if problems:
        raise HawAdaError("\n".join(f"{source}: {problem}" for problem in problems))


def _token_problems(
    tokens: torch.Tensor, examples: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> Iterator[str]:
    if tokens.ndim != 2 or tokens.is_floating_point():
        yield f"input_ids must be whole numbers, (examples, tokens), got {tokens.dtype} of {tuple(tokens.shape)}"
        return
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        yield f"input_ids holds {low} to {high}, and the model's vocabulary has {vocabulary} tokens"
    if model.can_generate() and tokens.shape[1] < 2:
        yield "input_ids holds one token per example, after which nothing comes: at least 2 are needed"
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens.shape[1] > limit:
        yield f"input_ids holds {tokens.shape[1]} tokens per example, and the model has {limit} positions"
    mask = examples.get("attention_mask")
    if mask is not None and mask.shape != tokens.shape:
        yield f"attention_mask of {tuple(mask.shape)} is not of the shape of input_ids, {tuple(tokens.shape)}"


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


def _read_safetensors(path: Path, skeleton: PreTrainedModel, model: str, length: int) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise HawAdaError(f"{path} is no safetensors file: {error}") from None
    if not tensors or len({tensor.shape[:1] for tensor in tensors.values()} - {()}) != 1:
        sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise HawAdaError(f"the tensors in {path} must have the same number of rows, one per example, got {sizes}")
    return tensors


def _read_text(path: Path, skeleton: PreTrainedModel, model: str, length: int) -> dict[str, torch.Tensor]:
    _check_takes_text(path, skeleton)
    tokenizer = tokenizer_of(model)
    return {"input_ids": windows_of(torch.tensor(tokenizer(_text_of(path))["input_ids"]), length, path)}


def _read_lines(path: Path, skeleton: PreTrainedModel, model: str, length: int) -> dict[str, torch.Tensor]:
    """JSON lines: texts or chats, one after the other with an end of text between them, cut into windows."""
    _check_takes_text(path, skeleton)
    tokenizer = tokenizer_of(model)
    stream: list[int] = []
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if line.strip():
            stream += tokens_of(_row_of(line, f"{path}, line {number}"), tokenizer, f"{path}, line {number}")
    return {"input_ids": windows_of(torch.tensor(stream), length, path)}


def tokens_of(row: Mapping[str, Any], tokenizer: Any, source: object, column: str | None = None) -> list[int]:
    """
    The tokens of a text, or of a chat as the tokenizer's template writes it; a text with an end of text after it.

    Args:
        row: with a `"text"`, or `"messages"` as chat templates take them.
        tokenizer: the model's.
        source: for the message.
        column: of the text or the messages, instead of those names.

    Raises:
        HawAdaError: if there is neither, or the tokenizer has no template for a chat.
    """
    name = column or next((each for each in ("messages", "text") if each in row), None)
    if name is None or name not in row:
        raise HawAdaError(f"{source} has neither a text nor messages, but {sorted(row)}")
    content = row[name]
    if isinstance(content, str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [*tokenizer(content)["input_ids"], *end]
    if not isinstance(content, list) or not all(isinstance(message, Mapping) for message in content):
        raise HawAdaError(f"{source} is no chat: messages must be a list of objects with role and content")
    if tokenizer.chat_template is None:
        raise HawAdaError(f"{source} is a chat, and the tokenizer has no chat template: give plain text")
    try:
        chat = tokenizer.apply_chat_template(content, tokenize=False)
    except (TypeError, TemplateError) as error:
        raise HawAdaError(f"{source} is no chat that the tokenizer's template takes: {error}") from None
    found: list[int] = tokenizer(chat, add_special_tokens=False)["input_ids"]
    return found


def _row_of(line: str, source: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise HawAdaError(f"{source} is no JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise HawAdaError(f"{source} must be an object with a text or messages, got a {type(row).__name__}")
    return row


def _check_takes_text(path: Path, skeleton: PreTrainedModel) -> None:
    if skeleton.main_input_name != "input_ids":
        raise HawAdaError(
            f"{path} is text, and {type(skeleton).__name__} takes {skeleton.main_input_name}: give those, as "
            ".safetensors or .npy"
        )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HawAdaError(f"{path} is no text in UTF-8: {error}") from None


def tokenizer_of(model: str) -> Any:
    """
    The tokenizer of a model of text.

    Raises:
        HawAdaError: if there is none beside it.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().partition("\n")[0]
        raise HawAdaError(f"{model} has no tokenizer that could be loaded, which text needs: {why}") from None


def _read_array(path: Path, skeleton: PreTrainedModel, model: str, length: int) -> dict[str, torch.Tensor]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise HawAdaError(f"{path} is no .npy file of numbers: {error}") from None
    whole = np.issubdtype(array.dtype, np.integer)
    if whole and array.ndim in (1, 2):
        tokens = torch.from_numpy(array.astype(np.int64))
        return {"input_ids": windows_of(tokens, length, path) if array.ndim == 1 else tokens}
    if np.issubdtype(array.dtype, np.floating) and array.ndim == 4:
        return {"pixel_values": torch.from_numpy(array.astype(np.float32))}
    raise HawAdaError(
        f"{path} must hold whole numbers of one or two dimensions (tokens), or floats of four (pixel values), got "
        f"{array.dtype} of shape {array.shape}"
    )
