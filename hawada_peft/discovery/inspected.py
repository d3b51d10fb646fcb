"""`inspect`: what can be removed of a model, a config, or what is in a folder; kept for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..folders import default_cache
from ..sources import MODEL_FILE, check_source
from ..vanilla.modules import check_unquantized
from ..vanilla.skeleton import check_constructor
from .anatomy import Anatomy
from .find import find_anatomy

logger = logging.getLogger(__name__)

VERSION = 5
"""Of what is found: one more whenever discovery finds something else."""

NO_SIZES = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "label2id", "id2label")
"""Fields of a config on which nothing depends that is found."""

_known: dict[str, Anatomy] = {}


def inspect(
    model: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str],
    *,
    inputs: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Anatomy:
    """
    What can be removed of a model, found and proved.

    Nothing of the model itself is used but its class and config: a tiny copy of it with random weights is cut, and
    compared in float64 with itself where the same is closed; the large one is built on the meta device. What was found
    of a class and config is kept in the process and in the cache folder (`$HAWADA_CACHE`).

    Args:
        model (`PreTrainedModel`, `PreTrainedConfig`, `str` or path): a model; a config that names its class in
            `architectures`; a folder, a config file, or an id on the Hub.
        inputs (`dict`, *optional*): example inputs of the tiny copy by their names, where they cannot be guessed.
        fresh (`bool`): whether it is found again, whatever is kept.

    Returns:
        Axes with their legal sizes, stacks of layers, and what cannot be removed, with the reasons.

    Raises:
        UnsupportedModelError: if the model is not one of transformers, holds quantized weights, is not built from its
            config alone, does not run on example inputs, or gives something else each time.
        FileNotFoundError: if there is no such folder, file or model.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hawada_peft import inspect
        >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
        >>> config = LlamaConfig(num_attention_heads=4, architectures=["LlamaForCausalLM"], **sizes)
        >>> inspect(config).axis("ffn").sizes
        range(1, 49)
    """
    model_class, config = _class_and_config(model)
    check_constructor(model_class)
    key = _key(model_class, config)
    if inputs is not None:
        return find_anatomy(model_class, config, inputs)
    if key in _known and not fresh:
        return _known[key]
    path = default_cache() / f"anatomy-{key}.json"
    found = None if fresh else _read(path)
    if found is None:
        found = find_anatomy(model_class, config)
        _write(path, found)
    _known[key] = found
    return found


def _class_and_config(model: Any) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    if isinstance(model, PreTrainedConfig):
        return _class_of(model), model
    if isinstance(model, str | os.PathLike):
        config = _read_config(model)
        return _class_of(config), config
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"looked for a transformers model, config or folder, got a {type(model).__name__}"
            + (
                ": what can be removed of other modules is not found. `attach_adapters` gates the inputs of Linear "
                "and convolution layers in any module by name"
                if isinstance(model, nn.Module)
                else ""
            )
        )
    _check_own_code(type(model), model.config)
    check_unquantized(model)
    return type(model), model.config


def _read_config(model: str | os.PathLike[str]) -> PreTrainedConfig:
    """
    The config in a folder, a file, or of an id.

    Raises:
        UnsupportedModelError: if transformers does not know its kind.
        FileNotFoundError: if there is none.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        check_source(model, MODEL_FILE)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path if path.exists() else os.fspath(model))
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{model} is no config of a model type that transformers {transformers.__version__} knows: {error}"
        ) from error
    return config


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names; the bare model of its type if it names none."""
    names = config.architectures or []
    known = [name for name in names if hasattr(transformers, name)]
    if len(known) == 1:
        found: type[PreTrainedModel] = getattr(transformers, known[0])
        return found
    if names or getattr(config, "auto_map", None):
        raise UnsupportedModelError(
            f"looked for one class of transformers, and the config of model_type={config.model_type!r} names "
            f"architectures={names}" + _own_code(config)
        )
    classes: Any = AutoModel._model_mapping.get(type(config), None)
    if classes is None:
        raise UnsupportedModelError(
            f"the config of model_type={config.model_type!r} names no class: set its `architectures`, as "
            "`['LlamaForCausalLM']`"
        )
    bare: type[PreTrainedModel] = classes[0] if isinstance(classes, tuple) else classes
    return bare


def _check_own_code(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    if model_class.__module__.startswith("transformers_modules"):
        raise UnsupportedModelError(
            f"looked for a class of transformers, and {model_class.__name__} is of code that came with the model"
            + _own_code(config)
        )


def _own_code(config: PreTrainedConfig) -> str:
    """What to do about a model that brings its own code."""
    files = getattr(config, "auto_map", None)
    says = f" (auto_map={files})" if files else ""
    return (
        f"{says}: code of a model's own is not run, and a slim model of it would not load without it. Convert the "
        "weights to the class of transformers that computes the same, or gate modules by name with `attach_adapters`"
    )


def _key(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """Of all that is found depends on."""
    told = {
        "class": f"{model_class.__module__}.{model_class.__qualname__}",
        "config": sizes_of(config.to_dict()),
        "version": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sizes_of(tree: dict[str, Any]) -> dict[str, Any]:
    """A config without what nothing depends on."""
    return {
        name: sizes_of(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if name not in NO_SIZES
    }


def _read(path: Path) -> Anatomy | None:
    """What is kept in a file, if it is there and can be read."""
    try:
        return Anatomy.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, UnsupportedModelError) as error:
        logger.warning("%s is found again: %s", path, error)
        return None


def _write(path: Path, found: Anatomy) -> None:
    """Keep what was found, or say that it is not kept."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(found.to_json(), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        logger.warning("what was found is not kept for later, in %s: %s", path, error)
