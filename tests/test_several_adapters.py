"""Several adapters on one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    LM_ROW,
    assert_same_state,
    build,
    difference,
    gate,
    logits_of,
    scattered_plan,
    shuffle_gates,
    state_of,
)
from peft import PeftModel

from hawada_peft import HawAdaConfig, Shape, collect_gates
from hawada_peft.errors import InvalidPlanError


def two_adapters(**second: Any) -> PeftModel:
    """A model with adapters "default" and "other" of different values."""
    model = gate(build(LM_ROW))
    model.add_adapter("other", HawAdaConfig(**second))
    return shuffle_gates(model, "other", seed=8).eval()


def test_switching_adapters() -> None:
    model = two_adapters(gates=("ffn",))
    first = logits_of(model)
    model.set_adapter("other")
    second = logits_of(model)
    assert difference(first, second) > 0.01
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)


def test_deleting_an_adapter() -> None:
    model = two_adapters()
    first = logits_of(model)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not collect_gates(model, "other")
    assert torch.equal(logits_of(model), first)


def test_deleting_the_first_adapter_keeps_the_shared_gates_of_the_second() -> None:
    model = two_adapters()
    model.set_adapter("other")
    second = logits_of(model)
    model.delete_adapter("default")
    assert torch.equal(logits_of(model), second)


def test_two_active_adapters_multiply() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    both, before = logits_of(model), state_of(model)
    model.merge_adapter()
    assert difference(logits_of(model), both) <= 1e-5
    model.unmerge_adapter()
    assert_same_state(state_of(model), before)


def test_two_active_adapters_slim_exactly() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    plan = model.plan(Shape(4, 2, 40, 2))
    for name in ("default", "other"):
        model.apply_plan(plan, adapter_name=name)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-5


def test_a_plan_for_several_adapters_needs_a_name() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    plan = model.plan(Shape(4, 2))
    with pytest.raises(InvalidPlanError, match=r"\['default', 'other'\] as `adapter_name`"):
        model.apply_plan(plan)
    model.apply_plan(plan, adapter_name="default")
    model.apply_plan(model.plan(Shape(2, 2)), adapter_name="other")
    with pytest.raises(InvalidPlanError, match="different plans"):
        model.merge_and_unload()


def test_weighted_adapter_sums_log_odds() -> None:
    model = two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.25, 0.5], "sum")
    one, two, found = (list(collect_gates(model, name).values()) for name in ("default", "other", "sum"))
    assert len(found) == len(one) > 0
    for a, b, c in zip(one, two, found, strict=True):
        torch.testing.assert_close(c.theta, 0.25 * a.theta + 0.5 * b.theta)


@pytest.mark.parametrize(("names", "weights"), [(["default", "x"], [1, 1]), (["default"], [1, 2]), ([], [])])
def test_bad_weighted_adapters_are_refused(names: list[str], weights: list[float]) -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match=r"one weight per existing adapter.*\['default', 'other'\]"):
        model.add_weighted_adapter(names, weights, "sum")
    assert set(model.peft_config) == {"default", "other"}


def test_adapters_of_different_gates_are_not_added() -> None:
    model = two_adapters(group_size=2)
    with pytest.raises(ValueError, match="gate different things"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    assert set(model.peft_config) == {"default", "other"}


def test_rows_of_a_batch_take_their_own_adapter() -> None:
    model = two_adapters()
    for name, seed in (("default", 3), ("other", 4)):
        model.apply_plan(scattered_plan(model, LM_ROW.slim, seed), adapter_name=name)
    tokens = torch.randint(128, (3, 9))
    with torch.no_grad():
        found = model(input_ids=tokens, adapter_names=["other", "__base__", "default"]).logits
        for i, name in enumerate(["other", None, "default"]):
            model.set_adapter(name or "default")
            with model.disable_adapter() if name is None else torch.no_grad():
                expected = model(input_ids=tokens[i : i + 1]).logits[0]
            assert difference(found[i], expected) <= 1e-5


def test_unknown_adapter_in_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"non-existing adapter.*nope"):
        two_adapters()(input_ids=torch.ones(1, 3, dtype=torch.long), adapter_names=["nope"])
