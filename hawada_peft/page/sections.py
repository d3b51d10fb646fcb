"""The sections of the page. Each gives its parts, or nothing where nothing is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..planning.cut import BESIDE, SIZES, cuts
from .drawing import Picture
from .known import WEIGHT_BYTES, SlimFacts
from .parts import Part, figure, folded, number, table, text


def peers(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """Dense, slim and other models."""
    if not facts.measured_peers:
        return
    latency, quality = facts.report["latency"], facts.qualities[0]
    dense_ms = latency["dense_ms"]
    if "peers" in pictures:
        yield figure(pictures["peers"], f"{pictures['peers'].text} The peers' figures are as given.")
    rows = [
        ("dense", dense_ms, quality["dense"]),
        ("slim", latency["slim_ms"], quality["slim"]),
        *((peer.name, peer.ms(dense_ms), peer.quality) for peer in facts.measured_peers),
    ]
    yield table(
        "Quality and latency. The peers' figures are as given.",
        ("model", "ms", "speedup", quality["name"]),
        ((name, number(ms), number(dense_ms / ms, ".2f", "x"), number(value)) for name, ms, value in rows),
        chosen=1,
    )


def kept(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """What stays of each layer."""
    plan = facts.plan
    if plan is None:
        return
    dense = plan.dense.sizes()
    gone = sorted(set(range(dense["num_hidden_layers"])) - set(plan.layers))
    yield text(f"Layers in the dense model's numbering. Dropped: {', '.join(map(str, gone)) or 'none'}.")
    if "kept" in pictures:
        yield figure(pictures["kept"], pictures["kept"].text)
    yield folded(
        "The heads and KV groups that stay in each layer",
        table(
            "What stays in each dense layer.",
            ("layer", "query heads", "KV groups", "FFN channels"),
            (_layer(plan, layer) for layer in range(dense["num_hidden_layers"])),
        ),
    )
    if plan.hidden is not None:
        yield text(f"{len(plan.hidden)} of {plan.dense.hidden_size} channels of the residual stream stay.")


def _layer(plan: Any, layer: int) -> tuple[Any, ...]:
    if layer not in plan.layers:
        return str(layer), "dropped", "", number(0)
    at = plan.layers.index(layer)
    return (
        str(layer),
        ", ".join(map(str, plan.heads[at])),
        ", ".join(map(str, plan.kv_groups[at])),
        number(len(plan.channels[at]), ","),
    )


def gates(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """The gates over training."""
    entries = facts.entries
    if not entries:
        return
    phases = {entry["phase"]: entry["step"] for entry in reversed(entries)}
    starts = ", ".join(f"{phase} at step {step}" for phase, step in sorted(phases.items(), key=lambda item: item[1]))
    yield text(f"First seen in each phase: {starts}. Under the plan (hard) what is kept no longer changes.")
    if "gates" in pictures:
        note = "The colours of the other layers lie between those two; dotted: the plan is applied."
        yield figure(pictures["gates"], f"{pictures['gates'].text} {note}")
    if "training" in pictures:
        yield figure(pictures["training"], pictures["training"].text)
    axes = [axis for axis in ("heads", "ffn", "layers") if all(axis in entry for entry in (entries[0], entries[-1]))]
    yield folded(
        "The gates of each layer in the end",
        table(
            f"At step {entries[-1]['step']}: what is kept, and the mean gate.",
            ("layer", *(f"{axis}, {what}" for axis in axes for what in ("kept", "gate"))),
            (
                (str(layer), *(number(entries[-1][a][w][layer], ".3f") for a in axes for w in ("keep", "gate")))
                for layer in range(len(entries[-1][axes[0]]["keep"]) if axes else 0)
            ),
        ),
    )


def sizes(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """Sizes, latency and quality before and after."""
    model, dense, latency = facts.report["model"], facts.report.get("dense", {}), facts.report.get("latency")
    known = {name: model[name] for name in ("hidden_size", "head_dim") if facts.plan} | dense
    rows: list[tuple[Any, ...]] = [_row(cut.name, cut.dense, cut.slim, ",") for cut in cuts(known, model)]
    width = WEIGHT_BYTES.get(model["dtype"])
    if width:
        before = dense["parameters"] * width / 2**20 if dense else None
        rows.append(_row(f"weights in {model['dtype']}, MiB", before, model["parameters"] * width / 2**20, ",.2f"))
    if latency is not None:
        word = "latency, ms" if latency["measured"] else "latency (estimated), ms"
        rows.append(_row(word, latency["dense_ms"], latency["slim_ms"], ",.4g"))
    # parts of a measure of quality say nothing: half the perplexity is not half a model
    rows += [
        (change["name"], number(change["dense"]), number(change["slim"]), number(None)) for change in facts.qualities
    ]
    yield table("The dense model and the slim one.", ("", "dense", "slim", "slim / dense"), rows)
    yield from (
        text(f"{change['name']}: on {change['data']}.", note=True) for change in facts.qualities if change["data"]
    )


def _row(word: str, before: float | None, after: float, form: str) -> tuple[Any, ...]:
    part = after / before if before else None
    return word, number(before, form), number(after, form), number(part, ".0%")


def roundings(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """What was asked for, what it became, and what the search had to choose from."""
    plan, search = facts.plan, facts.search
    if plan is not None and plan.roundings:
        yield table(
            "What was asked for, and what it became.",
            ("size", "asked for", "chosen", "by", "why"),
            (
                (SIZES[each.axis], number(each.asked), number(each.chosen, ","), each.source, each.reason)
                for each in plan.roundings
            ),
        )
    if search is None:
        return
    sizes = next(point for point in search["points"] if point["rejected"] is None)
    if search["steps"]:
        yield table(
            "What the search could choose from.",
            ("size", "chosen", "out of"),
            ((*_step(name, sizes, facts.report["model"]), why) for name, why in search["steps"].items()),
        )
    if search["limit_ms"] is not None:
        yield text(
            f"The budget ({search['budget']}) allowed {search['limit_ms']:.4g} ms beside a dense model of "
            f"{search['dense_ms']:.4g} ms. Shapes that were only estimated had to stay {search['margin']:.1%} below "
            "it."
        )
    if sizes["expected_ms"] is not None and sizes["measured_ms"] is not None:
        off = sizes["measured_ms"] / sizes["expected_ms"] - 1
        error = search["estimate_errors"].get("median")
        yield text(
            f"The chosen shape was expected to take {sizes['expected_ms']:.4g} ms and took {sizes['measured_ms']:.4g} "
            f"({off:+.1%})." + ("" if error is None else f" Estimates were off by {error:.1%} (median).")
        )
    latency = facts.report.get("latency")
    if latency is not None and latency["measured"] and abs(latency["slim_ms"] - search["chosen_ms"]) > 1e-9:
        yield text(
            f"At the end both models were timed once more: {latency['dense_ms']:.4g} ms dense, "
            f"{latency['slim_ms']:.4g} ms slim, {latency['speedup']:.2f}x."
        )


def reconstruction(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """What the least squares did."""
    found = facts.report.get("reconstruction")
    if not found:
        return
    single = {name: value for name, value in found.items() if isinstance(value, str | int | float | bool)}
    yield table(
        "The slim model's output projections, refitted to the dense model by least squares.",
        ("", "value"),
        ((name, _plain(value)) for name, value in single.items()),
    )
    refits = found.get("refits") or []
    if refits:
        yield folded(
            f"{len(refits)} projections",
            table(
                "Squared error relative to the target, on held-out batches.",
                ("module", "before", "after", "damping"),
                ((r["name"], number(r["before"]), number(r["after"]), number(r["damping"])) for r in refits),
            ),
        )
    data = facts.report.get("calibration")
    if data and "examples" in data:
        yield text(f"Calibration data: {data['examples']} examples.", note=True)


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, int | float) else value


def passport(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """Runtimes, and the alignment of the sizes."""
    lines = facts.report["passport"]
    yield text(
        "Run: this model was run there. Computed: follows from its sizes. Rule: not run with this model.", note=True
    )
    yield table(
        "Runtimes.",
        ("runtime", "answer", "evidence", "detail"),
        ((line["runtime"], line["answer"], line["evidence"], line["detail"]) for line in lines),
    )
    sizes = facts.report["alignment"]
    yield table(
        "Alignment of the sizes.",
        ("size", "value", "multiple of"),
        (
            (
                SIZES.get(name, name),
                number(each["size"], ","),
                ", ".join(map(str, each["multiple_of"])) or "none of 8, 64, 128",
            )
            for name, each in sizes.items()
        ),
    )


def _step(name: str, point: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str, str]:
    """What a search could choose, of further towers with the tower's name before it; and what it chose."""
    tower, _, size = name.rpartition(".")
    if size not in SIZES:  # a whole tower
        return name, number(None)
    shape, slim = (facts.get(BESIDE, {}).get(tower, {}) if tower else facts for facts in (point, model))
    chosen = (shape if tower else point["shape"]).get(size, slim.get(size))
    return f"{SIZES[size]} of {tower}" if tower else SIZES[size], number(chosen, ",")
