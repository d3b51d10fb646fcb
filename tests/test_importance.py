"""Fisher importance, and gates that start from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, Row, build, gate, inputs_of, logits_of, scattered_plan
from peft import PeftModel
from tqdm import tqdm

from hawada_peft import Plan, Shape, collect_gates, init_gates
from hawada_peft.errors import HawAdaError
from hawada_peft.planning.importance import gate_importance
from hawada_peft.search.budgeted import IMPORTANCE
from hawada_peft.search.masked import ASKED, DEPTH, MaskedQuality


def labelled(model: PeftModel) -> list[dict[str, torch.Tensor]]:
    inputs = inputs_of(model)
    labels = inputs.get("input_ids", torch.tensor([0, 2]))
    return [inputs | {"labels": labels}]


def thetas(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: found.theta.detach().clone() for name, found in collect_gates(model).items()}


def test_is_the_mean_of_squared_gradients_per_example() -> None:
    model = gate(build(VISION_ROW, torch.float64), shuffle=False)
    (batch,) = labelled(model)
    expected = {name: torch.zeros(found.theta.shape).double() for name, found in collect_gates(model).items()}
    for i in range(2):
        model.zero_grad()
        model(**{name: tensor[i : i + 1] for name, tensor in batch.items()}).loss.backward()
        for name, found in collect_gates(model).items():
            expected[name] += found.theta.grad.double().square() / 2
    found = gate_importance(model, [batch])
    assert found.keys() == expected.keys()
    for name, importance in found.items():
        torch.testing.assert_close(importance, expected[name], rtol=1e-4, atol=0)


def test_does_not_depend_on_how_examples_are_batched(row: Row) -> None:
    model = gate(build(row), gates=("heads", "layers"))
    inputs = inputs_of(model)
    if not hasattr(model.get_base_model().config, "vocab_size"):
        inputs |= {"labels": torch.tensor([0, 1])} if "logits" in model(**inputs) else {}
    singles = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(2)]
    whole, parts = gate_importance(model, [inputs]), gate_importance(model, singles)
    torch.testing.assert_close(whole, parts)
    assert all((importance >= 0).all() and importance.any() for importance in whole.values())


def test_leaves_the_model_as_it_was() -> None:
    model = gate(build(LM_ROW)).train()
    model.apply_plan(scattered_plan(model, LM_ROW.slim), in_training=True)
    before, masked, state = thetas(model), logits_of(model), torch.get_rng_state()
    gate_importance(model, [inputs_of(model)])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(thetas(model), before, rtol=0, atol=0)
    assert torch.equal(logits_of(model), masked)
    assert all(found.theta.grad is None for found in collect_gates(model).values())


def test_is_taken_at_the_start_whatever_the_gates_are_now() -> None:
    fresh, moved = gate(build(VISION_ROW), shuffle=False), gate(build(VISION_ROW))
    torch.testing.assert_close(gate_importance(fresh, labelled(fresh)), gate_importance(moved, labelled(moved)))


def test_padding_does_not_count() -> None:
    model = gate(build(LM_ROW))
    tokens = torch.randint(3, 128, (1, 6))
    padded = {
        "input_ids": torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 3]),
    }
    labels = torch.cat([tokens, torch.full((1, 3), -100)], 1)
    expected = gate_importance(model, [{"input_ids": tokens, "labels": tokens}])
    torch.testing.assert_close(gate_importance(model, [padded | {"labels": labels}]), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("group_size", [1, 8])
def test_gates_start_in_the_order_of_importance(row: Row, group_size: int) -> None:
    model = gate(build(row), group_size=group_size, gates=("heads", "ffn"))
    init_gates(model, [inputs_of(model)])
    importance = gate_importance(model, [inputs_of(model)])
    for name, theta in thetas(model).items():
        assert torch.equal(theta.argsort(stable=True), importance[name].argsort(stable=True))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gates_start_evenly_around_their_start(temperature: float) -> None:
    model = gate(build(VISION_ROW), temperature=temperature)
    init_gates(model, labelled(model), spread=0.5)
    for found in collect_gates(model).values():
        if found.units > 1:
            steps = torch.linspace(-0.5, 0.5, found.units) * temperature
            torch.testing.assert_close(found.theta.sort().values, found.start.theta + steps)


def test_layers_are_ordered_over_the_whole_model() -> None:
    model = gate(build(VISION_ROW), gates=("layers",))
    init_gates(model, labelled(model))
    importance = torch.cat(list(gate_importance(model, labelled(model)).values()))
    found = torch.cat(list(thetas(model).values()))
    assert torch.equal(found.argsort(), importance.argsort())
    assert found.unique().numel() == 4


def test_what_takes_long_has_a_bar() -> None:
    seen: list[str] = []

    def bars(**options: Any) -> Any:
        seen.append(options["desc"])
        return tqdm(**options, disable=True)

    model = gate(build(LM_ROW), gates=("layers",))
    init_gates(model, labelled(model), shape=Shape(num_hidden_layers=3), progress=bars)
    assert seen == [ASKED, DEPTH, IMPORTANCE]


@pytest.mark.parametrize("with_labels", [True, False])
def test_is_deterministic(with_labels: bool) -> None:
    found = []
    for seed in (1, 2):
        model = gate(build(LM_ROW))
        torch.manual_seed(seed)
        init_gates(model, labelled(model) if with_labels else [inputs_of(model)])
        found.append(thetas(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_only_the_active_adapter_starts_anew() -> None:
    model = gate(build(VISION_ROW))
    model.add_adapter("other", model.peft_config["default"])
    before = thetas(model)
    init_gates(model, labelled(model))
    changed = {name.split(".")[-1] for name, theta in thetas(model).items() if not torch.equal(theta, before[name])}
    assert changed == {"default"}


@pytest.mark.parametrize(
    ("options", "batches", "facts"),
    [
        ({"criterion": "magnitude"}, None, "'fisher', got 'magnitude'"),
        ({}, [], "no calibration batches"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], batches: Any, facts: str) -> None:
    model = gate(build(VISION_ROW))
    before = thetas(model)
    with pytest.raises(HawAdaError, match=facts):
        init_gates(model, labelled(model) if batches is None else batches, **options)
    torch.testing.assert_close(thetas(model), before, rtol=0, atol=0)


def test_a_model_without_trainable_gates_is_refused() -> None:
    model = gate(build(VISION_ROW), inference_mode=True)
    with pytest.raises(HawAdaError, match="no trainable gates"):
        gate_importance(model, labelled(model))


def test_an_example_of_nothing_but_padding_does_not_count() -> None:
    model = gate(build(LM_ROW))
    tokens, mask = torch.randint(3, 128, (2, 6)), torch.tensor([[1] * 6, [0] * 6])
    found = gate_importance(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert all(importance.isfinite().all() for importance in found.values())


def depth_of(model: PeftModel, slot: str) -> dict[int, float]:
    """By layer the theta of a gate on the whole of it, or the larger of those on its two blocks."""
    found: dict[int, list[float]] = {}
    for name, theta in thetas(model).items():
        if slot in name:
            found.setdefault(int(name.split(".layers.")[1].split(".")[0]), []).append(float(theta))
    return {layer: max(values) for layer, values in found.items()}


@pytest.mark.parametrize(("kind", "slot"), [("layers", "hawada_layer"), ("blocks", "hawada_block")])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_that_go_start_lowest_in_the_order_of_dropping(kind: str, slot: str, layers: int) -> None:
    model = gate(build(LM_ROW), gates=("heads", "ffn", kind))
    quality = MaskedQuality(model, [inputs_of(model)])
    assert quality.depth == {}
    order = quality.drop_order(layers)
    found, alone = quality.depth, dict(quality.depth["alone"])
    assert found["order"] == order
    assert len(alone) == 4  # each by itself; the first to go is the cheapest of them
    assert order[0] == min(alone, key=alone.__getitem__)
    assert found["together"] == sorted(found["together"])
    assert found["together"][0] == alone[order[0]]
    init_gates(model, [inputs_of(model)], shape=Shape(num_hidden_layers=layers))
    depth = depth_of(model, slot)
    assert sorted(depth, key=depth.__getitem__)[: len(order)] == order
    assert len(order) == 4 - layers
    assert set(model.plan(Shape(num_hidden_layers=layers)).layers) == set(range(4)) - set(order)


def test_the_rest_is_ordered_without_the_layers_that_go() -> None:
    model = gate(build(LM_ROW))
    quality = MaskedQuality(model, [inputs_of(model)])
    plan = quality.without_layers(2)
    importance = gate_importance(model, [inputs_of(model)], plan)
    init_gates(model, [inputs_of(model)], shape=Shape(num_hidden_layers=2))
    differs = False
    for name, theta in thetas(model).items():
        if "hawada_units" in name and int(name.split(".layers.")[1].split(".")[0]) in plan.layers:
            assert torch.equal(theta.argsort(stable=True), importance[name].argsort(stable=True))
            plain = gate_importance(model, [inputs_of(model)])[name]
            differs |= not torch.equal(plain.argsort(stable=True), importance[name].argsort(stable=True))
    assert differs


@pytest.mark.parametrize("shape", [Shape(4, 2, 40), Shape(4, 2, 40, 4), None])
def test_a_shape_of_all_layers_changes_nothing(shape: Shape | None) -> None:
    plain, found = gate(build(LM_ROW)), gate(build(LM_ROW))
    init_gates(plain, [inputs_of(plain)])
    init_gates(found, [inputs_of(found)], shape=shape)
    torch.testing.assert_close(thetas(found), thetas(plain), rtol=0, atol=0)


def test_a_start_towards_a_shape_leaves_everything_else_as_it_was(row: Row) -> None:
    model = gate(build(row)).train()
    model.apply_plan(scattered_plan(model, row.slim), in_training=True)
    masked, state, plan = logits_of(model), torch.get_rng_state(), model.applied_plan()
    before = thetas(model)
    init_gates(model, [inputs_of(model)], shape=Shape(num_hidden_layers=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.applied_plan() == plan
    for name, found in collect_gates(model).items():
        found.theta.data.copy_(before[name])
    assert torch.equal(logits_of(model), masked)


@pytest.mark.parametrize(
    ("aim", "facts"),
    [
        ({"shape": Shape(num_hidden_layers=2)}, "at least 3, got 2; a layer stays"),
        ({"shape": Shape(num_hidden_layers=9)}, "num_hidden_layers 9 exceeds 6"),
        ({"shape": 2}, "a Shape .* got a int"),
        ({"plan": Plan.keep_all(Shape(8, 8, 128, 5))}, "another base model"),
        ({"shape": Shape(num_hidden_layers=4), "plan": Plan.keep_all(Shape(8, 8, 128, 6))}, "not both"),
        ({"spread": float("nan")}, "spread must be"),
        ({"spread": -1.0}, "spread must be"),
    ],
)
def test_an_aim_that_no_slim_model_can_have_is_refused(aim: dict[str, Any], facts: str) -> None:
    fields = VISION_ROW.fields | {"mlp_ratio": 2, "num_hidden_layers": 6, "out_indices": [2, 4, 6]}
    model = gate(build(Row("Dinov2Backbone", "Dinov2Config", fields, VISION_ROW.slim)))
    before = thetas(model)
    with pytest.raises(HawAdaError, match=facts):
        init_gates(model, [inputs_of(model)], **aim)
    assert all(torch.equal(theta, before[name]) for name, theta in thetas(model).items())
    init_gates(model, [inputs_of(model)], shape=Shape(num_hidden_layers=3))
