"""The arguments of gate training, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..distil.arguments import rate_problems
from ..distil.objective import Distillation
from ..errors import HawAdaError
from ..gates.relaxation import RELAXATIONS
from .comparison import KEEPS


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class GateTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments`, and how gates are trained.

    Args:
        relaxation (`str`): `"straight_through"`, which computes the plan that the gates would get now; `"closing"`,
            which keeps the order of the start; `"hard_concrete"`, which is drawn to a shape by a penalty.
        warmup_fraction (`float`): the part of the steps before the gates move, in [0, 1].
        soft_fraction (`float`): the part of the steps before the plan is made, in [0, 1].
        gate_learning_rate (`float`, *optional*): of the gates, where other weights (LoRA) are trained with
            `learning_rate`.
        calibration_examples (`int`): how many examples start the gates and judge shapes; 0 leaves gates as they are.
        keep_better (`str`): by what the better of the trained gates and their start is kept at the end, on a quarter
            as many examples, one of eight of the data at most, that are never trained on. `"both"`: what was trained
            is kept if it is worse neither as sliced nor as refitted; `"sliced"` or `"refitted"`: by that alone;
            `"never"`: whatever was trained is kept, and nothing is set aside. Without `calibration_examples`, and of
            data without a length, nothing is compared.
        kd_temperature (`float`): T of the KL divergence.
        kl_weight (`float`): weight of the divergence.
        mse_weight (`float`): weight of the squared difference of logits.
        size_weight (`float`): weight of the penalty on the size, where the relaxation needs one.
        bimodality_weight (`float`): weight of `bimodality_penalty`.
        floor_weight (`float`): weight of `floor_penalty`.
        keep_floor (`float`): the least keep ratio of a layer, in that penalty, in [0, 1].

    All others are those of `TrainingArguments`.

    Raises:
        HawAdaError: listing everything that is wrong.

    Example:

        >>> args = GateTrainingArguments("out", use_cpu=True, learning_rate=0.02, soft_fraction=0.5)
        >>> args.relaxation, args.soft_fraction
        ('straight_through', 0.5)
    """

    relaxation: str = _option("straight_through", f"What soft gates multiply by: {', '.join(RELAXATIONS)}.")
    warmup_fraction: float = _option(0.0, "Part of the steps before the gates move.")
    soft_fraction: float = _option(0.25, "Part of the steps before the plan is made.")
    gate_learning_rate: float | None = _option(None, "Of the gates, where LoRA is trained with learning_rate.")
    calibration_examples: int = _option(64, "Examples that start the gates and judge shapes; 0: gates stay.")
    keep_better: str = _option("both", f"By what trained gates or their start are kept: {', '.join(KEEPS)}.")
    kd_temperature: float = _option(1.0, "Temperature of the KL divergence.")
    kl_weight: float = _option(1.0, "Weight of the KL divergence to the dense model.")
    mse_weight: float = _option(0.0, "Weight of the squared difference of logits.")
    size_weight: float = _option(10.0, "Weight of the penalty on the size.")
    bimodality_weight: float = _option(0.0, "Weight of the penalty on undecided gates.")
    floor_weight: float = _option(0.0, "Weight of the penalty on layers that close.")
    keep_floor: float = _option(0.25, "Least keep ratio of a layer in that penalty.")

    def __post_init__(self) -> None:
        problems = gate_problems(vars(self)) + rate_problems(vars(self))
        if problems:
            raise HawAdaError("\n".join(problems))
        super().__post_init__()

    @classmethod
    def of(cls, args: TrainingArguments | None) -> GateTrainingArguments:
        """These arguments, with the defaults for what plain `TrainingArguments` do not say."""
        if isinstance(args, cls):
            return args
        if args is None:
            return cls("trainer_output")
        if not isinstance(args, TrainingArguments):
            raise HawAdaError(f"args must be GateTrainingArguments, got a {type(args).__name__}")
        return cls(**{each.name: getattr(args, each.name) for each in fields(TrainingArguments) if each.init})


GATE_OPTIONS: dict[str, Any] = {
    each.name: each.default
    for each in fields(GateTrainingArguments)
    if each.name not in TrainingArguments.__dataclass_fields__
}
"""What `GateTrainingArguments` adds, with the defaults."""


def gate_problems(given: Mapping[str, Any]) -> list[str]:
    """
    What is wrong with the options of gate training, one line each.

    Args:
        given: values by the names of `GateTrainingArguments`; others are ignored, what is left out has its default.
    """
    values = GATE_OPTIONS | {name: given[name] for name in GATE_OPTIONS if name in given}
    problems = []
    if values["relaxation"] not in list(RELAXATIONS):
        problems.append(f"relaxation must be one of {list(RELAXATIONS)}, got {values['relaxation']!r}")
    if values["keep_better"] not in KEEPS:
        problems.append(f"keep_better must be one of {list(KEEPS)}, got {values['keep_better']!r}")
    numbers = [name for name, default in GATE_OPTIONS.items() if not isinstance(default, str)]
    wrong = {name: values[name] for name in numbers if not _is_number(values[name]) and values[name] is not None}
    wrong |= {name: None for name in numbers if values[name] is None and GATE_OPTIONS[name] is not None}
    if wrong:
        return [*problems, f"these must be finite numbers: {wrong}"]
    warmup, soft = values["warmup_fraction"], values["soft_fraction"]
    if not 0 <= warmup <= soft <= 1:
        problems.append(
            "warmup_fraction and soft_fraction must be in [0, 1], the first not above the second, got "
            f"{warmup} and {soft}"
        )
    names = ("gate_learning_rate", "size_weight", "bimodality_weight", "floor_weight", "calibration_examples")
    if negative := {name: values[name] for name in names if (values[name] or 0) < 0}:
        problems.append(f"these must not be negative: {negative}")
    if not 0 <= values["keep_floor"] <= 1:
        problems.append(f"keep_floor must be in [0, 1], got {values['keep_floor']}")
    if int(values["calibration_examples"]) != values["calibration_examples"]:
        problems.append(f"calibration_examples must be a whole number, got {values['calibration_examples']}")
    try:
        Distillation(values["kd_temperature"], values["kl_weight"], values["mse_weight"])
    except HawAdaError as error:
        problems.append(str(error))
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
