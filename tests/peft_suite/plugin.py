"""The pytest plugin: points PEFT's own tests at the config class named by `PEFT_SUITE_CONFIG` (module:Class)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import itertools
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import rows
import selection
from models import MODELS
from peft.utils import save_and_load
from PIL import Image

MODULE, _, NAME = os.environ["PEFT_SUITE_CONFIG"].partition(":")
Ours: type[peft.PeftConfig] = getattr(importlib.import_module(MODULE), NAME)

# fields of LoRA, IA3 and RoAD that mean nothing to another tuner; any other unknown field makes a config untranslatable
IGNORED = {"r", "lora_alpha", "lora_dropout", "feedforward_modules", "fan_in_fan_out", "group_size"}
RENAMED = {"init_lora_weights": "init_weights", "init_ia3_weights": "init_weights"}
# what PEFT's tables give LoRA for the models used here: the tests that leave out the targets rely on some being there
DEFAULT_TARGETS = ["q_proj", "v_proj", "query", "value", "query_key_value", "c_attn", "q", "v"]


class Untranslatable:
    """Stands for a config that the tuner cannot express; a row with one is dropped, a test that uses one fails."""


def translated_fields(fields: dict[str, Any]) -> dict[str, Any] | Untranslatable:
    fields = {RENAMED.get(key, key): value for key, value in fields.items() if key not in IGNORED}
    fields = {key: value for key, value in fields.items() if (key, value) != ("bias", "none")}
    known = fields.keys() <= Ours.__dataclass_fields__.keys()
    return fields if known and fields.get("init_weights", True) in (True, False) else Untranslatable()


class _Translated(type):
    def __call__(cls, **fields: Any) -> Any:
        fields = translated_fields(fields)
        return fields if isinstance(fields, Untranslatable) else Ours(**({"target_modules": DEFAULT_TARGETS} | fields))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Ours)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, Ours)

    def __getattr__(cls, name: str) -> Any:
        return getattr(Ours, name)


class LoraConfig(metaclass=_Translated):
    pass


class IA3Config(metaclass=_Translated):
    pass


class RoadConfig(metaclass=_Translated):
    pass


TRANSLATED = (LoraConfig, IA3Config, RoadConfig)


# imported by PEFT's tests only for tests that are left out here: name, what they take from it
STUBS = {"diffusers": {"__version__": "0", "StableDiffusionPipeline": type("StableDiffusionPipeline", (), {})},
         "attr": {"dataclass": dataclasses.dataclass}}  # fmt: skip


def stub_missing_modules() -> None:
    for name, contents in STUBS.items():
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            stub.__dict__.update(contents, __spec__=importlib.machinery.ModuleSpec(name, None))
            sys.modules[name] = stub


def pytest_configure(config: pytest.Config) -> None:
    stub_missing_modules()
    from tests import testing_common, testing_utils  # before the names below change: these two keep the real classes

    testing_utils.hub_online_once = testing_common.hub_online_once = lambda model_id: contextlib.nullcontext()
    testing_utils.load_cat_image = lambda: Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), "uint8"))
    # the branches of IA3 and RoAD: Conv1D supported, weighted adapters, mixed batches, tolerance for convolutions
    testing_common.IA3Config = testing_common.RoadConfig = Ours
    save_and_load.check_file_exists_on_hf_hub = lambda model_id, *args, **kwargs: model_id in MODELS
    for translated in TRANSLATED:
        setattr(peft, translated.__name__, translated)


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
        row = tuple(Ours if v in TRANSLATED else v for v in value)
        if row[0] is Ours and len(row) > 1 and isinstance(row[1], dict):  # config_cls, config_kwargs
            row = (Ours, translated_fields(row[1]), *row[2:])
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
        values = own_rows(names, owner) or list(kept_rows(names, argvalues))
        if not values:
            metafunc.function.peft_suite_empty = True
        ids = kwargs.pop("ids", None)
        if own_rows(names, owner):
            ids = ["-".join(map(label, row)) for row in values]
        elif ids is not None and len(list(ids)) != len(values):
            ids = None
        parametrize(names, values, *args, ids=ids, **kwargs)

    metafunc.parametrize = replaced


def label(value: Any) -> str:
    """A short test id: the last part of a hub id, the target modules of a config."""
    if isinstance(value, dict):
        return "+".join(f"{v}" for v in value.values())
    return "" if isinstance(value, type) else str(value).rpartition("/")[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        name = item.originalname
        empty = getattr(item.function, "peft_suite_empty", False)
        (dropped if empty else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
