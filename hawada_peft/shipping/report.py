"""The report of an export, `hawada_report.json`: made, read, and compared with a model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from ..errors import HawAdaError, InvalidPlanError, UnsupportedModelError
from ..files.names import REPORT_NAME
from ..planning.cut import BESIDE
from ..planning.plan import Plan
from ..vanilla.family import Layout, locate
from ..vanilla.resize import parameters_at
from ..vanilla.shape import Shape
from ..vanilla.skeleton import auto_class_of, skeleton_of
from .checks import Verification
from .facts import ExportFacts, base_facts, plain_facts, race_facts, search_facts
from .figures import latency_facts
from .passport import alignment, passport_of

FORMAT = 1


def report_of(model: PreTrainedModel, facts: ExportFacts, verification: Verification | None = None) -> dict[str, Any]:
    """
    The report, for JSON. Sections that nothing is known about are not in it.

    Args:
        model: the slim model; only its class, config and dtype are used, so it may be on the meta device.
        facts: what is known beside that.
        verification: what reloading the folder gave.

    Raises:
        InvalidPlanError: if the plan is for other sizes than the slim model's.
        IncompatibleTableError: if the latency is that of other sizes, or the timings lack `"dense"` or `"slim"`.
        HawAdaError: if what reconstruction reported is neither a dataclass nor a mapping.
    """
    towers = _towers_of(model, facts.plan)
    layout = towers[0][0]
    for each, part in towers:
        if part is not None and each.complete(part.shape) != each.dense:
            raise InvalidPlanError(
                f"the plan leaves {part.shape.to_dict()}, the slim model has {each.dense.to_dict()}: pass the plan "
                "that it was made with"
            )
    base = base_facts(facts)
    beside = [(each, part.dense) for each, part in towers[1:] if part is not None]
    timing = None if facts.latency is None else latency_facts(facts.latency, layout.full)
    compiled = timing is not None and timing["measured"] and timing["regime"]["backend"] == "compile"
    lines = passport_of(
        model,
        layout,
        verification=verification,
        compiled_on=f"{timing['device']}, torch {timing['versions']['torch']}" if timing and compiled else "",
        checked=facts.checked,
    )
    sections: dict[str, Any] = {
        "format": FORMAT,
        "versions": {
            "hawada_peft": version("hawada_peft"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "repo_id": facts.repo_id,
        "base": base or None,
        "model": _model_facts(model, layout) | _beside({each.tower: each.dense for each, _ in beside}),
        "dense": _base_sizes(facts.base) if facts.plan is None else _plan_sizes(layout, facts.plan.dense, beside),
        "plan": None if facts.plan is None else facts.plan.to_dict(),
        "verification": None if verification is None else verification.figures(),
        "latency": timing,
        "search": search_facts(facts),
        "race": race_facts(facts),
        "quality": [dataclasses.asdict(change) for change in facts.quality] or None,
        "reconstruction": None if facts.reconstruction is None else plain_facts(facts.reconstruction),
        "losses": dict(facts.losses) or None,
        "calibration": None if facts.calibration is None else dict(facts.calibration),
        "alignment": alignment(model, layout),
        "passport": [line.to_dict() for line in lines],
    }
    return {name: section for name, section in sections.items() if section is not None}


def _towers_of(model: PreTrainedModel, plan: Plan | None) -> list[tuple[Layout, Plan | None]]:
    """The towers that a plan is about, with what it says of each; without one that which `locate` takes."""
    if plan is None:
        return [(locate(model), None)]
    return [(locate(model, part.tower or None), part) for part in plan.parts]


def _beside(sizes: Mapping[str, Shape]) -> dict[str, Any]:
    """The sizes of further towers, by their names."""
    return {BESIDE: {tower: shape.to_dict() for tower, shape in sizes.items()}} if sizes else {}


def _model_facts(model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    dtype = model.config.dtype if model.device.type == "meta" else model.dtype  # a skeleton has the default dtype
    return {
        "class": type(model).__name__,
        "auto_class": auto_class_of(model).__name__,
        "model_type": layout.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "hidden_size": layout.hidden_size,
        "head_dim": layout.head_dim,
        **layout.dense.sizes(),
        **({"tower": layout.tower} if layout.tower else {}),
    }


def _plan_sizes(layout: Layout, dense: Shape, beside: Sequence[tuple[Layout, Shape]]) -> dict[str, Any]:
    """The sizes of the model that a plan was made for."""
    sizes = dense.to_dict() | {"parameters": parameters_at(layout, dense, *beside)}
    return sizes | _beside({each.tower: shape for each, shape in beside})


def _base_sizes(base: str | os.PathLike[str] | None) -> dict[str, int] | None:
    """The sizes of a base model whose folder is at hand."""
    if base is None or not (Path(base) / "config.json").is_file():
        return None
    model = skeleton_of(AutoConfig.from_pretrained(base))
    layout = locate(model)
    return layout.full.to_dict() | {"parameters": model.num_parameters()}


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
    except (ValueError, RecursionError) as error:
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
    plan, problems = Plan.from_dict(report["plan"]) if "plan" in report else None, []
    said = report.get("model", {}).get("parameters")
    if said is not None and said != model.num_parameters():
        problems.append(f"{REPORT_NAME} says {said:,} parameters, the model has {model.num_parameters():,}")
    if plan is not None:
        try:
            towers = _towers_of(model, plan)
        except UnsupportedModelError:  # of what is left of it nothing more can be removed, so nothing is found
            return problems
        found = {(each.tower, name): size for each, _ in towers for name, size in each.full.to_dict().items()}
        parts = [(each.tower, part) for each, part in towers if part is not None]
        wanted = {(tower, name): size for tower, part in parts for name, size in part.shape.to_dict().items()}
        dense = {(tower, name): size for tower, part in parts for name, size in part.dense.to_dict().items()}
        before = {tower: f"{tower}." if len(parts) > 1 else "" for tower, _ in parts}
        off = [
            f"{before[tower]}{name} {found[tower, name]} instead of {size}"
            for (tower, name), size in wanted.items()
            if found[tower, name] != size
        ]
        if off:
            untouched = all(found[key] == size for key, size in dense.items())
            as_dense = " (these are the dense sizes)" if untouched else ""
            told = ", ".join(off) + as_dense
            problems.append(f"the model does not have the sizes of the plan in {REPORT_NAME}: {told}")
    return problems
