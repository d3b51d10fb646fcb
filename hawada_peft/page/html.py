"""The page: what is known in words, tables and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import HawAdaError
from ..planning.cut import sentence
from . import searched, sections
from .drawing import Picture
from .dropped import dropped_section
from .known import AGREEMENT, SlimFacts
from .rungs import race_section
from .stages import stages_section

TEMPLATE = "page.html.j2"
HOW = {
    "frontier": "What the shape was chosen from: a search for a budget. `hawada train` notes it; name the file of "
    "`hawada plan`: `hawada report --search plan.search.json`.",
    "race": "What recovered best: `hawada train` lets plans race before a recovery, or `recover(race=Race(...))` in "
    "Python.",
    "dropped": "What each layer is worth: a search notes it where it may drop layers.",
    "stages": "Quality by stage: a refit, `hawada train` or a race measures it.",
    "latency": "The latency: `hawada evaluate` measures it, `hawada train`, or `ExportFacts(latency=...)`.",
    "quality": "The quality: `hawada evaluate` measures it, `hawada train`, or `ExportFacts(quality=[...])`.",
    "peers": "Other models to compare with: `hawada report --peers`, a file of JSON lines with name, quality, and "
    "latency_ms or speedup. Needs the latency and the quality of the slim model.",
    "kept": "Which heads and channels stay: the report holds no plan.",
    "gates": "How the gates moved: name the folder of their training, `hawada report --training`.",
    "roundings": "What the sizes were rounded from: they were given as they are, or the plan is of an older version.",
    "reconstruction": "The reconstruction: there was none, or it was not noted.",
}
"""What is said of a section about which nothing is known."""


def page(facts: SlimFacts, pictures: Mapping[str, Picture]) -> str:
    """
    The HTML text of the page.

    Args:
        facts: what is known.
        pictures: what was drawn, by name; sections are in words and tables without them.
    """
    missing: list[str] = []
    made = []
    for name, title, make in (
        ("milliseconds", "Where the milliseconds go", searched.milliseconds),
        ("frontier", "What the shape was chosen from", searched.frontier),
        ("dropped", "What each layer is worth", dropped_section),
        ("race", "What recovered best", race_section),
        ("stages", "Quality by stage", stages_section),
        ("peers", "Beside other models", sections.peers),
        ("kept", "What was kept", sections.kept),
        ("gates", "How the gates moved", sections.gates),
        ("sizes", "Dense and slim", sections.sizes),
        ("roundings", "What was rounded, and why", sections.roundings),
        ("reconstruction", "What was refitted", sections.reconstruction),
        ("passport", "What runs it", sections.passport),
    ):
        parts = list(make(facts, pictures))
        if parts:
            made.append({"id": name, "title": title, "parts": parts})
        elif name in HOW:
            missing.append(HOW[name])
    missing += [HOW[name] for name in ("latency", "quality") if name not in facts.report]
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise HawAdaError("a report needs jinja2: pip install 'hawada_peft[report]'") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["code"] = _code
    return environment.get_template(TEMPLATE).render(
        title=_title(facts),
        cut=_cut(facts),
        lines=list(_where(facts)),
        summary=list(_summary(facts)),
        sections=made,
        missing=missing,
        footer=_footer(facts),
    )


def _code(text: str) -> Any:
    """What stands between backticks, as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _title(facts: SlimFacts) -> str:
    base, model = facts.report.get("base"), facts.report["model"]
    return f"{base['name']}, slimmed" if base and "name" in base else f"A slim {model['class']}"


def _cut(facts: SlimFacts) -> str:
    """What was cut, in one sentence."""
    model, dense = facts.report["model"], facts.report.get("dense")
    if dense is None:
        return f"A {model['class']} with {model['parameters']:,} parameters; the dense model's sizes are not known."
    return sentence(dense, model)


def _where(facts: SlimFacts) -> Iterator[str]:
    """Device, regime and how the latency is known."""
    latency = facts.report.get("latency")
    if latency is None:
        return
    regime = latency["regime"]
    tokens = f" x {regime['seq_len']} tokens" if regime["seq_len"] is not None else ""
    if regime.get("prompt") is not None:
        tokens = f" x {regime['prompt']} tokens and {regime['output']} of an answer"
    word = "Measured" if latency["measured"] else "Estimated, not measured,"
    yield (
        f"{word} on {latency['device']}: {regime['mode']}, batch {regime['batch_size']}{tokens}, {regime['dtype']}, "
        f"{regime['backend']}; {latency['how']}."
    )


def _summary(facts: SlimFacts) -> Iterator[dict[str, str]]:
    report, search, latency = facts.report, facts.search, facts.report.get("latency")
    yield {"name": "model", "value": report["model"]["class"], "note": report["model"]["dtype"]}
    budget = search["budget"] if search else (latency or {}).get("budget")
    if budget:
        limit = search["limit_ms"] if search else None
        note = f"{limit:.4g} ms when it was searched" if limit is not None else ""
        yield {"name": "budget asked for", "value": budget, "note": note}
    if latency is not None:
        word = "measured speedup" if latency["measured"] else "estimated speedup"
        note = f"{latency['dense_ms']:.4g} to {latency['slim_ms']:.4g} ms"
        yield {"name": word, "value": f"{latency['speedup']:.2f}x", "note": note}
    for change in facts.qualities:
        value = f"{change['slim']:.4g}"
        note = "" if change["name"] == AGREEMENT else f"dense {change['dense']:.4g}"
        yield {"name": change["name"], "value": value, "note": f"{note}{', ' if note else ''}{change['data']}"}


def _footer(facts: SlimFacts) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts.report["versions"].items())
    return f"Made from hawada_report.json of {versions}. Figures are as measured there; nothing was run for this page."
