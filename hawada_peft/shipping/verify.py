"""
Whether a slim folder is vanilla, whole, and computes what it should.

Long because it lists every check of a folder, each a few lines.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..basis.attach import give_bases
from ..basis.bases import Bases, plan_turn
from ..basis.basis import Basis
from ..discovery.inputs import example_inputs
from ..errors import HawAdaError, IncompatibleBaseError, InvalidPlanError, VerificationError
from ..files.checkpoint import Checkpoint
from ..files.digests import digest_problems
from ..files.foreign import config_problems, file_problems, tensor_problems
from ..files.names import REPORT_NAME
from ..files.verify import compare, reload
from ..planning.plan import Plan
from ..surgery.fold import gates_config
from ..surgery.slimming import slim
from ..vanilla.batches import Batch, check_batch
from ..vanilla.family import locate
from ..vanilla.outputs import output_of, outputs_of
from ..vanilla.rehoming import has_twin, twin_skeleton
from ..vanilla.skeleton import auto_class_of
from .checks import Check, Verification
from .passport import PassportLine
from .report import FORMAT, read_report, size_problems
from .runtimes import check_compile, check_onnx
from .stream import NO_PLAN

Reference = nn.Module | torch.Tensor | Mapping[str, torch.Tensor]
"""What a slim model must compute: a model, its logits, or all its outputs by name."""

RUNTIMES: dict[str, Callable[[PreTrainedModel], PassportLine]] = {"compile": check_compile, "onnx": check_onnx}
"""What a folder can be run in beside transformers, by the name that `verify_slim` takes."""


def verify_slim(
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    plan: Plan | None = None,
    fold: bool = True,
    reference: Reference | None = None,
    inputs: Batch | None = None,
    runtimes: Sequence[str] = (),
    tolerance: float | None = None,
) -> Verification:
    """
    Check that a slim folder is vanilla, whole, and computes what it should. Nothing in it is changed.

    It must load through its Auto class with exactly the weights of its class, all finite, from safetensors files,
    without fields, tensors or code of this package; hold the files that its `hawada_report.json` lists, with the same
    bytes, and the sizes that it says; and give finite outputs.

    Args:
        folder: what `save_slim` or `slim_checkpoint` wrote.
        base: folder or id of the dense model: the slim one must be smaller.
        adapter: folder or id of the gates, with `base`: what the gated model computes is compared, too.
        plan (`Plan`, *optional*): that the export was made with; the report's, or that of the adapter, if left out.
        fold (`bool`): whether the export folded the gates' soft values.
        reference (*optional*): the model in memory (slim, or gated under its plan), all of whose outputs are compared;
            or the logits of one for `inputs`, or all its outputs by name, as `outputs_of` gives them.
        inputs (*optional*): what to compare on; drawn at random if left out. Needed with logits.
        runtimes (`tuple[str, ...]`): of `"compile"` and `"onnx"`: run it there as well.
        tolerance (`float`, *optional*): allowed difference relative to the largest logit; by dtype if left out.

    Returns:
        `Verification`: what was found; `ok` tells whether all is well. A folder that is wrong raises nothing;
        `require()` does.

    Raises:
        FileNotFoundError: if there is no such folder.
        HawAdaError: on options that do not fit together, a missing plan, or an adapter or base that does not fit.
    """
    if not isinstance(folder, str | os.PathLike):
        raise HawAdaError(f"folder must be a folder, got {folder!r}")
    folder = Path(folder)
    if adapter is not None:
        gates_config(adapter)
    _check_options(folder, base, adapter, plan, reference, inputs, runtimes, tolerance)
    checks = [
        _listed("files", file_problems(folder), "safetensors only, no code, no adapter"),
        _listed("config", config_problems(folder), "no field of this package, no custom code"),
        _listed("tensors", tensor_problems(folder), "none of gates or adapters"),
    ]
    try:
        auto, model = reload(folder)
    except VerificationError as error:
        return Verification(folder, (*checks, Check("loads", False, str(error))))
    model.eval()
    expected = type(reference) if isinstance(reference, PreTrainedModel) else type(model)
    right = type(model) is expected
    detail = f"{auto.__name__}, strictly: {model.num_parameters():,} parameters"
    checks.append(
        Check("loads", right, detail if right else f"as {type(model).__name__}, saved was {expected.__name__}")
    )
    checks.append(_listed("finite", _broken(model), "all weights"))
    checks += _report(folder, model)
    measured: tuple[float | None, float | None] = (None, None)
    if right:
        check, measured = _outputs(model, reference, inputs, tolerance)
        checks.append(check)
    if base is not None:
        checks.append(_smaller(model, base))
        if adapter is not None:
            checks.append(_logits(folder, model, base, adapter, plan, fold))
    for name in runtimes:
        line = RUNTIMES[name](model)
        checks.append(Check(name, line.answer == "yes", line.detail))
    return Verification(folder, tuple(checks), auto.__name__, model.num_parameters(), *measured)


def reference_outputs(
    base: Path, adapter: str | os.PathLike[str] | None, plan: Plan, *, fold: bool, basis: Basis | Bases | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    The outputs that a slim model must compute, from the dense model in memory, and their inputs.

    Args:
        base: the dense model's folder.
        adapter, plan, fold, basis: as in `slim_checkpoint`.
    """
    skeleton = Checkpoint(base).skeleton
    dense = auto_class_of(skeleton).from_pretrained(base, dtype="auto")
    inputs = example_inputs(dense)
    if adapter is None:
        return outputs_of(slim(dense, plan, turn=plan_turn(dense, plan, Bases.of(basis))), inputs), inputs
    gated = PeftModel.from_pretrained(dense, os.fspath(adapter))
    give_bases(gated, plan, Bases.of(basis))
    if not fold:
        return outputs_of(gated.merge_and_unload(plan=plan, fold=False), inputs), inputs
    gated.apply_plan(plan)
    return outputs_of(gated, inputs), inputs


