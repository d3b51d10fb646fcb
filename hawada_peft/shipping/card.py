"""The model card of a slim model, made from its report alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers.modelcard import TASK_MAPPING

from ..files.adapter_card import HERE, TAG
from ..files.markdown import code, prose, quoted
from ..planning.cut import cuts

PROCESSORS = {"tokenizer": ("tokenizer", "AutoTokenizer"), "image_processor": ("processor", "AutoImageProcessor")}
"""Variable and class in the example, by what the folder holds."""

SECTIONS = ("base", "dense", "plan", "latency", "quality", "reconstruction", "calibration")
"""Of the report: those that it need not have."""


def slim_card(report: Mapping[str, Any], processors: Sequence[str] = ()) -> ModelCard:
    """
    The card of a slim model. What the report does not say is not in it; what it quotes from outside is plain text.

    Args:
        report: see `report_of`.
        processors: of `"tokenizer"` and `"image_processor"`, what the folder holds.

    Returns:
        `ModelCard`: metadata and text.
    """
    base, model, plan = report.get("base", {}), report["model"], report.get("plan")
    tasks: Mapping[str, Any] = TASK_MAPPING
    task = next((task for task, classes in tasks.items() if model["class"] in classes.values()), None)
    data = ModelCardData(
        base_model=base.get("id"),
        library_name="transformers",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        language=base.get("language"),
        pipeline_tag=task,
        tags=[TAG, "pruning"],
    )
    layers = range(report.get("dense", {}).get("num_hidden_layers", 0))
    text = _template().render(
        **(dict.fromkeys(SECTIONS) | dict(report) | {"base": base if "name" in base else None}),
        loads=[("model", model["auto_class"]), *(PROCESSORS[name] for name in processors)],
        place=report.get("repo_id", HERE),
        cuts=[cut for cut in cuts(report.get("dense", {}), model) if cut.dense is not None],
        dropped=[] if plan is None else sorted(set(layers) - set(plan["layers"])),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # Markdown: what comes from outside goes through `prose`, `code` or `quoted`
    )
    environment.filters |= {"prose": prose, "code": code, "quoted": quoted, "single": _single}
    return environment.get_template("card.md.j2")


def _single(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """The single values of a mapping; lists and tables stay in the report."""
    return {k: v for k, v in (facts or {}).items() if v is None or isinstance(v, str | int | float | bool)}
