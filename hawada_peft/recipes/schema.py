"""Which names a recipe may hold, of which types. They are read off the classes that the values go to."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from peft import LoraConfig
from transformers import TrainingArguments

from ..config import HawAdaConfig
from ..distil.recovery import recover
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..race.race import Race
from ..training.arguments import GATE_OPTIONS, GateTrainingArguments
from ..vanilla.shape import Shape
from .document import shown
from .settings import DataSource, ReconstructionStep

Hints = dict[str, Any]

MANY = 40
"""From so many names on a message names the near misses, and not all that is allowed."""

_TRAINING = {"train_dataset", "plan", "calibration"}
_WRITTEN = {"plan", "plan_in_training", "base_sizes", "peft_type", "auto_mapping", "peft_version", "init_weights"}
_PLACES = {"output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "local_rank"}
_RACE = {"budget", "search", "effort", "latencies"}


def keywords(function: Any, *, leave_out: Collection[str] = ()) -> Hints:
    """The keyword-only arguments of a function that have defaults or types of their own, with their types."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    return {name: hints[name] for name in names if name not in leave_out}


def fields_of(cls: type, *, leave_out: Collection[str] = ()) -> Hints:
    """The fields of a dataclass that can be given, with their types."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: hints[name] for name in names if name not in leave_out}


def sections() -> dict[str, Hints]:
    """The names that each section of a recipe takes, with their types; nested sections with a dot."""
    arguments = fields_of(TrainingArguments, leave_out=_PLACES)
    own = {name: hint for name, hint in fields_of(GateTrainingArguments).items() if name in GATE_OPTIONS}
    mapping = dict[str, Any] | None
    return {
        "data": fields_of(DataSource),
        "budget": fields_of(LatencyBudget),
        "shape": fields_of(Shape),
        "search": {
            "effort": mapping,
            "quick": bool | None,
            "clock": str | None,
            "hidden_sizes": list[int] | None,
            "refit": bool | None,
        },
        "search.effort": fields_of(Effort, leave_out={"clock"}),
        "gates": fields_of(HawAdaConfig, leave_out=_WRITTEN) | {"lora": mapping},
        "gates.lora": fields_of(LoraConfig),
        "training": own | arguments,
        "reconstruction": fields_of(ReconstructionStep),
        "recovery": keywords(recover, leave_out=_TRAINING | _PLACES | {"inputs", "race"})
        | {"lora": mapping}
        | arguments,
        "recovery.lora": fields_of(LoraConfig),
        "race": fields_of(Race, leave_out=_RACE) | {"preparations": list[str]},
    }


def checked(name: str, given: Any, allowed: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """
    A section with whole numbers made floats where those are wanted.

    Args:
        name: of the section, for messages.
        given: what stands in the recipe.
        allowed: names and types.
        problems: what is wrong is added to it.
    """
    if not isinstance(given, Mapping):
        problems.append(f"{name} must be a mapping of names to values, got {shown(given)}")
        return {}
    problems += unknown_names(name, given, allowed)
    values = {}
    for key in (key for key in given if key in allowed):
        value, hint = given[key], allowed[key]
        kinds = set(_kinds(hint))
        if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
            value = float(value)
        if wrong := _wrong_type(value, hint):
            problems.append(f"{name}.{key} must be {wrong}, got {shown(value)}")
        values[key] = value
    return values


def unknown_names(section: str, given: Mapping[str, Any], allowed: Collection[str]) -> Iterator[str]:
    """A problem per name that is not allowed."""
    for name in given:
        if name in allowed:
            continue
        near = difflib.get_close_matches(str(name)[:MANY], allowed, n=3)
        meant = f"; near are {near}" if near else ""
        trains = TrainingArguments.__dataclass_fields__.keys() if "learning_rate" in allowed else set()
        own = [each for each in allowed if each not in trains]
        all_of_them = f"allowed are {own}" + (" and the fields of transformers.TrainingArguments" if trains else "")
        yield f"{section}: unknown name {shown(name)}{meant}" + (
            "" if near and len(own) > MANY else f"; {all_of_them}"
        )


def _kinds(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for each in get_args(hint):
            yield from _kinds(each)
    else:
        yield hint


def _wrong_type(value: Any, hint: Any) -> str | None:
    """What a value should have been, or None if it is that. What YAML has no word for is left to its class."""
    kinds = list(_kinds(hint))
    plain = [kind for kind in kinds if (get_origin(kind) or kind) in (bool, int, float, str, list, dict, type(None))]
    others = [kind for kind in kinds if kind not in plain]
    if any(get_origin(kind) is not None or not isinstance(kind, type) for kind in others):
        return None  # sequences, mappings, literals: their class says what it takes
    for kind in plain:
        try:
            type_validator("value", value, kind)
        except TypeError:
            continue
        return None
    names = ["nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in plain]
    return " or ".join(names) if plain else None
