"""What makes a folder vanilla, and the slim model that its report says it is. Each check returns what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..adapters.huggingface.family import locate
from ..errors import HawAdaError, UnsupportedModelError
from .checkpoint import WEIGHTS, weight_files
from .facts import REPORT_NAME
from .plan import Plan

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


def read_report(folder: Path) -> dict[str, Any] | None:
    """
    The report beside a slim model, if there is one.

    Raises:
        HawAdaError: if it is no JSON object.
    """
    file = folder / REPORT_NAME
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HawAdaError(f"{file} is no JSON: {error}") from None
    if not isinstance(report, dict):
        raise HawAdaError(f"{file} must hold an object, got a {type(report).__name__}")
    return report


def size_problems(model: PreTrainedModel, report: Mapping[str, Any]) -> list[str]:
    """
    Where a model is not of the sizes that its report says.

    Args:
        model: the slim model; may be on the meta device.
        report: as `hawada_report.json` has it.

    Raises:
        HawAdaError: if the model has no family row, or the report's plan is none.
    """
    layout, problems = locate(model), []
    said = report.get("model", {}).get("parameters")
    if said is not None and said != model.num_parameters():
        problems.append(f"{REPORT_NAME} says {said:,} parameters, the model has {model.num_parameters():,}")
    if "plan" in report:
        plan = Plan.from_dict(report["plan"])
        wanted, found = plan.shape.to_dict(), layout.full.to_dict()
        off = [f"{name} {found[name]} instead of {size}" for name, size in wanted.items() if found[name] != size]
        if off:
            untouched = all(found[name] == size for name, size in plan.dense.to_dict().items())
            dense = " (these are the dense sizes)" if untouched else ""
            problems.append(f"the model does not have the sizes of the plan in {REPORT_NAME}: {', '.join(off)}{dense}")
    return problems


def _fields(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield name
            yield from _fields(value)


def _foreign(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name.lower() for part in parts)
