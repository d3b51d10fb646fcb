"""The model card of a slim model, made from its report alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
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
    results = measured_results(report, task or "feature-extraction")
    name = f"{base['name']}, slimmed" if "name" in base else f"A slim {model['class']}"
    data = ModelCardData(
        model_name=name if results else None,
        eval_results=results or None,
        base_model=base.get("id"),
        library_name="transformers",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        language=base.get("language"),
        pipeline_tag=task,
        tags=[TAG, "pruning"],
    )
    text = _template().render(
        **(dict.fromkeys(SECTIONS) | dict(report) | {"base": base if "name" in base else None}),
        loads=[("model", model["auto_class"]), *(PROCESSORS[name] for name in processors)],
        place=report.get("repo_id", HERE),
        cuts=[cut for cut in cuts(report.get("dense", {}), model) if cut.dense is not None],
        stays=[] if plan is None else _stays(plan),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _stays(plan: Mapping[str, Any]) -> list[tuple[str, list[int], list[int]]]:
    """Of each tower of a plan its name, the kept and the dropped layers."""
    parts = plan.get("towers") or {plan.get("tower", ""): plan}
    return [
        (tower, each["layers"], sorted({*range(each["dense"]["num_hidden_layers"])} - {*each["layers"]}))
        for tower, each in parts.items()
    ]


def measured_results(report: Mapping[str, Any], task: str) -> list[EvalResult]:
    """
    What was measured, in the Hub's schema of a `model-index`: quality, and the latency of these very models.

    Args:
        report: see `report_of`.
        task: of the Hub's tasks.
    """
    found = []
    for each in report.get("quality") or []:
        kind = next((known for known in METRICS if each["name"].startswith(known)), "agreement")
        unit = 100 if each["name"].endswith("in %") else 1  # the Hub's metrics are parts of one
        title = each["name"].removesuffix(" in %").removesuffix(",")
        label = f"{title} (dense model: {each['dense'] / unit:.4g})"
        found.append(_result(task, each["data"], kind, float(f"{each['slim'] / unit:.6g}"), label))
    latency = report.get("latency")
    if latency is not None and "rounds" in latency:  # these models were timed, not others of their sizes
        where = " ".join(f"{key} {value}" for key, value in latency["regime"].items() if value is not None)
        label = f"latency in ms (dense model: {latency['dense_ms']:.4g}), {where}"
        found.append(_result(task, latency["device"], "latency", float(f"{latency['slim_ms']:.6g}"), label))
    return found


METRICS = ("perplexity", "accuracy")
"""Names of the Hub's metrics that qualities begin with."""


def _result(task: str, data: str, kind: str, value: float, label: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type="held-out",
        dataset_name=data,
        dataset_config=data,  # what is grouped by
        metric_type=kind,
        metric_value=value,
        metric_name=label,
    )


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
