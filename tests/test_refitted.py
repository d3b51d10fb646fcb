"""Shapes judged by refitted models: the same model and the same loss as a merge with calibration gives."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LM_ROW, VISION_ROW, build, difference, inputs_of, logits_of
from peft import LoraConfig, PeftModel, get_peft_model

from hawada_peft import HawAdaConfig, Plan, Shape
from hawada_peft.errors import HawAdaError, IllegalShapeError
from hawada_peft.latency.regime import Regime
from hawada_peft.search import reference
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.search.reference import judged_predictions, ranked_predictions
from hawada_peft.search.refitted import RefittedQuality, obstacle
from hawada_peft.search.space import search_space
from hawada_peft.surgery.dense import dense_view
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.legality import check_legal


def gated(row: Any = LM_ROW, **options: Any) -> PeftModel:
    return get_peft_model(build(row), HawAdaConfig(**options))


def batches_of(model: PeftModel) -> list[dict[str, torch.Tensor]]:
    batch = inputs_of(model)
    return [{name: value.roll(step, -1) for name, value in batch.items()} for step in range(4)]


def test_the_view_is_the_dense_model_around_which_the_gates_are(row: Any) -> None:
    dense = build(row)
    expected = logits_of(dense)
    model = get_peft_model(dense, HawAdaConfig(lora=LoraConfig(target_modules="all-linear")))
    view = dense_view(dense)
    assert type(view) is type(dense)
    assert torch.equal(logits_of(view), expected)
    assert not any("lora" in name or "base_layer" in name for name, _ in view.named_parameters())
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in view.parameters()} <= mine  # nothing is copied


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["llama", "vit"])
@pytest.mark.filterwarnings("ignore:the slim model keeps its plain weights")
def test_the_loss_is_that_of_a_merge_with_calibration(row: Any) -> None:
    model = gated(row)
    batches = batches_of(model)
    shape = Shape(4, None if row is LM_ROW else 4, 40, 3)
    quality = RefittedQuality(model, batches)
    found = quality.evaluate(shape)
    plan = quality.plan(shape)
    report = copy.deepcopy(model).slim(plan=plan, fold=False, calibration=batches).reconstruction
    assert found == pytest.approx(min(report.before, report.after), rel=1e-6)
    assert quality.evaluate(locate(model.get_base_model()).dense) == 0


def test_the_gated_model_is_left_as_it_was() -> None:
    model = gated()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = logits_of(model)
    quality = RefittedQuality(model, batches_of(model))
    quality.predict(search_space(quality.layout, Regime(), multiple=8))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert difference(logits_of(model), expected) == 0


def test_fewer_layers_never_look_better() -> None:
    quality = RefittedQuality(model := gated(), batches_of(model))
    losses = quality.depth_losses(1)
    assert losses[4] == 0
    assert list(losses) == sorted(losses, reverse=True)
    assert (np.diff([losses[count] for count in sorted(losses)]) <= 0).all()


def test_of_many_batches_the_first_ones_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "JUDGED", 1)
    model, shape = gated(), Shape(intermediate_size=40)
    batches = batches_of(model)
    quality, few = RefittedQuality(model, batches), RefittedQuality(model, batches[:2])
    assert quality.plan(shape) == few.plan(shape)
    assert quality.evaluate(shape) == few.evaluate(shape)
    assert quality.meaning == f"{few.meaning}, on the first 2 of 4 batches"


@pytest.mark.parametrize(("work", "judged", "ranked"), [(1, 2048, 1024), (3000, 3000, 1500), (10**9, 8192, 2048)])
def test_large_models_are_judged_by_fewer_predictions_on_a_cpu(
    work: int, judged: int, ranked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gated()
    monkeypatch.setattr(reference, "CPU_WORK", work * sum(each.numel() for each in model.parameters()))
    assert (judged_predictions(model), ranked_predictions(model)) == (judged, ranked)
    model.to("meta")  # another device
    assert (judged_predictions(model), ranked_predictions(model)) == (8192, 2048)


def test_widths_that_lose_too_much_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated()
    asked: dict[int, list[int | None]] = {}
    for least in (1, 4):
        quality = RefittedQuality(model, batches_of(model))
        asked[least] = []

        def evaluate(shape: Shape, found: list[int | None] = asked[least]) -> float:
            found.append(shape.intermediate_size)
            return 0.3 if shape.intermediate_size else 0.0

        monkeypatch.setattr(quality, "evaluate", evaluate)
        monkeypatch.setattr(quality, "depth_losses", lambda least: dict.fromkeys(range(least, 4), 0.1) | {4: 0.0})
        space = search_space(quality.layout, Regime(), multiple=8)
        quality.predict(space.of_depth(least))
    # Dropping layers loses a third of that; where none may go, all widths count.
    assert [size for size in asked[1] if size] == [72]
    assert [size for size in asked[4] if size] == [72, 48, 24]


def test_few_depths_are_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    quality = RefittedQuality(model := gated(), batches_of(model))
    asked: list[int] = []

    def loss(plan: Plan) -> float:
        asked.append(len(plan.layers))
        return 0.5 * quality.loss(plan)

    monkeypatch.setattr(quality, "_refitted_loss", loss)
    losses = quality.depth_losses(1)
    assert asked == [1, 3]  # the ends
    assert losses[2] == pytest.approx(max(0.5 * quality.loss(quality.without_layers(2)), losses[3]))


def test_head_counts_of_the_twin_alone_are_judged_there() -> None:
    model = gated()
    quality = RefittedQuality(model, batches_of(model))
    shape = Shape(5, 1, 48, 3)
    with pytest.raises(IllegalShapeError):
        check_legal(quality.layout, shape)
    assert quality.evaluate(shape) > 0


def test_what_forbids_it_is_named() -> None:
    model = gated()
    with pytest.raises(HawAdaError, match="refit=False"):
        RefittedQuality(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    assert obstacle(model, batches_of(model)) == ""
    assert "one row" in obstacle(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    model = gated(lora=LoraConfig(target_modules="all-linear"))
    assert obstacle(model, batches_of(model)) == ""  # it has learned nothing yet
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(0.1)
    assert "LoRA" in obstacle(model, batches_of(model))


def test_refitted_losses_are_not_the_masked_ones() -> None:
    model = gated()
    shapes = [Shape(intermediate_size=size).complete(locate(model.get_base_model()).dense) for size in (40, 72)]
    closed, fitted = (quality(model, batches_of(model)) for quality in (MaskedQuality, RefittedQuality))
    assert closed.meaning != fitted.meaning
    assert [closed.evaluate(shape) for shape in shapes] != [fitted.evaluate(shape) for shape in shapes]
