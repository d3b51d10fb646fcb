"""Models built for their shapes, or for weights that are put in."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from hawada_peft.vanilla.skeleton import Undrawn, build_undrawn

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = SMALL | {"image_size": 8, "patch_size": 4}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(Dinov2Model, Dinov2Config(**IMAGE)), (ViTModel, ViTConfig(**IMAGE, intermediate_size=16))],
    ids=["dinov2", "vit"],
)
def test_a_class_that_draws_again_until_all_is_within_bounds_ends(model_class, config):
    built = build_undrawn(model_class, config)
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == {
        name: tensor.shape for name, tensor in model_class(config).state_dict().items()
    }


def test_no_number_is_drawn_and_the_random_state_stays():
    config = LlamaConfig(**SMALL, intermediate_size=16, vocab_size=8)
    before = torch.get_rng_state()
    with Undrawn():
        LlamaForCausalLM(config)
    build_undrawn(LlamaForCausalLM, config)
    assert torch.equal(torch.get_rng_state(), before)
