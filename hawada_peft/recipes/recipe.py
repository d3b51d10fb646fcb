"""
The recipe: a whole slimming as data, checked before any of it is done.

Long because each section becomes the arguments of another class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from ..config import HawAdaConfig
from ..distil.arguments import rate_problems
from ..distil.muon import optimizer_problems
from ..distil.objective import Distillation
from ..errors import HawAdaError
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..planning.sizes import ratio_problems
from ..race.race import Race
from ..training.arguments import GateTrainingArguments, gate_problems
from ..vanilla.shape import Shape
from .document import override, read_mapping
from .schema import fields_of, validated
from .settings import DataSource, ReconstructionStep, SearchStep

ENOUGH = 100
"""Steps of a recovery from which on there is a race unless the recipe says otherwise."""

DEFAULTS: dict[str, Any] = {"save_total_limit": 2, "logging_steps": 10}
"""Of both trainings, where the recipe and `TrainingArguments` differ."""


@dataclass(frozen=True)
class Recipe:
    """
    A slimming from the dense model to the verified folder. All of it has been checked when a recipe exists.

    Args:
        model (`str`): folder or id of the dense model.
        output (`str`): folder for everything that is made.
        data (`dict`): fields of `DataSource`: files or a dataset, tokens per window, examples held out.
        budget (`dict`, *optional*): fields of `LatencyBudget`. One of `budget`, `shape` and `keep_ratio` is given.
        shape (`dict`, *optional*): fields of `Shape`; of several towers by their paths, as in `HawAdaModel.plan`.
        keep_ratio (`float` or `dict`, *optional*): as in `HawAdaModel.plan`.
        plan (`str`, *optional*): file of a plan to cut by, without training gates; with a `budget`, timed under that.
        search (`dict`, *optional*): how a budget becomes a shape: `effort` (fields of `Effort`), `quick` (what it
            leaves out is as in `Effort.quick`), `clock` (`"real"`, or `"toy"`, by which nothing depends on the
            machine), `hidden_sizes`, `rotate` and `refit` of `find_plan`.
        gates (`dict`, *optional*): fields of `HawAdaConfig`; `lora` holds those of PEFT's `LoraConfig`.
        training (`dict`, *optional*): fields of `GateTrainingArguments`.
        reconstruction (`dict`, *optional*): `examples` and `batch_size` of the least squares; none if left out.
        recovery (`dict`, *optional*): options of `recover` and fields of `TrainingArguments`; none if left out.
            `lora` holds fields of `LoraConfig`; all weights are trained without it.
        race (`dict` or `bool`, *optional*): fields of `Race`: the plan of the gates races against others for what
            recovers best, within the budget. Left out, there is a race where there are a budget and a recovery of
            `ENOUGH` steps; `false` for none.
        dtype (`str`): of the weights in training: `"auto"` is what they were saved in.
        save_dtype (`str`, *optional*): of the slim model; `dtype` if left out.
        seed (`int`): of both trainings.

    Raises:
        HawAdaError: listing everything that is wrong, with the names that are allowed.

    Example:

        >>> from hawada_peft.recipes import steps_of
        >>> recipe = Recipe(model="teacher", output="out", data={"files": "text.txt"}, keep_ratio=0.5)
        >>> print(steps_of(recipe)[-1])
        save the slim model, reloaded and compared first, with card and report: out/slim
    """

    model: str
    output: str
    data: dict[str, Any]
    budget: dict[str, Any] | None = None
    shape: dict[str, Any] | None = None
    keep_ratio: float | dict[str, float] | None = None
    plan: str | None = None
    search: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    reconstruction: dict[str, Any] | None = None
    recovery: dict[str, Any] | None = None
    race: dict[str, Any] | bool | None = None
    dtype: str = "auto"
    save_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        values, problems = validated(given)
        if problems:
            raise HawAdaError("\n".join(problems))
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for name, make in self._makers().items():  # values are judged by the classes that they go to
            try:
                make()
            except (HawAdaError, TypeError, ValueError) as error:
                problems += [f"{name}: {line}" for line in str(error).splitlines()]
        if problems:
            raise HawAdaError("\n".join(problems))

    @classmethod
    def read(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
        """
        Read a YAML file.

        Args:
            path: the file.
            overrides: `"section.name=value"`, the value as YAML; `null` leaves the name (or the section) out.

        Raises:
            HawAdaError: as for `Recipe`, or if the file is no YAML mapping.
            FileNotFoundError: if there is no such file.
        """
        data = read_mapping(path)
        for each in overrides:
            override(data, each)
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """
        A recipe from plain values.

        Raises:
            HawAdaError: as for `Recipe`.
        """
        values, problems = validated(data)
        if problems:
            raise HawAdaError("\n".join(problems))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What was given, for YAML or JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    # ------------------------------------------------------------ as objects

    def source(self) -> DataSource:
        """Where the data is."""
        return DataSource(**self.data)

    def goal(self) -> dict[str, Any]:
        """The argument of `HawAdaTrainer` that says what the gates are trained towards."""
        if self.budget is not None:
            return {"budget": LatencyBudget(**self.budget)}
        if self.shape is None:
            return {"keep_ratio": self.keep_ratio}
        several = any("." in name for name in self.shape)
        return {"shape": dict(self.shape) if several else Shape(**self.shape)}

    def config(self) -> HawAdaConfig:
        """The gates' configuration."""
        return HawAdaConfig(**(self.gates or {}))

    def options(self) -> dict[str, Any]:
        """What of `recovery` is no training argument."""
        allowed = TrainingArguments.__dataclass_fields__
        return {name: value for name, value in (self.recovery or {}).items() if name not in allowed and name != "lora"}

    def lora(self) -> LoraConfig | None:
        """LoRA of the recovery."""
        fields_of_lora = (self.recovery or {}).get("lora")
        return None if fields_of_lora is None else LoraConfig(**fields_of_lora)

    def racing(self) -> Race | None:
        """
        The race before the recovery, if there is one.

        Raises:
            HawAdaError: with every impossible number; or if there is no recovery to race for.
        """
        if self.race is False:
            return None
        steps = (self.recovery or {}).get("max_steps")
        if self.race is None and (self.recovery is None or self.budget is None or (steps or ENOUGH) < ENOUGH):
            return None
        if self.recovery is None:
            raise HawAdaError("a race is for what recovers best: give a recovery, or race: false")
        given = dict(self.race) if isinstance(self.race, Mapping) else {}
        if "preparations" in given:
            given["preparations"] = tuple(given["preparations"])
        budget = None if self.budget is None else LatencyBudget(**self.budget)
        return Race(budget, effort=self.effort(), **given)

    def arguments(self, section: str, folder: Path) -> TrainingArguments:
        """
        The training arguments of `training` or `recovery`.

        Raises:
            HawAdaError: if transformers refuses them on this machine.
        """
        cls = GateTrainingArguments if section == "training" else TrainingArguments
        given = {name: value for name, value in (getattr(self, section) or {}).items() if name in fields_of(cls)}
        defaults = DEFAULTS | {"seed": self.seed}
        if section == "training":  # by what becomes of the gates afterwards
            defaults["keep_better"] = "sliced" if self.reconstruction is None else "refitted"
        try:
            return cls(output_dir=str(folder), **(defaults | given))
        except (TypeError, ValueError, ImportError) as error:
            raise HawAdaError(f"{section}: {error}") from None

    def effort(self) -> Effort:
        """
        How hard latency is measured and the shape for a budget searched.

        Raises:
            HawAdaError: with every impossible number.
        """
        return SearchStep(**(self.search or {})).made()

    def searching(self) -> dict[str, Any]:
        """The arguments of `HawAdaTrainer` that say how a budget becomes a shape."""
        search = self.search or {}
        names = ("hidden_sizes", "rotate", "refit")
        return {"effort": self.effort()} | {name: search[name] for name in names if name in search}

    def times(self) -> bool:
        """Whether the recipe says under which conditions latency is measured."""
        return self.budget is not None

    # ----------------------------------------------------------------- checks

    def _makers(self) -> dict[str, Callable[[], Any]]:
        return {
            "recipe": lambda: _refuse([] if self.keep_ratio is None else _ratio_problems(self.keep_ratio)),
            "data": self.source,
            "budget" if self.budget is not None else "shape": self.goal,
            "search": self.effort,
            "gates": self.config,
            "reconstruction": lambda: ReconstructionStep(**(self.reconstruction or {})),
            "recovery.lora": self.lora,
            "training": lambda: _refuse(gate_problems(self.training or {}) + rate_problems(self.training or {})),
            "recovery": lambda: _refuse(
                rate_problems(self.recovery or {}) + optimizer_problems(self.options().get("optimizer", "auto"))
            ),
            "recovery loss": lambda: _objective(self.options()),
            "race": self.racing,
        }


def _ratio_problems(keep_ratio: Any) -> list[str]:
    """What is wrong with a ratio; before a dot may stand a tower, which only the model knows."""
    if not isinstance(keep_ratio, Mapping) or not any("." in str(name) for name in keep_ratio):
        return ratio_problems(keep_ratio)
    each = [{str(name).rpartition(".")[2]: ratio} for name, ratio in keep_ratio.items()]
    return [problem for ratio in each for problem in ratio_problems(ratio)]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise HawAdaError("\n".join(problems))


def _objective(options: Mapping[str, Any]) -> Distillation:
    return Distillation(**{name: options[name] for name in Distillation.__dataclass_fields__ if name in options})
