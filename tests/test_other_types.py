"""Types that are in no table: what is offered of them is exact, whatever is strange about their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import difference, first_of, gate
from transformers import LlamaConfig, PreTrainedModel

from hawada_peft import inspect
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.errors import UnsupportedModelError
from hawada_peft.vanilla.outputs import outputs_of

TEXT = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 3, "intermediate_size": 96}
LM = TEXT | SIZES | {"num_key_value_heads": 4}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
VISION = SIZES | {"image_size": 16, "patch_size": 4}

TYPES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    # A gate on keys and values shares units within each layer; a proof by two heads of four may hold by chance.
    "Doge": ("DogeForCausalLM", LM, {"ffn", "layers"}),
    # Layers of two kinds, with different rows for each group of heads.
    "MiMoV2Flash": ("MiMoV2FlashForCausalLM", LM | EXPERTS | {"n_routed_experts": 4}, {"ffn", "layers"}),
    # What a block adds is normed: the norm reads the stream, and carries the layer's gate.
    "Afmoe": ("AfmoeForCausalLM", LM | EXPERTS | {"num_experts": 4}, {"heads", "ffn", "layers"}),
    # A list of convolutions, each of which is a layer.
    "Speech2Text": (
        "Speech2TextModel",
        TEXT
        | {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "input_feat_per_channel": 16}
        | {"conv_channels": 32, "max_source_positions": 64, "max_target_positions": 64},
        {"ffn", "layers"},
    ),
    # Images come in tiles, with their sizes.
    "LlavaNext": (
        "LlavaNextForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **LM},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 120,
            "image_grid_pinpoints": [[16, 32]],
        },
        {"heads", "ffn", "layers"},
    ),
}
"""Class, fields, and what can go."""


def build(name: str) -> PreTrainedModel:
    model_class, fields, _ = TYPES[name]
    config = getattr(transformers, f"{name}Config")(**fields, architectures=[model_class])
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).double().eval()
    if EXPERTS.items() <= fields.items():
        model.set_experts_implementation("eager")  # the others do not know float64
    return model


def values_of(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return next(iter(outputs_of(model, inputs).values()))


@pytest.mark.parametrize("name", first_of(TYPES, "Doge"))
def test_what_is_offered_slims_exactly(name: str, tmp_path: Path) -> None:
    dense = build(name)
    inputs = example_inputs(dense)
    model = gate(build(name))
    plan = model.plan(keep_ratio=dict.fromkeys(TYPES[name][2], 0.6))
    assert not plan.keeps_all
    model.apply_plan(plan)
    masked = values_of(model, inputs)
    assert difference(masked, values_of(dense, inputs)) > 1e-3
    model.merge_and_unload(inputs=inputs).save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    assert difference(values_of(loaded, inputs), masked) <= 1e-12


def test_heads_that_share_units_are_not_offered_by_a_lucky_draw() -> None:
    names = {axis.name for axis in inspect(build("Doge").config).axes}
    assert "intermediate_size" in names
    assert "num_attention_heads" not in names


def test_a_norm_behind_a_block_holds_one_gate() -> None:
    with pytest.raises(UnsupportedModelError, match="'hidden', or 'blocks' and 'layers'"):
        gate(build("Afmoe"), gates=("layers", "hidden"))


def test_what_the_inputs_do_not_reach_is_not_proved() -> None:
    """The image's queries and keys change nothing where nothing is said of the image."""
    dense = build("LlavaNext")
    text = {"pixel_values": None, "input_ids": example_inputs(dense)["input_ids"] % 100}
    assert any("vision_config" in axis.name for axis in inspect(dense.config).axes)
    assert not any("vision_config" in axis.name for axis in inspect(dense.config, inputs=text).axes)


def test_sizes_of_an_ffn_are_those_that_the_class_builds() -> None:
    """Its channels are those of whole experts that are shared."""
    model = gate(build("Afmoe"))
    for ratio in (0.3, 0.6, 0.9):
        assert model.plan(keep_ratio={"ffn": ratio}).shape.sizes()["intermediate_size"] in (32, 64)


def test_a_kind_of_input_that_cannot_be_drawn_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    dense = build("LlavaNext")
    dense.config.image_grid_pinpoints = [[16]]  # no height and width
    with caplog.at_level("INFO", "hawada_peft"):
        assert set(example_inputs(dense)) == {"input_ids"}
    assert "gets no example pixel_values" in caplog.text


def test_a_config_that_its_class_does_not_build_is_refused() -> None:
    config = LlamaConfig(**LM, architectures=["LlamaForCausalLM"], per_layer_config={0: {"intermediate_size": 48}})
    with pytest.raises(UnsupportedModelError, match="no LlamaForCausalLM is built from this config"):
        inspect(config)
