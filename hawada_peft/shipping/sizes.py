"""The report of a folder, read, and whether the model has the sizes that it states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import HawAdaError
from ..files.names import REPORT_NAME
from ..planning.plan import Plan
from ..vanilla.family import locate


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
