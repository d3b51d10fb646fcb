"""The adapter's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType

from hawada_peft import HawAdaConfig
from hawada_peft.errors import HawAdaError

VARIANTS: list[dict[str, Any]] = [
    {},
    {"gates": ["ffn"], "group_size": 8, "temperature": 0.5, "init_value": 0.9},
    {"target_modules": ["o_proj", "down_proj"], "exclude_modules": ["lm_head"], "modules_to_save": ["classifier"]},
    {"target_modules": r".*\.o_proj", "inference_mode": True},
    {"layers_to_transform": [0, 2], "layers_pattern": "layers", "task_type": "CAUSAL_LM"},
    {"plan": {"format": 1}, "plan_in_training": True, "base_sizes": {"model_type": "x", "hidden_size": 64}},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "+".join(options) or "defaults")
def test_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    config = HawAdaConfig(**options)
    config.save_pretrained(tmp_path)
    for cls in (HawAdaConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is HawAdaConfig
        loaded.inference_mode = config.inference_mode  # saved adapters are for inference: PEFT's convention
        assert loaded.to_dict() == config.to_dict()


def test_type_and_defaults() -> None:
    config = HawAdaConfig()
    assert config.peft_type is PeftType.HAWADA
    assert list(config.gates) == ["heads", "ffn", "layers"]
    assert config.target_modules is None


def test_one_gate_may_be_given_bare() -> None:
    assert list(HawAdaConfig(gates="ffn").gates) == ["ffn"]


def test_start_holds_the_settings() -> None:
    start = HawAdaConfig(temperature=2.0, init_value=0.7, init_weights=False).start()
    assert (start.temperature, start.value, start.random) == (2.0, 0.7, True)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"gates": ("heads", "neurons")}, ["'neurons'", "heads", "ffn", "blocks", "layers"]),
        ({"gates": ()}, ["at least one", "heads"]),
        ({"gates": ("ffn", "ffn")}, ["once each", "ffn"]),
        ({"group_size": 0}, ["group_size", "at least 1", "0"]),
        ({"group_size": 2.5}, ["group_size", "whole number", "2.5"]),
        ({"temperature": 0.0}, ["temperature", "above 0", "0.0"]),
        ({"temperature": float("nan")}, ["temperature", "finite", "nan"]),
        ({"init_value": 1.0}, ["start value", "(0, 1)", "1.0"]),
        ({"target_modules": "x", "layers_to_transform": [0]}, ["layers_to_transform", "target_modules"]),
        ({"target_modules": "x", "layers_pattern": "h"}, ["layers_pattern", "target_modules"]),
        ({"layers_pattern": "h"}, ["layers_pattern", "layers_to_transform"]),
    ],
)
def test_a_problem_is_named(options: dict[str, Any], facts: list[str]) -> None:
    with pytest.raises(HawAdaError) as caught:
        HawAdaConfig(**options)
    assert [fact for fact in facts if fact not in str(caught.value)] == []


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(HawAdaError) as caught:
        HawAdaConfig(gates=("neurons",), group_size=-1, temperature=-1.0, init_value=2.0)
    found = str(caught.value)
    assert [word for word in ("neurons", "group_size", "temperature", "start value") if word not in found] == []
    assert len(found.splitlines()) == 4


@pytest.mark.parametrize(
    "options", [{"temperature": "hot"}, {"init_value": None}, {"gates": (["ffn"],)}, {"group_size": True}]
)
def test_values_of_a_wrong_type_are_problems_too(options: dict[str, Any]) -> None:
    with pytest.raises(HawAdaError, match="|".join(options)):
        HawAdaConfig(**options)


OTHER_JSON: list[Any] = [5, 2.5, True, {"a": 1}, [[]], [None], [1.5], "(", [[[[[]]]]], ["heads", 3]]
FIELDS = {
    "gates": ["(", "a"],
    "target_modules": [],
    "exclude_modules": [],
    "layers_pattern": ["("],
    "modules_to_save": ["("],
    "layers_to_transform": [5],
    "temperature": [5, 2.5],
    "init_value": [],
    "init_weights": [True],
    "plan_in_training": [True],
    "lora": [],
    "plan": [{"a": 1}],
    "base_sizes": [{"a": 1}],
    "group_size": [5],
}
"""Fields, and which of those values they may have."""


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", OTHER_JSON, ids=str)
def test_fields_of_other_types_are_refused_with_what_is_allowed(field: str, value: Any, tmp_path: Path) -> None:
    if any(value == allowed and type(value) is type(allowed) for allowed in FIELDS[field]):
        return
    HawAdaConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    for load in (HawAdaConfig.from_pretrained, PeftConfig.from_pretrained):
        with pytest.raises(HawAdaError) as caught:
            load(tmp_path)
        assert field in str(caught.value) or "start value" in str(caught.value)
        assert len(str(caught.value)) < 400
