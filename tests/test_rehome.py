"""A Llama as a Mistral: exact, and only where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import EVERYTHING, LM_ROW, VISION_ROW, build, gate, inputs_of, logits_of, scattered_plan
from transformers import AutoModelForCausalLM, MistralForCausalLM, MistralModel

from hawada_peft import Shape, save_slim, slim
from hawada_peft.errors import IllegalShapeError, UnsupportedModelError
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.legality import check_legal, legal_head_shapes
from hawada_peft.vanilla.rehoming import has_twin, rehome, twin_skeleton

ILLEGAL = Shape(6, 3, 40, 2)
"""Six heads do not divide a hidden size of 64: LlamaConfig refuses them."""

SCALED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"rope_parameters": SCALED}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_computes_the_same_bit_for_bit(fields: dict[str, object], dtype: torch.dtype) -> None:
    llama = build(LM_ROW, dtype, **fields)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    twin = rehome(llama)
    assert type(twin) is MistralForCausalLM
    assert twin.config.sliding_window is None
    assert torch.equal(logits_of(twin), logits_of(llama))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert twin.generation_config.to_dict() == llama.generation_config.to_dict()


def test_a_bare_model_has_a_bare_twin() -> None:
    llama = build(LM_ROW).model
    assert type(rehome(llama)) is MistralModel


def test_the_twin_takes_heads_that_llama_refuses(tmp_path: Path) -> None:
    llama = build(LM_ROW)
    with pytest.raises(IllegalShapeError, match="LlamaConfig refuses"):
        check_legal(locate(llama), ILLEGAL)
    plan = scattered_plan(llama, ILLEGAL)
    small = slim(rehome(llama), plan)
    gated = gate(build(LM_ROW), shuffle=False, gates=EVERYTHING)
    with MaskedQuality(gated, [inputs_of(gated)])._masked(plan):
        expected = logits_of(gated)
    torch.testing.assert_close(logits_of(small), expected, rtol=1e-4, atol=1e-5)
    save_slim(small, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert type(loaded) is MistralForCausalLM
    assert torch.equal(logits_of(loaded), logits_of(small))


def test_the_twin_is_known_without_weights() -> None:
    llama = build(LM_ROW)
    twin = twin_skeleton(locate(llama))
    assert next(twin.parameters()).is_meta
    more = set(legal_head_shapes(locate(twin))) - set(legal_head_shapes(locate(llama)))
    assert Shape(6, 3) in more


def test_biases_have_no_place_in_the_twin() -> None:
    llama = build(LM_ROW, attention_bias=True)
    assert not has_twin(locate(llama))
    with pytest.raises(UnsupportedModelError, match=r"parameters differ in .*bias"):
        rehome(llama)


def test_other_families_have_no_twin() -> None:
    vit = build(VISION_ROW)
    assert not has_twin(locate(vit))
    with pytest.raises(UnsupportedModelError, match=r"no twin to re-home to; rows with one: \['llama'\]"):
        rehome(vit)


def test_a_twin_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build(LM_ROW)
    twin = twin_skeleton(locate(llama))
    twin.config.rms_norm_eps = 0.5
    other = MistralForCausalLM(twin.config)
    other.load_state_dict(llama.state_dict())
    monkeypatch.setattr("hawada_peft.vanilla.rehoming.twin_skeleton", lambda layout: other)
    with pytest.raises(UnsupportedModelError, match="does not compute what LlamaForCausalLM does"):
        rehome(llama)
