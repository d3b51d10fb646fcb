"""Heads of fewer features: exact where it can be, refused with the reason elsewhere, and a base like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    KINDS,
    ROWS,
    VISION_ROW,
    assert_same_state,
    build,
    difference,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    state_of,
)
from torch import nn
from transformers import PreTrainedModel
from zoo import ZOO

from hawada_peft import Shape, rotate, save_slim
from hawada_peft.basis import narrow_heads
from hawada_peft.basis.heads.maps import narrow_attention
from hawada_peft.basis.heads.moments import HeadMoments, collect_head_moments
from hawada_peft.basis.heads.narrow import check_narrow, narrow_error
from hawada_peft.basis.heads.projections import find_projections
from hawada_peft.basis.proof import ROUNDING
from hawada_peft.errors import HawAdaError, IllegalShapeError, UnsupportedModelError
from hawada_peft.vanilla.family import locate

WITHOUT_ROTARY = (
    "vit", "deit", "dinov2", "dinov2_with_registers", "beit", "ijepa", "vit_mae", "vit_msn",
    "audio-spectrogram-transformer",
)  # fmt: skip
NO_ROPE = {"num_key_value_heads": 8, "no_rope_layers": [0, 0, 0, 0]}
"""Of a SmolLM3 that knows no positions at all."""


def from_zoo(name: str) -> PreTrainedModel:
    """In float64, with no weight at a special value."""
    torch.manual_seed(1)
    kind = ZOO[name]
    model = kind.model_class(kind.make_config()).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def batches_of(model: PreTrainedModel, rows: int = 32) -> list[dict[str, torch.Tensor]]:
    """Batches of what the model takes, drawn at random."""
    generator, example = torch.Generator().manual_seed(0), inputs_of(model)
    name = model.main_input_name
    if name == "input_ids":
        return [{name: batch} for batch in torch.randint(3, 128, (2, rows, 16), generator=generator)]
    shape = (2, rows, *example[name].shape[1:])
    return [{name: batch.to(model.dtype)} for batch in torch.randn(shape, generator=generator)]


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".attention")]


def use_half(model: PreTrainedModel, *, biases: bool = True) -> None:
    """Make every head of a ViT use 4 of its 8 features' directions."""
    generator = torch.Generator().manual_seed(0)
    for attention in attentions(model):
        for name in ("q_proj", "v_proj"):
            module: Any = attention.get_submodule(name)
            draw = torch.randn(8, 8, 4, generator=generator, dtype=module.weight.dtype)
            onto = torch.block_diag(*(each @ each.mT for each in torch.linalg.qr(draw).Q))
            module.weight.data = onto @ module.weight
            if biases:
                module.bias.data = onto @ module.bias


# ------------------------------------------------------------------- exact


@pytest.mark.parametrize("name", WITHOUT_ROTARY)
def test_full_heads_are_exact_in_float64_and_narrow_ones_reload(name: str, tmp_path: Path) -> None:
    model = from_zoo(name)
    before, batches = state_of(model), batches_of(model)
    full, narrow = (narrow_heads(model, batches, size) for size in (8, 5))
    assert_same_state(state_of(model), before)
    assert difference(logits_of(full), logits_of(model)) <= 1e-12
    changed = [key for key, tensor in full.state_dict().items() if not torch.equal(tensor, before[key])]
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert type(narrow) is type(model)
    assert narrow.config.head_dim == 5
    assert narrow.config.num_attention_heads == model.config.num_attention_heads
    assert narrow.num_parameters() < model.num_parameters()
    save_slim(narrow.float(), tmp_path, inputs=inputs_of(narrow))  # reloaded through its Auto class, and compared
    assert transformers.AutoConfig.from_pretrained(tmp_path).head_dim == 5


def test_text_without_positions_has_narrow_heads() -> None:
    model = build(ROWS["smollm3"], torch.float64, **NO_ROPE)
    assert difference(logits_of(narrow_heads(model, batches_of(model), 8)), logits_of(model)) <= 1e-6  # float32 norms


def test_heads_that_use_few_directions_lose_nothing() -> None:
    model = build(VISION_ROW, torch.float64)
    use_half(model)
    narrow = narrow_heads(model, batches_of(model), 4)
    assert difference(logits_of(narrow), logits_of(model)) <= 1e-8
    assert difference(logits_of(narrow_heads(narrow, batches_of(model), 3)), logits_of(model)) > 1e-3


def test_a_bias_takes_up_what_means_lose() -> None:
    """Values' biases lie in more directions than values vary in."""
    model = build(VISION_ROW, torch.float64)
    use_half(model)
    for attention in attentions(model):
        attention.get_submodule("v_proj").bias.data += 1.0
    narrow = narrow_heads(model, batches_of(model), 4)
    assert difference(logits_of(narrow), logits_of(model)) <= 1e-8


