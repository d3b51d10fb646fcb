"""A checkpoint folder: its model without weights, and its tensors read one at a time from the safetensors files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import UnsupportedModelError
from ..sources import check_source
from ..vanilla.skeleton import skeleton_of
from .names import CARD_NAME, REPORT_NAME
from .pieces import Piece, stored_pieces
from .shards import FLOATS, Stored, read_all, read_header, read_rows

PART = 2**20
"""
Bytes of a tensor that are in memory at a time. Larger parts are slower: their memory is given back to the system and
asked for again every time.
"""

WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf")
"""Ends the names of files with weights, in this or other formats."""

PICKLED = "load it with `from_pretrained`, and save it again with `save_pretrained`, which writes safetensors"
GGUF = (
    "load it with `from_pretrained(folder, gguf_file=...)`, which makes plain weights of it, and slim it in memory: "
    "`merge_and_unload` and `save_slim`"
)

OF_THE_DENSE_MODEL = {
    "config.json",
    "generation_config.json",
    CARD_NAME,
    REPORT_NAME,
    "params.json",
    "trainer_state.json",
}
"""Files that are written anew, or would say something untrue beside a slim model."""

TEMPLATES = "additional_chat_templates"
"""The one folder that tokenizers and processors write."""


class Checkpoint:
    """
    A dense model's folder of safetensors files, as `from_pretrained(dtype="auto")` understands it.

    Args:
        base: a folder, or the id of a model on the Hub (or in its local cache).

    Attributes:
        folder (`Path`): where the files are.
        skeleton (`PreTrainedModel`): what `from_pretrained` makes of it, on the meta device, without weights.

    Raises:
        OSError: if there is no such folder or model.
        UnsupportedModelError: if the folder holds no model, or its weights are not in safetensors files, are
            quantised, or are not exactly those of the model's class under the names that transformers gives them.
    """

    def __init__(self, base: str | os.PathLike[str]) -> None:
        self.folder = _folder_of(base)
        weight_files(self.folder)  # refuses other formats before transformers reads anything
        self.skeleton = _load_skeleton(self.folder)
        self._apart: dict[str, list[tuple[Piece, Stored]]] = {}
        self._places = self._find()

    def _find(self) -> dict[str, Stored]:
        """The place of every parameter and persistent buffer, by its name in the model; tied ones share one."""
        headers = stored_tensors(self.folder)
        pieces = stored_pieces(self.skeleton, tied=True)
        stored = {piece.name: key for key, piece in pieces.items() if piece.entry is None}
        places: dict[str, Stored] = {}
        absent = []
        for key, piece in pieces.items():
            if piece.entry is not None and key in headers:
                self._apart.setdefault(piece.name, []).append((piece, headers[key]))
            elif piece.entry is not None:
                absent.append(key)
        for name, parts in self._apart.items():
            places[name] = parts[0][1]
            parts.sort(key=lambda part: (part[0].entry, part[0].start))
        for names in _aliases(self.skeleton):
            if any(name in self._apart for name in names):
                continue
            keys = [stored[name] for name in names if stored.get(name) in headers]
            if not keys:
                absent += [stored.get(name, name) for name in names]
                continue
            places |= dict.fromkeys(names, headers[keys[0]])
            for key in keys[1:]:
                if not _equal(headers[keys[0]], headers[key]):
                    raise UnsupportedModelError(
                        f"{self.folder} holds different weights {keys}, which its config ties: set "
                        "`tie_word_embeddings` to false in its config.json if they are meant to differ"
                    )
        if absent:
            raise UnsupportedModelError(
                f"{self.folder} does not store {absent[:3]}{' ...' if absent[3:] else ''}, as transformers "
                f"{transformers.__version__} names the weights of {type(self.skeleton).__name__}: load it with "
                "`from_pretrained`, and save it again with `save_pretrained`"
            )
        floating = {name for name, tensor in self.skeleton.state_dict().items() if tensor.is_floating_point()}
        found = {place.dtype for name, place in places.items() if name in floating}
        if found - FLOATS:
            raise UnsupportedModelError(
                f"{self.folder} stores weights as {sorted(found - FLOATS)}; slimming needs one of {sorted(FLOATS)}: "
                "use the unquantised model"
            )
        return places

    def parts(self, name: str, rows: torch.Tensor | None = None, size: int | None = PART) -> Iterator[torch.Tensor]:
        """
        A tensor by its name in the model, in the dtype that the model has it in, part by part.

        Args:
            name: its name in the model.
            rows: entries along the first dimension to read, in rising order; all if left out.
            size: bytes per part at most, or those of one row if that is more; `None` for one part.

        Returns:
            Parts of (some rows, ...); of a tensor without dimensions one of (1,).
        """
        like, stored = self.skeleton.get_parameter_or_buffer(name), self._places[name]
        total = len(like) if like.ndim else 1
        rows = torch.arange(total) if rows is None else rows
        count = max(1, len(rows) if size is None else size * total // max(1, like.nbytes))
        for some in rows.split(count):
            found = self._stacked(name, some.tolist()) if name in self._apart else read_rows(stored, some)
            yield found.to(like.dtype)

    def whole(self, name: str) -> torch.Tensor:
        """A whole tensor by its name in the model, in the dtype that the model has it in; at least one dimension."""
        return torch.cat(list(self.parts(name)))

    def _stacked(self, name: str, entries: list[int]) -> torch.Tensor:
        """Some entries of a tensor that the files hold in pieces."""
        pieces = {entry: [part for part in self._apart[name] if part[0].entry == entry] for entry in entries}
        return torch.stack([torch.cat([read_all(stored) for _, stored in pieces[entry]]) for entry in entries])

    def copy_companions(self, folder: Path) -> None:
        """Copy what is neither weights nor config: tokenizer, processor, chat templates, licence."""
        for file in sorted(self.folder.iterdir()):
            hidden, weights = file.name.startswith("."), file.name.endswith(WEIGHTS)
            if file.name == TEMPLATES and file.is_dir():
                shutil.copytree(file, folder / TEMPLATES)
            elif file.is_file() and not hidden and not weights and file.name not in OF_THE_DENSE_MODEL:
                shutil.copyfile(file, folder / file.name)


def weight_files(folder: Path) -> list[Path]:
    """
    A folder's safetensors files, as transformers looks for them: a whole one first, else those of the index.

    Raises:
        UnsupportedModelError: if there are none.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        other = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS))
        gguf = any(name.endswith(".gguf") for name in other)
        raise UnsupportedModelError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"
            f"{f', only {other}' if other else ''}: {GGUF if gguf else PICKLED}"
        )
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the headers of a folder's safetensors files list, by key."""
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        found |= read_header(file)
    return found


