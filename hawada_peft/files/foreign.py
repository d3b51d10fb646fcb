"""What makes a folder vanilla, and the slim model that its report says it is. Each check returns what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UnsupportedModelError
from .checkpoint import WEIGHTS, weight_files

SAFE = (".safetensors", ".index.json")
"""Ends the names of weight files that hold no code."""

CONFIGS = ("config.json", "generation_config.json")
FOREIGN_FIELDS = ("hawada", "auto_map", "quantization_config")
"""In the name of a config field: of this package, of custom code, of weights that are not plain."""

FOREIGN_TENSORS = ("hawada", ".base_layer.", "lora_", "modules_to_save")
"""In the name of a tensor: of this package, or of PEFT."""


def file_problems(folder: Path) -> list[str]:
    """Custom code, an adapter, or weights in other files than safetensors."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    problems = [f"{name} is custom code" for name in names if name.endswith(".py")]
    problems += [f"{name} belongs to an adapter" for name in names if name.startswith("adapter_")]
    unsafe = [name for name in names if name.endswith(WEIGHTS) and not name.endswith(SAFE)]
    return problems + [f"{name} holds weights and is no safetensors file" for name in unsafe]


def config_problems(folder: Path) -> list[str]:
    """Fields that a vanilla config does not have, at any depth."""
    problems = []
    for name in CONFIGS:
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:  # not JSON, or not UTF-8
                problems.append(f"{name} is no JSON: {error}")
                continue
            fields = sorted(set(_fields(content)))
            problems += [f"{name} has a field {field}" for field in fields if _foreign(field, FOREIGN_FIELDS)]
        elif name == "config.json":
            problems.append("there is no config.json")
    return problems


def tensor_problems(folder: Path) -> list[str]:
    """Tensors of adapters, or no readable tensors at all."""
    try:
        names = []
        for file in weight_files(folder):
            with safe_open(file, "pt") as opened:
                names += sorted(opened.keys())
    except (UnsupportedModelError, SafetensorError, OSError, ValueError) as error:
        return [str(error)]
    return [f"tensor {name} is none of a vanilla model" for name in names if _foreign(name, FOREIGN_TENSORS)]


def _fields(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield name
            yield from _fields(value)


def _foreign(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name.lower() for part in parts)