def _check_options(
    folder: Path,
    base: object,
    adapter: object,
    plan: object,
    reference: object,
    inputs: object,
    runtimes: Sequence[str],
    tolerance: float | None,
) -> None:
    if tolerance is not None and (not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf):
        raise HawAdaError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    if not isinstance(runtimes, Sequence):
        raise HawAdaError(f"runtimes must be among {sorted(RUNTIMES)}, got {runtimes!r}")
    if adapter is not None and base is None:
        raise HawAdaError("adapter needs base: the dense model that the gates are for; give it as well")
    if plan is not None and adapter is None:
        raise HawAdaError("plan needs adapter and base, whose logits are then compared; give them as well")
    if reference is not None and not isinstance(reference, nn.Module) and inputs is None:
        raise HawAdaError("pass the `inputs` that the reference logits were computed from")
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or isinstance(runtimes, str):
        raise HawAdaError(f"runtimes must be among {sorted(RUNTIMES)}, got {runtimes!r}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")


def _listed(name: str, problems: list[str], well: str) -> Check:
    more = f"; and {len(problems) - 5} more" if problems[5:] else ""
    return Check(name, not problems, "; ".join(problems[:5]) + more or well)


def _broken(model: nn.Module) -> list[str]:
    """Weights that hold NaN or infinity, also where no example touches them."""
    return [f"{name} holds NaN or infinity" for name, tensor in model.state_dict().items() if not _finite(tensor)]


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _report(folder: Path, model: PreTrainedModel) -> list[Check]:
    try:
        report = read_report(folder)
        if report is None:
            lacks = f"there is no {REPORT_NAME}: whether files were changed since, or are gone, cannot be told"
            return [Check("report", None, lacks)]
        if report.get("format") != FORMAT or isinstance(report["format"], bool):
            return [Check("report", False, f"{REPORT_NAME} is of format {report.get('format')!r}, not {FORMAT}")]
        checks = [_digests(folder, report), _sizes(model, report)]
    except HawAdaError as error:
        return [Check("report", False, str(error))]
    return checks


