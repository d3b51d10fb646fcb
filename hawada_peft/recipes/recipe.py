"""
The recipe: a whole slimming as data, checked before any of it is done.

Long because whatever can be wrong with a recipe is found in one place, before any work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ..config import HawAdaConfig
from ..distil.arguments import rate_problems
from ..distil.muon import optimizer_problems
from ..distil.objective import Distillation
from ..errors import HawAdaError
from ..latency.budget import LatencyBudget
from ..latency.clock import Clock
from ..latency.effort import Effort
from ..latency.regime import DTYPES
from ..latency.toy import ToyClock
from ..planning.sizes import ratio_problems
from ..race.race import Race
from ..training.arguments import GateTrainingArguments, gate_problems
from ..vanilla.shape import Shape
from .document import parsed, read_mapping, shown
from .schema import checked, fields_of, sections, unknown_names
from .settings import DataSource, ReconstructionStep

ENOUGH = 100
"""Steps of a recovery from which on there is a race unless the recipe says otherwise."""

GOALS = ("budget", "shape", "keep_ratio")
CLOCKS: dict[str, Callable[[], Clock]] = {"real": Clock, "toy": ToyClock}
"""What a recipe may name as the clock."""

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
        shape (`dict`, *optional*): fields of `Shape`.
        keep_ratio (`float` or `dict`, *optional*): as in `HawAdaModel.plan`.
        search (`dict`, *optional*): how a budget becomes a shape: `effort` (fields of `Effort`), `quick` (what it
            leaves out is as in `Effort.quick`), `clock` (`"real"`, or `"toy"`, by which nothing depends on the
            machine), `hidden_sizes` and `refit` of `find_plan`.
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

        >>> recipe = Recipe(model="teacher", output="out", data={"files": "text.txt"}, keep_ratio=0.5)
        >>> print(recipe.steps()[-1])
        save the slim model, reloaded and compared first, with card and report: out/slim
    """

    model: str
    output: str
    data: dict[str, Any]
    budget: dict[str, Any] | None = None
    shape: dict[str, Any] | None = None
    keep_ratio: float | dict[str, float] | None = None
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
        problems: list[str] = []
        allowed = sections()
        for name in ("data", "budget", "shape", "search", "gates", "training", "reconstruction", "recovery", "race"):
            if getattr(self, name) is not None and not (name == "race" and isinstance(self.race, bool)):
                section = _checked_deep(name, getattr(self, name), allowed, problems)
                object.__setattr__(self, name, section)
        problems += self._problems()
        if not problems:  # values are judged by the classes that they go to; wrong types would confuse those
            for name, make in self._makers().items():
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
        for override in overrides:
            _override(data, override)
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """
        A recipe from plain values.

        Raises:
            HawAdaError: as for `Recipe`.
        """
        allowed = [field.name for field in fields(cls)]
        problems = list(unknown_names("recipe", data, allowed))
        missing = [name for name in ("model", "output", "data") if data.get(name) is None]
        if missing:
            problems.append(f"recipe: missing {missing}")
        known = {name: value for name, value in data.items() if name in allowed and value is not None}
        try:
            recipe = cls(**({"model": "?", "output": "?", "data": {"files": "?"}} | known))
        except HawAdaError as error:
            raise HawAdaError("\n".join([*problems, str(error)])) from None
        if problems:
            raise HawAdaError("\n".join(problems))
        return recipe

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
        return {"keep_ratio": self.keep_ratio} if self.shape is None else {"shape": Shape(**self.shape)}

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
        search = self.search or {}
        name = search.get("clock") or "real"
        if name not in CLOCKS:
            raise HawAdaError(f"search.clock must be one of {list(CLOCKS)}, got {name!r}")
        make = Effort.quick if search.get("quick") else Effort
        return make(clock=CLOCKS[name](), **(search.get("effort") or {}))

    def searching(self) -> dict[str, Any]:
        """The arguments of `HawAdaTrainer` that say how a budget becomes a shape."""
        search = self.search or {}
        return {"effort": self.effort()} | {name: search[name] for name in ("hidden_sizes", "refit") if name in search}

    def steps(self) -> list[str]:
        """What will be done, in words."""
        goal = next(name for name in GOALS if getattr(self, name) is not None)
        data, training, folder = self.source(), self.training or {}, Path(self.output)
        where = ", ".join(data.paths()) or f"the dataset {data.dataset}"
        kinds = ", ".join(self.config().gates) + (" and LoRA" if (self.gates or {}).get("lora") else "")
        steps = [
            f"load {self.model} ({self.dtype}), and examples from {where}; {data.held_out} of them are held out",
            f"put gates in: {kinds}",
            f"train them{_length(training)} towards {goal} {_plain(getattr(self, goal))}",
            f"save the adapter: {folder / 'adapter'}",
            "merge: fold the gates, remove what the plan closes",
        ]
        if self.reconstruction is not None:
            refit = ReconstructionStep(**self.reconstruction)
            steps.append(f"refit the output projections on {refit.examples} examples")
        race = self.racing()
        if race is not None:
            steps.append(
                f"let the plan and at most {race.plans} others race with short recoveries; what recovers best goes on"
            )
        if self.recovery is not None:
            weights = "all weights" if self.recovery.get("lora") is None else "LoRA"
            steps.append(f"distil the dense model into the slim one{_length(self.recovery)}: {weights}")
        if self.times():
            steps.append(f"time both under {LatencyBudget(**(self.budget or {}))}")
        steps.append(f"save the slim model, reloaded and compared first, with card and report: {folder / 'slim'}")
        return steps

    def times(self) -> bool:
        """Whether the recipe says under which conditions latency is measured."""
        return self.budget is not None

    def missing(self) -> list[str]:
        """What this machine lacks: data files that are not there, packages that `report_to` names."""
        lost = [path for path in self.source().paths() if not Path(path).exists()]
        return lost + [each for section in ("training", "recovery") for each in _loggers_missing(self, section)]

    # ----------------------------------------------------------------- checks

    def _problems(self) -> list[str]:
        problems = []
        for name in ("model", "output"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                problems.append(f"{name} must be a name or a folder, got {shown(getattr(self, name))}")
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            problems.append(f"recipe: give one of {list(GOALS)}, got {given or 'none'}")
        if not isinstance(self.keep_ratio, int | float | dict | None) or isinstance(self.keep_ratio, bool):
            problems.append(
                f"keep_ratio must be a number, or a mapping of axes to numbers, got {shown(self.keep_ratio)}"
            )
        elif self.keep_ratio is not None:
            problems += ratio_problems(self.keep_ratio)
        for name, extra in (("dtype", "auto"), ("save_dtype", None)):
            if getattr(self, name) not in (*DTYPES, extra):
                problems.append(f"{name} must be one of {[*DTYPES, extra]}, got {shown(getattr(self, name))}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            problems.append(f"seed must be a whole number, got {shown(self.seed)}")
        return problems

    def _makers(self) -> dict[str, Callable[[], Any]]:
        return {
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


def _refuse(problems: list[str]) -> None:
    if problems:
        raise HawAdaError("\n".join(problems))


def _loggers_missing(recipe: Recipe, section: str) -> Iterator[str]:
    """What `Trainer` would find out when it begins."""
    wanted = (getattr(recipe, section) or {}).get("report_to")
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name in ("none", "all"):
            continue
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError) as error:
            yield f"{section}.report_to: {str(error).strip().splitlines()[0]}"


def _objective(options: Mapping[str, Any]) -> Distillation:
    return Distillation(**{name: options[name] for name in Distillation.__dataclass_fields__ if name in options})


def _checked_deep(name: str, given: Any, allowed: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A section, and the sections within it."""
    values = checked(name, given, allowed[name], problems)
    for key, value in values.items():
        if f"{name}.{key}" in allowed and isinstance(value, Mapping):
            values[key] = _checked_deep(f"{name}.{key}", value, allowed, problems)
    return values


def _override(data: dict[str, Any], text: str) -> None:
    """Set one value of nested mappings."""
    path, equals, value = text.partition("=")
    *outer, last = path.strip().split(".")
    if not equals or not last or "" in outer:
        raise HawAdaError(f"an override must be written as section.name=value, got {shown(text)}")
    for index, name in enumerate(outer):
        inner = data.get(name)
        if inner is not None and not isinstance(inner, dict):
            raise HawAdaError(
                f"{shown(text)}: {'.'.join(outer[: index + 1])} is {shown(inner)}, and holds no {last!r}"
            )
        data[name] = inner or {}
        data = data[name]
    data[last] = parsed(value, shown(text))
    if data[last] is None:
        del data[last]


def _length(training: Mapping[str, Any]) -> str:
    steps = training.get("max_steps", -1)
    if steps > 0:
        return f" for {steps} steps"
    return f" for {training.get('num_train_epochs', TrainingArguments.num_train_epochs):g} epochs"


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)