def test_what_all_heads_add_is_nearest_by_least_squares() -> None:
    """No other projection behind the narrow heads leaves less: what is left has nothing to do with what they give."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = draw(200, 3) @ draw(3, 16) + 0.3 * draw(200, 16) + draw(16)  # 2 heads of 8 that have much in common
    mean, square = given.mean(0), torch.eye(8, dtype=torch.float64).expand(1, 2, 8, 8)
    output = torch.cov(given.T, correction=0)[None]
    moments = HeadMoments(square, square, output, mean[None])
    same, weight, bias = torch.eye(16, dtype=torch.float64), draw(24, 16), draw(24)
    made = narrow_attention(moments, 0, [(same, None)] * 3 + [(weight, bias)], 3)
    narrow, wanted = given @ made[2][0].T, given @ weight.T + bias
    left = wanted - (narrow @ made[3][0].T + made[3][1])
    assert narrow.shape == (200, 6)
    assert left.mean(0).abs().max() < 1e-9
    assert ((narrow - narrow.mean(0)).T @ left).norm() < 1e-4 * ((narrow - narrow.mean(0)).T @ wanted).norm()


def test_directions_are_those_that_matter() -> None:
    """What is left is nearer to the model than with other batches' directions, or with heads' first features."""
    model = build(VISION_ROW, torch.float64)
    inputs = batches_of(model)
    batch = inputs[0]
    with torch.no_grad():
        wanted = model(**batch).logits
        found = narrow_heads(model, inputs, 4)(**batch).logits
        other = narrow_heads(model, [{"pixel_values": 1 + 0.1 * each["pixel_values"]} for each in inputs], 4)
        elsewhere = other(**batch).logits
    assert difference(found, wanted) < difference(elsewhere, wanted)


def test_the_same_batches_give_the_same_model_and_the_caller_keeps_everything() -> None:
    model = build(VISION_ROW).train()
    random_state = torch.get_rng_state()
    first, again = (narrow_heads(model, batches_of(model), 4) for _ in range(2))
    assert_same_state(state_of(first), state_of(again))
    assert first.training
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_padding_does_not_count() -> None:
    model = build(ROWS["smollm3"], torch.float64, **NO_ROPE)
    layout, batches = locate(model), batches_of(model)
    padded = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 4)),
            "attention_mask": nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 4)),
        }
        for batch in batches
    ]
    plain, found = (
        collect_head_moments(model, layout, find_projections(layout), given) for given in (batches, padded)
    )
    for name, tensor in vars(plain).items():
        assert difference(vars(found)[name], tensor) <= 1e-5, name


# ----------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("row", "fields", "reason"),
    [
        ("llama-mha", {}, "a shift of all keys changes what its heads give"),
        ("qwen3", {}, "q_norm.weight' of shape"),
        ("smollm3", NO_ROPE | {"no_rope_layers": [0, 0, 0, 1]}, "a shift of all keys"),
        ("smollm3", NO_ROPE | {"num_key_value_heads": 4}, "2 query heads share each of its 4 KV groups"),
        ("bert", {}, "derives the size of a head"),
    ],
)
def test_what_would_not_be_exact_is_refused(row: str, fields: dict[str, Any], reason: str) -> None:
    model = build((ROWS | KINDS)[row], **fields)
    with pytest.raises(UnsupportedModelError, match=reason):
        narrow_heads(model, batches_of(model), 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3", "qkv_proj.weight' of shape"),
        ("gpt2", "derives the size of a head"),
        ("t5", "outside of its layers|depends on the size"),
    ],
)
def test_other_classes_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        find_projections(locate(from_zoo(name)))


def test_the_proof_would_notice_what_is_wrong() -> None:
    layout = locate(build(VISION_ROW))
    found = find_projections(layout)
    assert narrow_error(layout, found, 3) < 1e-9
    wrong = replace(found, query=found.value, value=found.query)
    assert narrow_error(layout, wrong, 3) > ROUNDING
    with pytest.raises(UnsupportedModelError, match="differs by"):
        check_narrow(locate(build(VISION_ROW, attention_probs_dropout_prob=0.1)), wrong, 3)


@pytest.mark.parametrize("size", [0, 9, 4.0, True, "4"])
def test_impossible_sizes_are_refused(size: Any) -> None:
    model = build(VISION_ROW)
    with pytest.raises(IllegalShapeError, match="from 1 to 8"):
        narrow_heads(model, batches_of(model), size)


def test_bad_calibration_is_refused() -> None:
    model = build(VISION_ROW)
    with pytest.raises(HawAdaError, match="no calibration batches"):
        narrow_heads(model, [], 4)
    with pytest.raises(HawAdaError, match="hold 10 positions, and the heads of a layer have 64 features"):
        narrow_heads(model, [{"pixel_values": torch.randn(2, 3, 16, 16)}], 4)
    model.vit.layers[0].layernorm_before.weight.data[0] = float("inf")
    with pytest.raises(HawAdaError, match="NaN or infinity"):
        narrow_heads(model, batches_of(model), 4)
    with pytest.raises(UnsupportedModelError, match="adapters in it"):
        narrow_heads(gate(build(VISION_ROW)).get_base_model(), batches_of(model), 4)


# ------------------------------------------------------------ a base like any


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_narrow_heads_are_rotated_gated_and_cut_as_any(name: str) -> None:
    base = build(ROWS[name])
    narrow = narrow_heads(base, batches_of(base), 5)
    rotated = rotate(narrow, batches_of(base))
    assert rotated.config.head_dim == 5
    assert difference(logits_of(rotated), logits_of(narrow)) <= 1e-5
    model = gate(rotated, gates=("heads", "ffn", "layers"))
    assert model.peft_config["default"].to_dict()["base_sizes"]["head_dim"] == 5
    model.apply_plan(scattered_plan(model, Shape(3, 3, 64, 2)))
    masked = logits_of(model)
    slim = model.merge_and_unload()
    assert (slim.config.head_dim, slim.config.num_attention_heads) == (5, 3)
    assert difference(logits_of(slim), masked) <= 1e-5
