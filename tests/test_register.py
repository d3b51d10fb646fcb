"""The tuner type in PEFT's registry, and the errors' class tree."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from hawada_peft import HawAdaConfig, HawAdaModel, _register, errors


def member() -> PeftType:
    return PeftType["HAWADA"]


def test_member_is_found_every_way() -> None:
    assert PeftType("HAWADA") is member() is PeftType.HAWADA
    assert member() in list(PeftType)
    assert (member().name, member().value, str.__str__(member())) == ("HAWADA", "HAWADA", "HAWADA")


def test_member_leads_to_the_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member()] is HawAdaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member()] is HawAdaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member()] == HawAdaModel.prefix == "hawada_"


def test_registering_twice_changes_nothing() -> None:
    before, members = member(), list(PeftType)
    assert _register.register(HawAdaConfig, HawAdaModel) is before
    assert list(PeftType) == members


def test_reloading_the_module_keeps_the_member() -> None:
    before, members = member(), list(PeftType)
    assert importlib.reload(_register).register(HawAdaConfig, HawAdaModel) is before
    assert list(PeftType) == members


def test_a_reloaded_class_replaces_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, member(), HawAdaConfig)
    newer = type("HawAdaConfig", (HawAdaConfig,), {"__module__": HawAdaConfig.__module__})
    _register.register(newer, HawAdaModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member()] is newer


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_member_survives_pickling(protocol: int) -> None:
    assert pickle.loads(pickle.dumps(member(), protocol)) is member()


def test_member_survives_copying() -> None:
    assert copy.deepcopy({"type": member()})["type"] is member() is copy.copy(member())


def test_config_survives_pickling_and_copying() -> None:
    config = HawAdaConfig(group_size=4)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_unpickling_imports_the_package_in_a_fresh_process() -> None:
    code = (
        f"import pickle, sys; member = pickle.loads({pickle.dumps(member())!r}); "
        "from peft import PeftType; assert member is PeftType.HAWADA; assert 'hawada_peft' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_foreign_owner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, member(), LoraConfig)
    with pytest.raises(errors.RegistrationError, match=r"HAWADA.*already registered by peft\..*LoraConfig"):
        _register.register(HawAdaConfig, HawAdaModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member()] is LoraConfig


def test_a_registry_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, member(), "other_")
    with pytest.raises(errors.RegistrationError, match="failed: prefix"):
        _register.register(HawAdaConfig, HawAdaModel)


def test_errors_on_bad_input_are_value_errors() -> None:
    found = [cls for cls in vars(errors).values() if isinstance(cls, type) and cls.__module__ == errors.__name__]
    assert all(cls.__doc__ for cls in found)
    bad_input = [cls for cls in found if issubclass(cls, errors.HawAdaError)]
    assert {errors.UnsupportedModelError, errors.IllegalShapeError, errors.InvalidPlanError} <= set(bad_input)
    assert all(issubclass(cls, ValueError) for cls in bad_input)