def _digests(folder: Path, report: Mapping[str, Any]) -> Check:
    stated = report.get("files")
    if not isinstance(stated, Mapping) or not stated:
        return Check("report", False, f"{REPORT_NAME} lists no files")
    return _listed("report", digest_problems(folder, stated), f"the {len(stated)} files that it lists, byte for byte")


def _sizes(model: PreTrainedModel, report: Mapping[str, Any]) -> Check:
    problems = size_problems(model, report)
    if "plan" not in report and not problems:
        return Check("sizes", None, f"{REPORT_NAME} names no plan to compare with")
    plan = Plan.from_dict(report["plan"]) if not problems else None
    return _listed("sizes", problems, f"those of the plan in {REPORT_NAME}: {plan}")


def _outputs(
    model: PreTrainedModel, reference: Reference | None, inputs: Batch | None, tolerance: float | None
) -> tuple[Check, tuple[float | None, float | None]]:
    if inputs is not None:
        check_batch(model, inputs)
    inputs = example_inputs(model) if inputs is None else inputs
    if reference is None:
        found = outputs_of(model, inputs)
        wrong = [f"{name} are not all finite" for name, tensor in found.items() if not _finite(tensor)]
        return _listed("forward", wrong, f"{', '.join(found)} are finite"), (None, None)
    expected: Mapping[str, torch.Tensor]
    match reference:
        case torch.Tensor():
            expected = {"logits": reference}
        case nn.Module():
            expected = outputs_of(reference, inputs)
        case _:
            expected = reference
    device = next((tensor.device for tensor in expected.values()), model.device)
    nn.Module.to(model, device)
    alone = isinstance(reference, torch.Tensor)
    found = {"logits": output_of(model, inputs)} if alone else outputs_of(model, inputs)
    try:
        measured = compare(found, expected, model.dtype, tolerance)
    except VerificationError as error:
        what = f"it computes something else than the model it was saved from: {error}"
        return Check("forward", False, what), (None, None)
    finally:
        nn.Module.to(model, "cpu")
    return Check("forward", True, f"outputs differ by at most {measured[0]:.2g} of {measured[1]:.3g}"), measured


def _smaller(model: PreTrainedModel, base: str | os.PathLike[str]) -> Check:
    dense = Checkpoint(base).skeleton
    layout = locate(dense)
    classes = {type(dense), *([type(twin_skeleton(layout))] if has_twin(layout) else [])}
    if type(model) not in classes:
        raise IncompatibleBaseError(
            f"base is a {type(dense).__name__}, the slim model a {type(model).__name__}: pass the base that it was "
            "cut from"
        )
    before, after = dense.num_parameters(), model.num_parameters()
    return Check("smaller", after < before, f"{after:,} parameters, the dense model has {before:,}")


def _logits(
    folder: Path,
    model: PreTrainedModel,
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    plan: Plan | None,
    fold: bool,
) -> Check:
    try:
        report = read_report(folder) or {}
    except HawAdaError:  # told by another check
        report = {}
    reconstruction = report.get("reconstruction")
    if isinstance(reconstruction, Mapping) and reconstruction.get("applied"):
        why = "its projections were refitted on calibration data, so it does not compute what the gated model does"
        return Check("logits", None, f"{REPORT_NAME} says that {why}")
    applied = report.get("plan") or gates_config(adapter).to_dict()["plan"]
    if plan is None and applied is None:
        raise InvalidPlanError(NO_PLAN)
    chosen = Plan.from_dict(applied) if plan is None else plan
    expected, inputs = reference_outputs(Checkpoint(base).folder, adapter, chosen, fold=fold)
    try:
        difference, scale = compare(outputs_of(model, inputs), expected, model.dtype)
    except VerificationError as error:
        why = f"it computes something else than the gated model: {error}"
        return Check("logits", False, f"{why} (A model that was trained or refitted after the merge differs, too.)")
    return Check("logits", True, f"differ from the gated model's by at most {difference:.2g} of {scale:.3g}")
