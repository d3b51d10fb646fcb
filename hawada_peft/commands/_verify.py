"""`hawada verify` as a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import HawAdaError, InvalidPlanError, VerificationError
from ..files.checkpoint import Checkpoint
from ..files.foreign import config_problems, file_problems, tensor_problems
from ..files.names import REPORT_NAME
from ..files.verify import reload, verify_slim
from ..planning.plan import Plan
from ..shipping.passport import PassportLine
from ..shipping.reference import reference_logits
from ..shipping.runtimes import check_compile, check_onnx
from ..shipping.sizes import read_report, size_problems
from ..shipping.stream import NO_PLAN
from ..surgery.fold import gates_config
from ..vanilla.outputs import example_inputs, output_of
from ._slim import read_plan


@dataclass(frozen=True)
class Check:
    """
    One check.

    Args:
        name (`str`): what was looked at.
        ok (`bool`, *optional*): whether it is as it should be; None if it could not be checked.
        detail (`str`): what was found.
    """

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{'-' if self.ok is None else 'ok' if self.ok else 'FAILED':6}  {self.name:8}  {self.detail}"


@dataclass(frozen=True)
class VerifyResult:
    """
    What was found out about a slim folder.

    Args:
        folder (`Path`): the folder.
        checks (`tuple[Check, ...]`): one after the other.
    """

    folder: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.ok is not False for check in self.checks)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong."""
        return tuple(f"{check.name}: {check.detail}" for check in self.checks if check.ok is False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"folder": str(self.folder), "ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        verdict = "vanilla, and what it should be" if self.ok else "do not use this folder"
        return "\n".join([*map(str, self.checks), f"{self.folder}: {verdict}"])


def verify(
    slim: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    plan: str | os.PathLike[str] | None = None,
    fold: bool = True,
    compile: bool = False,
    onnx: bool = False,
) -> VerifyResult:
    """
    Check that a slim folder is vanilla and computes what it should. Nothing in it is changed.

    It must load through its Auto class with exactly the weights of its class, from safetensors files, without fields,
    tensors or code of this package; have the sizes that its `hawada_report.json` says, if there is one; and give
    finite outputs.

    Args:
        slim: the folder.
        base: folder or id of the dense model: the slim one must be smaller.
        adapter: folder or id of the gates, with `base`: logits of the gated model are compared, too.
        plan: file of the plan that the export was made with; the report's, or that of the adapter, if left out.
        fold: whether the export folded the gates' soft values.
        compile: also run it under `torch.compile`.
        onnx: also export it to ONNX and run that. Needs `pip install hawada_peft[onnx]`.

    Returns:
        `VerifyResult`: what was found; `ok` tells whether all is well. A folder that is wrong raises nothing.

    Raises:
        FileNotFoundError: if there is no such folder.
        HawAdaError: on options that do not fit together, a missing plan, or an adapter that does not fit.
    """
    folder = Path(slim)
    if adapter is not None and base is None:
        raise HawAdaError("adapter needs base: the dense model that the gates are for; give it as well")
    if plan is not None and adapter is None:
        raise HawAdaError("plan needs adapter and base, whose logits are then compared; give them as well")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    checks = [
        _listed("files", file_problems(folder), "safetensors only, no code, no adapter"),
        _listed("config", config_problems(folder), "no field of this package, no custom code"),
        _listed("tensors", tensor_problems(folder), "none of gates or adapters"),
    ]
    try:
        auto, model = reload(folder)
    except VerificationError as error:
        return VerifyResult(folder, (*checks, Check("loads", False, str(error))))
    model.eval()
    checks.append(Check("loads", True, f"{auto.__name__}, strictly: {model.num_parameters():,} parameters"))
    checks.append(_sizes(folder, model))
    checks.append(_forward(model))
    if base is not None:
        checks.append(_smaller(model, base))
        if adapter is not None:
            checks.append(_logits(folder, base, adapter, None if plan is None else read_plan(plan), fold))
    asked: dict[str, tuple[bool, Callable[[PreTrainedModel], PassportLine]]] = {
        "compile": (compile, check_compile),
        "onnx": (onnx, check_onnx),
    }
    checks += [_run(name, run(model)) for name, (wanted, run) in asked.items() if wanted]
    return VerifyResult(folder, tuple(checks))


def _listed(name: str, problems: list[str], well: str) -> Check:
    return Check(name, not problems, "; ".join(problems[:5]) or well)


def _sizes(folder: Path, model: PreTrainedModel) -> Check:
    try:
        report = read_report(folder)
        if report is None:
            return Check("sizes", None, f"there is no {REPORT_NAME} to compare with")
        if "plan" not in report:
            return Check("sizes", None, f"{REPORT_NAME} names no plan to compare with")
        problems = size_problems(model, report)
    except HawAdaError as error:
        return Check("sizes", False, str(error))
    return _listed("sizes", problems, f"those of the plan in {REPORT_NAME}: {Plan.from_dict(report['plan'])}")


def _forward(model: PreTrainedModel) -> Check:
    found = output_of(model, example_inputs(model))
    finite = bool(found.isfinite().all())
    return Check("forward", finite, f"outputs of {tuple(found.shape)} are {'' if finite else 'not '}all finite")


def _smaller(model: PreTrainedModel, base: str | os.PathLike[str]) -> Check:
    dense, slim = Checkpoint(base).skeleton.num_parameters(), model.num_parameters()
    return Check("smaller", slim < dense, f"{slim:,} parameters, the dense model has {dense:,}")


def _logits(
    folder: Path, base: str | os.PathLike[str], adapter: str | os.PathLike[str], plan: Plan | None, fold: bool
) -> Check:
    report = read_report(folder) or {}
    if _refitted(report):
        why = "its projections were refitted on calibration data, so it does not compute what the gated model does"
        return Check("logits", None, f"{REPORT_NAME} says that {why}")
    applied = report.get("plan") or gates_config(adapter).to_dict()["plan"]
    if plan is None and applied is None:
        raise InvalidPlanError(NO_PLAN)
    chosen = Plan.from_dict(applied) if plan is None else plan
    expected, inputs = reference_logits(Checkpoint(base).folder, adapter, chosen, fold=fold)
    try:
        found = verify_slim(folder, expected, inputs)
    except VerificationError as error:
        return Check("logits", False, f"{error} (A model that was trained or refitted after the merge differs, too.)")
    return Check(
        "logits", True, f"differ from the gated model's by at most {found.max_difference:.2g} of {found.scale:.3g}"
    )


def _refitted(report: Mapping[str, Any]) -> bool:
    reconstruction = report.get("reconstruction")
    return isinstance(reconstruction, Mapping) and bool(reconstruction.get("applied"))


def _run(name: str, line: PassportLine) -> Check:
    return Check(name, line.answer == "yes", line.detail)
