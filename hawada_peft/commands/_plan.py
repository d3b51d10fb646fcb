"""`hawada plan` as a call."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model

from ..config import HawAdaConfig
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..progress import Progress
from ..recipes.readers import batches_of, load_examples
from ..search.budgeted import find_plan
from ..search.result import FORMAT, SearchResult
from ..search.timed import check_regime, regime_of
from ..vanilla.loading import load_model, load_skeleton
from ._regime import RegimeOptions, checked_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

BATCH = 8
"""Calibration examples per batch."""

SEQ_LEN = 256
"""Tokens per calibration example of a text, if nothing else is said."""

BATCH_TOKENS = BATCH * SEQ_LEN
"""Of longer texts so many tokens per batch, or one text: importance keeps a batch's activations."""


@dataclass(frozen=True)
class PlanResult:
    """
    What was found, and where the plan is.

    Args:
        search (`SearchResult`): the shape, the plan, the measured latency and the frontier.
        path (`Path`): the plan's file.
    """

    search: SearchResult
    path: Path

    @property
    def search_path(self) -> Path:
        """The file beside the plan with all that was looked at, for a report."""
        return self.path.with_suffix(".search.json")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        best = self.search.best
        return {
            "shape": best.shape.to_dict(),
            "measured_ms": best.measured_ms,
            "dense_ms": self.search.dense_ms,
            "speedup": self.search.speedup,
            "measured_loss": best.measured_loss,
            "parameters": best.parameters,
            "plan": str(self.path),
            "search": str(self.search_path),
        }

    def __str__(self) -> str:
        return f"{self.search}\nplan written to {self.path}"


def plan(
    model: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] = "plan.json",
    speedup: float | None = None,
    latency_ms: float | None = None,
    fraction: float | None = None,
    max_parameters: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
    examples: int = 64,
    hidden: bool = False,
    refit: bool | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
    **regime: Unpack[RegimeOptions],
) -> PlanResult:
    """
    Find the shape of least loss that meets a budget on this machine, and write the plan for it.

    Beside the plan, as `plan.search.json`, lies what was looked at (`SearchResult.to_dict`), for `report`.

    Args:
        model: folder or id of the dense model.
        calibration: examples: `.safetensors` of inputs, `.npy`, or `.txt` for a language model; see `load_examples`.
        output: where to write the plan.
        speedup, latency_ms, fraction, max_parameters: the budget, as in `LatencyBudget`.
        adapter: folder or id of trained gates; fresh ones, ranked by Fisher importance, if left out.
        examples: calibration examples at most.
        hidden: without an adapter: cut the hidden size, too.
        refit: judge shapes by slim models that are refitted on the examples, or, with `False`, by closed gates alone;
            refitted where that is possible, if left out. As in `find_plan`.
        effort: how hard to measure and to look, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        regime: `mode`, `batch_size`, `seq_len`, `image_size`, `dtype`, `backend`, `device`: see `RegimeOptions`. The
            device is the CPU if left out.

    Raises:
        InfeasibleBudgetError: if no shape meets the budget, with the range that can be reached.
        InvalidBudgetError: if the budget contradicts itself.
        HawAdaError: on examples that cannot be read.
        OSError: if there is no such file, or no place for the plan.
    """
    regime["device"] = device = checked_device(regime.get("device"))
    budget = LatencyBudget(
        speedup=speedup,
        latency_ms=latency_ms,
        fraction=fraction,
        max_parameters=max_parameters,
        **regime,
    )
    path, name = Path(output), os.fspath(model)
    skeleton = load_skeleton(name)
    check_regime(skeleton, regime_of(skeleton, budget))  # before the data and the weights are read
    path.parent.mkdir(parents=True, exist_ok=True)  # before the work
    length = budget.seq_len or SEQ_LEN
    size = max(1, min(BATCH, BATCH_TOKENS // length))
    batches = batches_of(load_examples(Path(calibration), name, length=length, count=examples), size)
    base = load_model(name, device)
    if adapter is None:
        kinds = ("heads", "ffn", "layers", "hidden") if hidden else ("heads", "ffn", "layers")
        gated: PeftModel = get_peft_model(base, HawAdaConfig(gates=kinds))
    else:
        gated = PeftModel.from_pretrained(base, os.fspath(adapter))
    found = find_plan(gated, budget, batches, refit=refit, effort=effort, progress=progress)
    result = PlanResult(found, path)
    _write(result)
    return result


def _write(result: PlanResult) -> None:
    """What is kept of a search."""
    result.path.write_text(result.search.plan.to_json(), encoding="utf-8")
    result.search_path.write_text(json.dumps({"format": FORMAT} | result.search.to_dict()) + "\n", encoding="utf-8")
