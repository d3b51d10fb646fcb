"""The pytest plugin: points PEFT's own tests at the config class named by `PEFT_SUITE_CONFIG` (module:Class)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import peft
import pytest
import rows
import selection
import torch
from models import MODELS
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load
from PIL import Image

MODULE, _, NAME = os.environ["PEFT_SUITE_CONFIG"].partition(":")
Ours: type[peft.PeftConfig] = getattr(importlib.import_module(MODULE), NAME)
Model: type[BaseTuner] = PEFT_TYPE_TO_TUNER_MAPPING[Ours().peft_type]
Layer: type[BaseTunerLayer] = Model.tuner_layer_cls
# the parameters on a wrapped linear layer, such as hawada_units.default.theta: slot, adapter name, rest
SAMPLE = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), Ours(target_modules=["0"]))
SLOTS = sorted(name.split(".0.")[1] for name, parameter in SAMPLE.named_parameters() if parameter.requires_grad)
# what the placeholders in selection.EDITS stand for
NAMES = {
    "type": Ours().peft_type.value,
    "model": Model.__name__,
    "prefix": Model.prefix,
    "name": Model.prefix.rstrip("_"),
    "slot": SLOTS[0].partition(".")[0],
    "rest": SLOTS[0].partition(".default")[2],
}

# fields of LoRA and IA3 that mean nothing to another tuner; any other one that it lacks cannot be translated
IGNORED = {"r", "lora_alpha", "lora_dropout", "feedforward_modules"}
RENAMED = {"init_lora_weights": "init_weights", "init_ia3_weights": "init_weights"}
# many tests leave the targets out, since PEFT knows LoRA's for the models used here
DEFAULT_TARGETS = ["q_proj", "v_proj", "query", "value", "query_key_value", "c_attn", "q", "v"]


class Untranslatable:
    """Stands for a config that the tuner cannot express: a row with one is dropped, a test that makes one fails."""


def translated(fields: dict[str, Any]) -> dict[str, Any] | Untranslatable:
    """The tuner's fields for those of LoRA or IA3."""
    fields = {RENAMED.get(key, key): value for key, value in fields.items() if key not in IGNORED}
    fields = {key: value for key, value in fields.items() if (key, value) != ("bias", "none")}
    known = fields.keys() <= Ours.__dataclass_fields__.keys()
    return fields if known and fields.get("init_weights", True) in (True, False) else Untranslatable()


class _Translator(type):
    """A class in the place of `LoraConfig`: calling it makes a config of the tuner under test."""

    def __call__(cls, **given: Any) -> Any:
        fields = translated(given)
        return fields if isinstance(fields, Untranslatable) else Ours(**({"target_modules": DEFAULT_TARGETS} | fields))

    def __getattr__(cls, name: str) -> Any:
        return inspect.signature(Ours) if name == "__signature__" else getattr(Ours, name)


TRANSLATORS = [_Translator(name, (), {}) for name in ("LoraConfig", "IA3Config")]


# imported by PEFT's tests only for tests that are left out here: name, what they take from it
STUBS = {"diffusers": {"__version__": "0", "StableDiffusionPipeline": type("StableDiffusionPipeline", (), {})},
         "attr": {"dataclass": dataclasses.dataclass}}  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for name, contents in STUBS.items():
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            stub.__dict__.update(contents, __spec__=importlib.machinery.ModuleSpec(name, None))
            sys.modules[name] = stub
    from tests import testing_common, testing_utils  # these two import the real LoraConfig, before it is replaced

    testing_utils.hub_online_once = testing_common.hub_online_once = lambda model_id: contextlib.nullcontext()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), "uint8")
    testing_utils.load_cat_image = lambda: Image.fromarray(pixels)
    testing_common.IA3Config = Ours  # its branches: Conv1D, weighted adapters, tolerance for folded convolutions
    save_and_load.check_file_exists_on_hf_hub = lambda model_id, *args, **kwargs: model_id in MODELS
    for translator in TRANSLATORS:
        setattr(peft, translator.__name__, translator)
    count_uses(Ours, "__post_init__")
    count_uses(Model, "inject_adapter")


