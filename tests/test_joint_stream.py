"""Heads whose size is derived go with channels of the residual stream: gated, planned, cut, written and loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import KINDS, build, difference, gate, inputs_of
from families import FURTHER
from peft import PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from hawada_peft import HawAdaConfig, Shape, collect_gates, inspect, slim, slim_checkpoint
from hawada_peft.errors import IllegalShapeError, UnsupportedModelError
from hawada_peft.refit.reconstruction import reconstruct
from hawada_peft.surgery.stream_masks import StreamMask
from hawada_peft.vanilla.outputs import outputs_of

JOINT = ("heads", "ffn", "layers", "hidden")
SMALL = Shape(num_attention_heads=5, intermediate_size=41, num_hidden_layers=2, hidden_size=40)
MODELS = {"bert": KINDS["bert"], "gpt2": FURTHER["gpt2"]}
BERT = MODELS["bert"]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWADA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(difference(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", MODELS)
def test_masked_equals_slim(name: str) -> None:
    model = gate(build(MODELS[name], torch.float64), gates=JOINT)
    dense = outputs_of(model, inputs_of(model))
    plan = model.plan(SMALL)
    assert len(set(plan.heads)) > 1  # other heads in every layer, the same channels everywhere
    model.apply_plan(plan)
    masked = outputs_of(model, inputs_of(model))
    assert gap(masked, dense) > 1e-3
    small = model.merge_and_unload()
    assert gap(outputs_of(small, inputs_of(small)), masked) <= 1e-12


def test_files_and_bytes(tmp_path: Path) -> None:
    build(BERT).save_pretrained(tmp_path / "base")
    model = gate(build(BERT), gates=JOINT)
    model.apply_plan(model.plan(SMALL))
    masked = outputs_of(model, inputs_of(model))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(BERT), tmp_path / "adapter").eval()
    assert gap(outputs_of(again, inputs_of(again)), masked) == 0
    again.merge_and_unload().save_pretrained(tmp_path / "expected")
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    mine, expected = (tmp_path / each / "model.safetensors" for each in ("slim", "expected"))
    assert mine.read_bytes() == expected.read_bytes()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim").eval()
    assert (loaded.config.hidden_size, loaded.config.num_attention_heads) == (40, 5)
    assert gap(outputs_of(loaded, inputs_of(model)), masked) <= 1e-5


def test_a_ratio_of_channels_takes_heads_along() -> None:
    model = gate(build(BERT), gates=JOINT)
    shape = model.plan(keep_ratio={"hidden": 0.5}).shape
    assert (shape.hidden_size, shape.num_attention_heads) == (32, 4)
    assert model.plan(keep_ratio=0.5).shape.num_attention_heads == 8
    with pytest.raises(IllegalShapeError, match="derives the size of a head from both numbers"):
        model.plan(Shape(num_attention_heads=4))
    with pytest.raises(IllegalShapeError, match="derives the size of a head from both numbers"):
        model.plan(Shape(hidden_size=32))


def test_a_plan_alone_is_enough() -> None:
    model = gate(build(BERT, torch.float64), gates=JOINT)
    plan = model.plan(SMALL)
    small = slim(build(BERT, torch.float64), plan)
    assert (small.config.hidden_size, small.config.num_attention_heads) == (40, 5)


def test_a_head_that_is_trained_beside_the_gates_is_masked_too() -> None:
    config = HawAdaConfig(gates=JOINT, task_type=TaskType.SEQ_CLS)
    model = get_peft_model(build(BERT, torch.float64), config).eval()
    assert "classifier" in str(model.base_model.model.classifier) or model.modules_to_save
    model.apply_plan(model.plan(SMALL))
    masked = outputs_of(model, inputs_of(model))
    small = model.merge_and_unload()
    assert gap(outputs_of(small, inputs_of(small)), masked) <= 1e-12
    again = get_peft_model(build(BERT), config)
    plain = again.unload()
    assert not any(isinstance(hook, StreamMask) for m in plain.modules() for hook in m._forward_pre_hooks.values())


def test_a_copy_of_the_model_has_gates_of_its_own() -> None:
    model = gate(build(BERT, torch.float64), gates=JOINT)
    other = copy.deepcopy(model)
    before = outputs_of(model, inputs_of(model))
    other.apply_plan(other.plan(SMALL))
    assert gap(outputs_of(model, inputs_of(model)), before) == 0
    assert gap(outputs_of(other.merge_and_unload(), inputs_of(model)), before) > 1e-3


def test_gates_learn() -> None:
    model = gate(build(BERT), gates=JOINT).train()
    optimizer = torch.optim.Adam([gate.theta for gate in collect_gates(model).values()], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**inputs_of(model), labels=torch.tensor([0, 1])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    stream = next(gate for name, gate in collect_gates(model).items() if "hawada_hidden" in name)
    assert stream.theta.grad.abs().max() > 0


def test_least_squares_where_blocks_are_added_to_the_stream() -> None:
    shape = Shape(num_attention_heads=6, hidden_size=48)
    dense = build(MODELS["gpt2"], torch.float64)
    model = gate(build(MODELS["gpt2"], torch.float64), shuffle=False, gates=JOINT)
    small = slim(dense, model.plan(shape))
    before = outputs_of(small, inputs_of(dense))
    reconstruct(dense, small, model.plan(shape), [inputs_of(dense)])
    expected = outputs_of(dense, inputs_of(dense))
    assert gap(outputs_of(small, inputs_of(dense)), expected) < gap(before, expected)
    post_norm = gate(build(BERT), shuffle=False, gates=JOINT)
    with pytest.raises(UnsupportedModelError, match="cannot be refitted"):
        post_norm.merge_and_unload(plan=post_norm.plan(shape), calibration=[inputs_of(post_norm)])


# ---------------------------------------------------------------------- what is not offered


def test_what_cannot_be_exported_is_not_gated() -> None:
    model = get_peft_model(build(BERT), HawAdaConfig())
    assert model.peft_config["default"].gates == ["ffn", "layers"]
    with pytest.raises(UnsupportedModelError, match="the size of a head is derived"):
        get_peft_model(build(BERT), HawAdaConfig(gates=("heads",)))
    with pytest.raises(UnsupportedModelError, match="add 'heads' to the config's `gates`"):
        get_peft_model(build(BERT), HawAdaConfig(gates=("ffn", "hidden")))
    with pytest.raises(UnsupportedModelError, match="Leave out `rotate`"):
        get_peft_model(build(BERT), HawAdaConfig(gates=JOINT, rotate=True))
    with pytest.raises(UnsupportedModelError, match="no head goes alone"):
        get_peft_model(build(FURTHER["mpnet"]), HawAdaConfig(gates=("heads", "ffn")))


def test_inspect_says_that_heads_follow() -> None:
    heads = inspect(build(BERT)).axis("heads")
    assert heads.follows == "hidden_size"
