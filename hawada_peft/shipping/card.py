"""The model cards: of a slim model, made from its report alone, and of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from ..files.adapter_card import HERE, TAG

PROCESSORS = {"tokenizer": ("tokenizer", "AutoTokenizer"), "image_processor": ("processor", "AutoImageProcessor")}
"""Variable and class in the example, by what the folder holds."""


def slim_card(report: Mapping[str, Any], processors: Sequence[str] = ()) -> ModelCard:
    """
    The card of a slim model. What the report does not say is not in it.

    Args:
        report: see `report_of`.
        processors: of `"tokenizer"` and `"image_processor"`, what the folder holds.

    Returns:
        `ModelCard`: metadata and text.
    """
    base, model = report.get("base", {}), report["model"]
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
    text = "\n".join(_lines(report, processors))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _lines(report: Mapping[str, Any], processors: Sequence[str]) -> Iterator[str]:
    model, base, dense = report["model"], report.get("base"), report.get("dense")
    yield f"# {base['name']}, slimmed" if base else f"# A slim {model['class']}"
    yield ""
    source = f" It was cut from `{base['name']}`." if base else ""
    yield (
        f"A `{model['class']}` with {model['parameters']:,} parameters in {model['dtype']}.{source} It is an ordinary "
        "transformers model: it loads without custom code, without `trust_remote_code` and without the package that "
        "made it."
    )
    yield from _example(report, processors)
    if dense:
        yield from _cut(dense, model, report.get("plan"))
    if "latency" in report:
        yield from _latency(report["latency"])
    if "quality" in report:
        yield from _section("Quality")
        yield from _table(
            ("measure", "dense", "slim", "measured on"),
            ((q["name"], f"{q['dense']:.4g}", f"{q['slim']:.4g}", q["data"]) for q in report["quality"]),
        )
    yield from _facts("Reconstruction", report.get("reconstruction"))
    yield from _facts("Calibration data", report.get("calibration"))
    yield from _section("What runs it")
    yield "Evidence: *run* is this model, run there; *computed* is from its sizes; *rule* was not run with this model."
    yield ""
    yield from _table(
        ("runtime", "answer", "evidence", "detail"),
        ((line["runtime"], line["answer"], line["evidence"], line["detail"]) for line in report["passport"]),
    )
    yield from _section("How it was made")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    yield f"With {versions}. All figures, the plan and the alignment of the sizes are in `hawada_report.json`."


def _example(report: Mapping[str, Any], processors: Sequence[str]) -> Iterator[str]:
    auto, place = report["model"]["auto_class"], report.get("repo_id", HERE)
    loads = [("model", auto), *(PROCESSORS[name] for name in processors)]
    yield from _section("How to load")
    yield "```python"
    yield f"from transformers import {', '.join(sorted(cls for _, cls in loads))}"
    yield ""
    for variable, cls in loads:
        yield f'{variable} = {cls}.from_pretrained("{place}")'
    yield "```"


def _cut(dense: Mapping[str, int], slim: Mapping[str, Any], plan: Mapping[str, Any] | None) -> Iterator[str]:
    yield from _section("What was cut")
    yield from _table(
        ("size", "dense", "slim", "kept"),
        ((name, f"{size:,}", f"{slim[name]:,}", f"{slim[name] / size:.0%}") for name, size in dense.items()),
    )
    if plan is not None:
        kept = plan["layers"]
        gone = sorted(set(range(dense["num_hidden_layers"])) - set(kept))
        yield ""
        yield f"Kept layers: {', '.join(map(str, kept))}. Dropped: {', '.join(map(str, gone)) or 'none'}."


def _latency(latency: Mapping[str, Any]) -> Iterator[str]:
    regime, word = latency["regime"], "measured" if latency["measured"] else "estimated, not measured"
    size = f" x {regime['seq_len']} tokens" if regime["seq_len"] is not None else ""
    yield from _section("Latency")
    yield from _table(
        ("dense", "slim", "speedup", ""),
        [(f"{latency['dense_ms']:.3f} ms", f"{latency['slim_ms']:.3f} ms", f"{latency['speedup']:.2f}x", word)],
    )
    yield ""
    yield (
        f"On {latency['device']}: {regime['mode']}, batch {regime['batch_size']}{size}, {regime['dtype']}, "
        f"{regime['backend']}; torch {latency['versions']['torch']}, transformers "
        f"{latency['versions']['transformers']}. It is the latency of {latency['how']}."
    )
    if latency.get("errors"):
        yield f"The table's estimates were off by {latency['errors']['median']:.1%} (median)."


def _facts(title: str, facts: Mapping[str, Any] | None) -> Iterator[str]:
    """The single values of a mapping; lists and tables stay in the report."""
    single = {k: v for k, v in (facts or {}).items() if v is None or isinstance(v, str | int | float | bool)}
    if single:
        yield from _section(title)
        yield from (f"- {name}: {value}" for name, value in single.items())


def _section(title: str) -> list[str]:
    return ["", f"## {title}", ""]


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