def is_foreign(value: Any) -> bool:
    """A config, or config class, of a method other than the one under test."""
    kind = value if isinstance(value, type) else type(value)
    return kind is Untranslatable or (issubclass(kind, peft.PeftConfig) and not issubclass(kind, Ours))


def own_rows(names: list[str], owner: str) -> list[tuple[Any, ...]] | None:
    """The rows of rows.py for a parametrisation of that shape; None if there are none."""
    if names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return [(f"{model} {number}", model, Ours, fields) for number, (model, fields) in enumerate(rows.CUSTOM)]
    if names == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        off = {"init_weights": False}
        return [(name, "ours", Ours, first | off, second | off) for name, first, second in rows.TWO_ADAPTERS]
    if names == ["model_id", "config_cls", "config_kwargs"] and owner in rows.MODELS:
        task, models = rows.MODELS[owner]
        return [(model, Ours, {"task_type": task, "target_modules": targets}) for model, targets in models]
    return None


def kept_rows(names: list[str], values: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The rows of a test's own parametrisation that are about the tuner under test, or about no tuner at all."""
    seen = set()
    for value in values:
        value = value.values if hasattr(value, "marks") else value if len(names) > 1 else (value,)
        row = tuple(Ours if v in TRANSLATORS else v for v in value)
        if row[0] is Ours and len(row) > 1 and isinstance(row[1], dict):  # config_cls, config_kwargs
            row = (Ours, translated(row[1]), *row[2:])
        if any(map(is_foreign, row)):
            continue
        about_us = any(v is Ours or isinstance(v, Ours) for v in row)
        if not (about_us and repr(row) in seen):
            seen.add(repr(row))
            yield row


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize, owner = metafunc.parametrize, metafunc.cls.__name__ if metafunc.cls else ""
    crossed = {"model_id", "config_cls", "config_kwargs"} <= set(metafunc.fixturenames) and owner in rows.MODELS

    def replaced(argnames: Any, argvalues: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        names = [name.strip() for name in argnames.split(",")] if isinstance(argnames, str) else list(argnames)
        if crossed and names == ["model_id"]:
            return  # comes together with its config below
        if crossed and names == ["config_cls", "config_kwargs"]:
            names = ["model_id", *names]
        own = own_rows(names, owner)
        values = own or list(kept_rows(names, argvalues))
        if not values:
            metafunc.function.peft_suite_empty = True
        if own or not values or "ids" in kwargs:
            kwargs["ids"] = ["-".join(map(label, row)) for row in own] if own else None
        parametrize(names, values, *args, **kwargs)

    metafunc.parametrize = replaced


def label(value: Any) -> str:
    """A part of a test's id: the last part of a hub id, the fields of a config."""
    if isinstance(value, dict):
        return "+".join(str(field) for field in value.values() if field is not None)
    return value.__name__ if isinstance(value, type) else str(value).rpartition("/")[2]


def matches(patterns: str, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns.split())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = " ".join(selection.LEFT_OUT.values())
    kept, dropped = [], []
    for item in items:
        name, wanted = item.nodeid.partition("::")[2], selection.FILES[item.path.name]
        empty = getattr(item.function, "peft_suite_empty", False)
        run = (not wanted or matches(wanted, name)) and not matches(left_out, name) and not empty
        (kept if run else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def drop(state_dict: dict[str, Any], prefix: str) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]


def unnamed(parameters: Iterable[str]) -> set[str]:
    """Parameter names without the name of the gate, of LoRA's matrix or of IA3's vector."""
    return {re.sub(rf"\.(lora_[AB]|ia3_l|{Model.prefix}\w+)\.(\w+)(\.\w+)?$", r".*.\2", name) for name in parameters}


uses = 0  # of the tuner, in the test that is running


def count_uses(owner: type, name: str) -> None:
    original = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        global uses
        uses += 1
        return original(*args, **kwargs)

    setattr(owner, name, counting)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A selected test that passes without touching the tuner proves nothing about it."""
    global uses
    report = yield
    given = Ours in getattr(item, "callspec", types.SimpleNamespace(params={})).params.values()
    if report.when == "call" and report.passed and not (uses or given):
        report.outcome, report.longrepr = "failed", "passed without using the tuner: leave it out in selection.py"
    if report.when == "teardown":
        uses = 0
    return report
