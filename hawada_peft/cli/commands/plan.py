"""
`hawada plan`.

Long because the plan's files are written here and read here, for other commands as well.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...progress import Progress
from ..data import DATA, check_data
from ..errors import say
from ..options import ClockCommand, Effort, Fresh, Level, Model, Said, refuse
from ..tables import table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...basis.basis import Basis
    from ...planning.plan import Plan
    from ...search.result import SearchResult

EXAMPLES = (
    "hawada plan ./teacher text.txt --speedup 1.5 --batch-size 8 --seq-len 256",
    "hawada plan ./vit images.safetensors --latency-ms 8 --batch-size 64 --output plan.json",
    "hawada plan ./chat Salesforce/wikitext:wikitext-2-raw-v1 --speedup 1.3 --seq-len 512 --effort quick",
    "hawada plan ./teacher text.txt --speedup 1.5 --seq-len 256 --adapter ./adapter --json",
    "hawada plan meta-llama/Llama-3.1-8B text.txt --speedup 1.3 --seq-len 256 --low-memory",
)


def run(
    model: Model,
    progress: Progress | None,
    calibration: Annotated[str, typer.Argument(metavar="DATA", help=DATA, show_default=False)],
    to: Annotated[Path, typer.Option("--output", help="Where to write the plan.")] = Path("plan.json"),
    adapter: Annotated[str | None, typer.Option(help="Trained gates; Fisher importance if left out.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Calibration examples at most.")] = 64,
    rotate: Annotated[
        bool | None,
        typer.Option(help="Search hidden sizes, and sizes of heads, cut in a basis; where that is exact if left out."),
    ] = None,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Without --adapter: cut channels of the hidden size, not directions.")
    ] = False,
    refit: Annotated[
        bool | None, typer.Option(help="Judge shapes by refitted models, or by closed gates; refitted where possible.")
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="Do not load the model: walk through it layer by layer, without gradients."),
    ] = False,
    judge: Annotated[
        bool | None,
        typer.Option(help="With --low-memory: judge shapes by their loss, in further walks, or predict it from one."),
    ] = None,
    effort: Level = Effort.normal,
    fresh: Fresh = False,
    clock_command: ClockCommand = None,
    **budget: Any,
) -> Said:
    """
    Find the best shape that meets a budget here, and write its plan.

    All legal shapes are searched; the answer is the one of least loss that was built and timed on this machine. If it
    cuts the hidden size, or that of heads, in a basis, the basis is written beside the plan, and `hawada slim --plan`
    finds it there. What was found so far is in plan.work meanwhile: the same command goes on from there after an
    interruption.

    With --low-memory heads and channels are ranked by what they do to the residual stream, and shapes are judged with
    the rest closed, nothing refitted.

    Give one of --speedup, --latency-ms and --fraction, or --max-parameters or --max-memory, or both.
    """
    from ...basis.bases import Bases, gated_bases
    from ...basis.stored import SUFFIX, save_basis
    from ...errors import HawAdaError
    from ...files.kept import clear_kept
    from ...latency.budget import LatencyBudget
    from ...search.budgeted import find_plan
    from ...search.refitted import obstacle
    from ...search.timed import check_regime, dense_model, regime_of
    from ...vanilla.family import locate
    from ...vanilla.loading import checked_device, load_model, load_skeleton
    from ..expected import expected_of
    from ..shared import effort_of, gates_of, read_batches

    hard = effort_of(effort, fresh=fresh, clock_command=clock_command)
    device = checked_device(budget["device"])
    limits = LatencyBudget(**budget)
    skeleton = load_skeleton(model)
    check_regime(skeleton, regime_of(skeleton, limits))  # before the work
    to.parent.mkdir(parents=True, exist_ok=True)
    batches = read_batches(calibration, model, seq_len=limits.length, examples=examples)
    if low_memory:
        from ...walked.plans import plan_checkpoint

        walking: dict[str, Any] = {"device": str(device), "spill": to.parent, "progress": progress}
        directions = _basis_of(model, batches, rotate, walking) if judge is not False else None
        found = plan_checkpoint(
            model, limits, batches, basis=directions, judge=judge is not False, effort=hard, **walking
        )
        beside = to.with_suffix(SUFFIX) if found.plan.rotated else None
        if beside is not None:
            save_basis(Bases(directions), beside)
        made = {"model": model, "data": calibration, "seq_len": limits.length, "examples": examples, "refitted": False}
        then = f"hawada slim {model} slim --plan {to} --calibration {calibration} --low-memory"
        return _written(found, skeleton, to, made, beside, then)
    gated = gates_of(load_model(model, device), adapter, hidden=hidden)
    towers = [layout.tower for layout in check_regime(dense_model(gated), regime_of(gated, limits))]
    refitted = not obstacle(gated, batches, towers) if refit is None else refit
    if progress is not None:
        say(expected_of(gated, batches, limits, hard, refit=refitted, rotate=rotate))
    work = to.with_suffix(WORK)
    if fresh:
        clear_kept(work)
    elif work.exists():
        say(f"{work} holds what an interrupted search has found: what belongs to this one is used (not with --fresh)")
    try:
        found = find_plan(
            gated, limits, batches, rotate=rotate, refit=refit, effort=hard, progress=progress, work=work
        )
    except HawAdaError:  # it would end like this again
        clear_kept(work)
        raise
    made = {"model": model, "data": calibration, "seq_len": limits.length, "examples": examples, "refitted": refitted}
    basis: Path | None = None
    if found.plan.in_bases:
        base, basis = gated.get_base_model(), to.with_suffix(SUFFIX)
        save_basis(gated_bases(base, locate(base), gated.active_adapters), basis)  # before the plan that needs it
    words = " ".join(["hawada slim", model, *([adapter] if adapter else []), f"slim --plan {to}"])
    said = _written(found, skeleton, to, made, basis, words)
    clear_kept(work)
    return said


def _basis_of(model: str, batches: list[Any], rotate: bool | None, walking: dict[str, Any]) -> Basis | None:
    """The basis of a model that is not loaded; None if it is not asked for, or there is none and nobody insists."""
    from ...errors import HawAdaError
    from ...walked.directions import checkpoint_basis

    if rotate is False:
        return None
    try:
        return checkpoint_basis(model, batches, **walking)
    except HawAdaError as error:
        if rotate:
            raise
        say(f"no hidden size is searched: {error}")
        return None


def _written(
    found: SearchResult, skeleton: PreTrainedModel, to: Path, made: dict[str, Any], basis: Path | None, then: str
) -> Said:
    """Write the plan and the search beside it, and say so."""
    from ...files.atomic import write_text
    from ...planning.cut import BESIDE
    from ...search.result import FORMAT

    beside, best = search_file(to), found.best
    write_text(to, found.plan.to_json())
    write_text(beside, json.dumps({"format": FORMAT, MADE: made} | found.figures()) + "\n")
    data = {
        "shape": best.shape.to_dict(),
        **({BESIDE: {tower: shape.to_dict() for tower, shape in best.beside}} if best.beside else {}),
        "measured_ms": best.measured_ms,
        "dense_ms": found.dense_ms,
        "speedup": found.speedup,
        "measured_loss": best.measured_loss,
        "parameters": best.parameters,
        "plan": str(to),
        "search": str(beside),
        "basis": None if basis is None else str(basis),
    }
    also = "" if basis is None else f", the basis that it keeps directions of to {basis}"
    return Said(f"{_table(found, skeleton)}\nplan written to {to}, the search to {beside}{also}", data, next=[then])


def _table(found: SearchResult, skeleton: PreTrainedModel) -> str:
    """The dense model and the shape."""
    best = found.best
    rows: list[tuple[object, ...]] = [
        ("latency, ms (measured)", f"{found.dense_ms:.3f}", f"{found.ms:.3f}", f"{found.speedup:.2f}x faster"),
        ("parameters", f"{skeleton.num_parameters():,}", f"{best.parameters:,}", ""),
    ]
    for part in found.plan.parts:
        of = f" of {part.tower}" if found.plan.beside else ""
        slim = part.shape.to_dict()
        rows += [
            (name.replace("num_", "").replace("_", " ") + of, size, slim[name], "")
            for name, size in part.dense.to_dict().items()
        ]
    if best.measured_loss is None:
        rows.append(("change of the residual stream", 0, f"{best.predicted_loss:.4f}", found.loss))
    else:
        times = f"perplexity about {math.exp(min(best.measured_loss, 50.0)):.2f} times the dense one's"
        said = times if skeleton.can_generate() else ""
        rows.append(("loss before training, nats", 0, f"{best.measured_loss:.4f}", said))
    limit = "" if math.isinf(found.limit_ms) else f"; allowed {found.limit_ms:.3f} ms"
    return "\n".join(
        [table(["", "dense", "slim", ""], rows), f"{found.table.regime}, {found.table.device_name}{limit}"]
    )


def check(model: str, calibration: str, **options: Any) -> None:
    """Refuse a budget that contradicts itself, and what is not there."""
    from ...latency.budget import LatencyBudget
    from ...sources import check_source

    check_data(calibration)
    if options["low_memory"]:
        names = {"adapter": "--adapter", "refit": "--refit"}
        given = {words: options[name] for name, words in names.items()} | {"--hidden": options["hidden"] or None}
        refuse(given, "does not go with --low-memory, which loads no model, takes no gradients and refits no shape")
        if options["judge"] is False:
            refuse({"--rotate": options["rotate"] or None}, "needs shapes that are judged: leave out --no-judge")
    else:
        refuse({"--judge": options["judge"]}, "goes with --low-memory")
    LatencyBudget(**{name: each for name, each in options.items() if name in LatencyBudget.__dataclass_fields__})
    check_source(model)


WORK = ".work"
"""Of the folder beside the plan in which a search keeps what it has found, until the plan is written."""

MADE = "made"
"""Where a search's file says what it was made of."""


def search_file(plan: Path) -> Path:
    """Where the search is that a plan came of."""
    return plan.with_suffix(".search.json")


def read_search(plan: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """
    The search beside a plan, for a report, and what it was made of; None and nothing if there is none.

    Raises:
        HawAdaError: if the file holds no search.
    """
    from ...errors import HawAdaError
    from ...search.result import FORMAT

    file = search_file(plan)
    if not file.is_file():
        return None, {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HawAdaError(f"{file} holds no search: {error}") from None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise HawAdaError(f"{file} holds no search of this version: plan again, or move it away")
    made = found.pop(MADE, {})
    return found, made


def read_plan(path: Path) -> Plan:
    """
    A plan from its file.

    Raises:
        HawAdaError: if it holds none, with the file's name.
        OSError: if it cannot be read.
    """
    from ...errors import HawAdaError
    from ...planning.plan import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (HawAdaError, UnicodeDecodeError) as error:
        raise HawAdaError(f"{path} holds no plan: {error}") from None
