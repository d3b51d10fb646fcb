"""What a recipe may hold: one type, read off the classes that its values go to, against which pydantic validates."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, Literal, get_type_hints

from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from typing_extensions import Required, TypedDict

from ..config import HawAdaConfig
from ..distil.recovery import recover
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.regime import DTYPES
from ..race.race import Race
from ..training.arguments import GateTrainingArguments
from ..vanilla.shape import Shape
from .document import shown
from .settings import DataSource, ReconstructionStep, SearchStep

Hints = dict[str, Any]
Place = tuple[str | int, ...]

GOALS = ("budget", "shape", "keep_ratio", "plan")
"""What gates may be trained towards: a recipe says one of them."""

REQUIRED = ("model", "output", "data")
MANY = 40
"""From so many names on a message names the near misses, and not all that is allowed."""

_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
_TRAINING = {"train_dataset", "plan", "calibration", "inputs", "race"}
_WRITTEN = {"plan", "plan_in_training", "base_sizes", "peft_type", "auto_mapping", "peft_version", "init_weights"}
_PLACES = {"output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "local_rank"}
_RACE = {"budget", "search", "effort", "latencies"}


def fields_of(cls: type, *, leave_out: Collection[str] = ()) -> Hints:
    """The fields of a dataclass that can be given, with their types."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: hints[name] for name in names if name not in leave_out}


def keywords(function: Any, *, leave_out: Collection[str] = ()) -> Hints:
    """The keyword-only arguments of a function, with their types."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    return {name: hints[name] for name in names if name not in leave_out}


@cache
def sections() -> dict[str, Hints]:
    """
    The names that each section takes, with their types; sections within sections with a dot. A section's own type is
    what it may be beside a mapping.
    """
    number = float | dict[str, float]
    within = dict.fromkeys(("budget", "shape", "search", "gates", "training", "reconstruction", "recovery"))
    return {
        "recipe": {"model": str, "output": str, "data": None, "plan": str, "keep_ratio": number}
        | within
        | {"race": bool}
        | {"dtype": Literal[("auto", *DTYPES)], "save_dtype": Literal[DTYPES], "seed": int},
        "data": fields_of(DataSource),
        "budget": fields_of(LatencyBudget),
        "shape": fields_of(Shape),
        "search": fields_of(SearchStep) | {"effort": None},
        "search.effort": fields_of(Effort, leave_out={"clock"}),
        "gates": fields_of(HawAdaConfig, leave_out=_WRITTEN) | {"lora": None},
        "gates.lora": fields_of(LoraConfig),
        "training": fields_of(GateTrainingArguments, leave_out=_PLACES),
        "reconstruction": fields_of(ReconstructionStep),
        "recovery": keywords(recover, leave_out=_TRAINING | _PLACES)
        | {"lora": None}
        | fields_of(TrainingArguments, leave_out=_PLACES),
        "recovery.lora": fields_of(LoraConfig),
        "race": fields_of(Race, leave_out=_RACE) | {"preparations": list[str]},
    }


@cache
def _adapter() -> TypeAdapter[dict[str, Any]]:
    return TypeAdapter(_mapping("recipe"))


def _mapping(name: str) -> Any:
    """A section as a type: a mapping of some of its names to values."""
    hints = {}
    for key, hint in sections()[name].items():
        path = key if name == "recipe" else f"{name}.{key}"
        if path in sections():
            hint = _mapping(path) | hint
        hints[key] = Required[hint] if name == "recipe" and key in REQUIRED else hint
    make: Any = TypedDict
    found = make(name, hints, total=False)
    found.__pydantic_config__ = _STRICT
    return found


def validated(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    A recipe with whole numbers made floats where those are wanted, and everything that is wrong with its names, types
    and goals, by its place.

    Args:
        given: what stands in the recipe; what is None at the top is left out.
    """
    given = {name: value for name, value in given.items() if value is not None}
    goals = [name for name in GOALS if name in given]
    one = len(goals) == 1 or goals == ["budget", "plan"]
    problems = [] if one else [f"recipe: give one of {list(GOALS)}, or a plan and its budget, got {goals or 'none'}"]
    idle = [name for name in ("training", "search") if name in given and "plan" in given]
    problems += [f"recipe: {name} is for gates that find a plan, and a plan is given" for name in idle]
    problems += [f"{name} must not be empty" for name in ("model", "output") if given.get(name) == ""]
    paths = _paths(given.get("shape"))
    problems += [
        f"shape.{name} must be a whole number of at least 1, got {shown(size)}"
        for name, size in paths.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    if paths:
        given = given | {"shape": {name: size for name, size in given["shape"].items() if name not in paths}}
    try:
        found = _adapter().validate_python(given)
        return found | ({"shape": found["shape"] | paths} if paths else {}), problems
    except ValidationError as error:
        wrong: dict[Place, list[Any]] = {}
        for each in error.errors(include_url=False):
            wrong.setdefault(_place(each, given), []).append(each)
    return given, [*_problems(wrong), *problems]


def _paths(shape: Any) -> dict[str, Any]:
    """The sizes of towers, as `text_config.intermediate_size` or `decoder.layers`: only the model knows which."""
    return {name: size for name, size in shape.items() if "." in str(name)} if isinstance(shape, Mapping) else {}


def _place(error: Any, given: Any) -> Place:
    """Where an error is in the document: without the members of unions that pydantic puts there as well."""
    place: list[str | int] = []
    for part in error["loc"]:
        if (isinstance(given, Mapping) and part in given) or (isinstance(given, list) and isinstance(part, int)):
            place.append(part)
            given = given[part]
    return (*place, error["loc"][-1]) if error["type"] == "missing" else tuple(place)


def _problems(found: Mapping[Place, list[Any]]) -> Iterator[str]:
    missing = [place[-1] for place, errors in found.items() if errors[0]["type"] == "missing"]
    if missing:
        yield f"recipe: missing {missing}"
    for place, errors in found.items():
        kinds, value = {error["type"] for error in errors}, errors[0]["input"]
        inside = any(len(other) > len(place) and other[: len(place)] == place for other in found)
        if "missing" in kinds or (inside and isinstance(value, Mapping | list)):
            continue  # said above; or one member of a union, where another one says more
        name = ".".join(map(str, place))
        if kinds == {"extra_forbidden"}:
            yield _unknown(".".join(map(str, place[:-1])) or "recipe", str(place[-1]))
        elif ".".join(map(str, place)) in sections() and not isinstance(value, Mapping):
            yield f"{name} must be a mapping of names to values, got {shown(value)}"
        else:
            allowed = dict.fromkeys(error["msg"].replace("Input should be", "must be", 1) for error in errors)
            yield f"{name} {' or '.join(allowed)}, got {shown(value)}"


def _unknown(section: str, name: str) -> str:
    """A name that is not allowed, with those that may be meant."""
    allowed = sections()[section]
    near = difflib.get_close_matches(name[:MANY], allowed, n=3)
    own = [each for each in allowed if section not in ("training", "recovery") or each not in _trainers()]
    meant = f"; near are {near}" if near else ""
    if near and len(own) > MANY:
        return f"{section}: unknown name {shown(name)}{meant}"
    more = " and the fields of transformers.TrainingArguments" if len(own) < len(allowed) else ""
    return f"{section}: unknown name {shown(name)}{meant}; allowed are {own}{more}"


def _trainers() -> Collection[str]:
    return TrainingArguments.__dataclass_fields__