def _folder_of(base: str | os.PathLike[str]) -> Path:
    files = {path.name for path in Path(base).iterdir()} if Path(base).is_dir() else set()
    if "config.json" not in files and any(name.endswith(".gguf") for name in files):
        raise UnsupportedModelError(f"{base} holds a GGUF file: {GGUF}")
    check_source(base)
    if Path(base).is_dir():
        return Path(base)
    other = [f"*{ending}" for ending in WEIGHTS if ending not in (".safetensors", ".index.json")]
    try:
        return Path(snapshot_download(os.fspath(base), ignore_patterns=[*other, "original/*"]))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(f"{base} is not a folder, nor a model that could be fetched: {error}") from error


def _load_skeleton(folder: Path) -> PreTrainedModel:
    """`from_pretrained` on the meta device, which looks at names and shapes and reads no weights."""
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{folder} is quantised, and gates fold into plain weights: use the dense model")
    cls: Any = type(skeleton_of(config))
    try:
        model, info = cls.from_pretrained(
            folder, dtype="auto", device_map="meta", use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, SafetensorError) as error:
        raise UnsupportedModelError(f"{folder} does not load as {cls.__name__}: {error}") from error
    wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    if wrong:
        raise UnsupportedModelError(f"{folder} does not hold exactly the weights of {cls.__name__}: {wrong}")
    model.tie_weights()
    return model


def _aliases(model: PreTrainedModel) -> list[list[str]]:
    """The names in the state dict, those of one tied tensor together."""
    groups: dict[int, list[str]] = {}
    for name in model.state_dict():
        groups.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
    return list(groups.values())


def _equal(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    rows = torch.arange(one.shape[0]).split(max(1, PART * one.shape[0] // max(1, math.prod(one.shape))))
    return all(torch.equal(read_rows(one, some), read_rows(other, some)) for some in rows)
