"""The passport: what it claims, and on what evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import KINDS, LM_ROW, ROWS, VISION_ROW, Export, Row, build, scattered_plan
from transformers import PreTrainedModel

from hawada_peft import Shape, slim
from hawada_peft.errors import HawAdaError
from hawada_peft.shipping import PassportLine, check_compile
from hawada_peft.shipping.passport import alignment, passport_of
from hawada_peft.shipping.runtime_rules import RULES, VERSIONS_TRIED
from hawada_peft.vanilla.family import FAMILIES, locate, register_family
from hawada_peft.vanilla.skeleton import skeleton_of


def lines_of(model: PreTrainedModel, **options: object) -> dict[str, PassportLine]:
    return {line.runtime: line for line in passport_of(model, locate(model), **options)}


def slimmed(row: Row, shape: Shape) -> PreTrainedModel:
    model = build(row)
    return slim(model, scattered_plan(model, shape))


def on_meta(**fields: object) -> PreTrainedModel:
    config = transformers.LlamaConfig(**(LM_ROW.fields | fields), architectures=["LlamaForCausalLM"])
    return skeleton_of(config)


@pytest.mark.parametrize(
    ("answer", "evidence"),
    [("maybe", "rule"), ("yes", "hearsay"), ("yes", "not checked"), ("unknown", "run")],
)
def test_a_line_needs_an_answer_and_its_evidence(answer: str, evidence: str) -> None:
    with pytest.raises(HawAdaError, match=answer):
        PassportLine("anything", answer, evidence, "")


def test_what_was_not_run_says_so(exported: Export) -> None:
    lines = lines_of(exported.slim)
    here = lines[f"transformers {transformers.__version__}"]
    for line in (here, lines["torch.compile"], lines["ONNX"]):
        assert (line.answer, line.evidence) == ("unknown", "not checked")
    assert all(line.evidence != "run" for line in lines.values())


def test_a_verified_folder_was_run(exported: Export) -> None:
    lines = lines_of(exported.slim, verification=exported.verification)
    here = lines[f"transformers {transformers.__version__}"]
    assert (here.answer, here.evidence) == ("yes", "run")
    assert exported.verification.auto_class in here.detail
    assert f"{exported.verification.max_difference:.2g}" in here.detail


def test_a_compiled_timing_is_evidence() -> None:
    line = lines_of(build(LM_ROW), compiled_on="some device")["torch.compile"]
    assert (line.answer, line.evidence) == ("yes", "run")
    assert "some device" in line.detail


def test_what_was_run_replaces_what_is_assumed() -> None:
    run = PassportLine("vLLM, tensor parallel 2", "yes", "run", "vLLM 1.2.3, 2 GPUs")
    other = PassportLine("a phone", "no", "run", "too small")
    found = passport_of(build(LM_ROW), locate(build(LM_ROW)), checked=(run, other))
    assert run in found
    assert found[-1] == other
    assert len({line.runtime for line in found}) == len(found)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_rules_about_versions_that_were_tried(name: str) -> None:
    rules = RULES[name]
    assert {rules.transformers, rules.free_heads, *rules.also} <= set(VERSIONS_TRIED)
    assert all(VERSIONS_TRIED.index(each) < VERSIONS_TRIED.index(rules.transformers) for each in rules.also)
    assert VERSIONS_TRIED.index(rules.transformers) <= VERSIONS_TRIED.index(rules.free_heads)


def test_cut_heads_of_a_vit_need_a_later_version_than_a_cut_ffn() -> None:
    rules = RULES["vit"]
    heads = lines_of(slimmed(VISION_ROW, VISION_ROW.slim))["other transformers versions"]
    ffn = lines_of(slimmed(VISION_ROW, Shape(intermediate_size=40)))["other transformers versions"]
    assert heads.detail.startswith(rules.free_heads)
    assert f"did not load or computed something else with {rules.transformers}" in heads.detail
    assert ffn.detail.startswith(rules.transformers)
    assert {heads.evidence, ffn.evidence} == {"rule"}


def test_older_versions_that_do_are_not_said_to_fail() -> None:
    line = lines_of(slimmed(KINDS["olmo2"], KINDS["olmo2"].slim))["other transformers versions"]
    works, fails = line.detail.split(", and did not load or computed something else with ")
    rules = RULES["olmo2"]
    assert all(version in works for version in rules.also)
    assert fails == "5.4.0"


def test_version_4_needs_the_rotary_parameters_by_their_old_names() -> None:
    model = slimmed(LM_ROW, LM_ROW.slim)
    assert lines_of(model)["other transformers versions"].detail.startswith("4.57.6")
    del model.config.rope_theta
    line = lines_of(model)["other transformers versions"]
    assert line.detail.startswith("5.0.0")
    assert "computed something else with 4.57.6" in line.detail


def test_only_what_was_tried_is_claimed_of_gguf() -> None:
    line = lines_of(slimmed(ROWS["llama-bare"], ROWS["llama-bare"].slim))["GGUF (llama.cpp)"]
    assert (line.answer, line.evidence) == ("unknown", "not checked")


@pytest.mark.usefixtures("rows_of_families")
def test_nothing_is_claimed_of_a_family_without_rules() -> None:
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**LM_ROW.fields))
    register_family("olmo", replace(FAMILIES["llama"], twin="", twin_fields=()))
    lines = lines_of(model)
    assert lines["other transformers versions"].answer == "unknown"
    assert lines["GGUF (llama.cpp)"].answer == "unknown"


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, {1, 2, 4, 8}),
        ({"num_key_value_heads": 2}, {1, 2, 4, 8}),
        ({"num_attention_heads": 4}, {1, 2, 4}),
        ({"intermediate_size": 90}, {1, 2}),
        ({"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 99}, {1}),
        ({"num_attention_heads": 16, "hidden_size": 128}, {1, 2, 4, 8, 16}),
    ],
)
def test_tensor_parallel_sizes_divide_everything(fields: dict[str, int], sizes: set[int]) -> None:
    lines = lines_of(on_meta(**fields))
    found = {int(name.split()[-1]) for name, line in lines.items() if "parallel" in name and line.answer == "yes"}
    assert found == sizes
    assert all(line.evidence == "rule" for name, line in lines.items() if "parallel" in name)


def test_kv_heads_are_copied_but_not_split_unevenly() -> None:
    two = lines_of(on_meta(num_key_value_heads=2))["vLLM, tensor parallel 8"]
    assert "each KV head is on 4 GPUs" in two.detail
    three = lines_of(on_meta(num_attention_heads=12, num_key_value_heads=3, hidden_size=96))["vLLM, tensor parallel 2"]
    assert three.answer == "no"
    assert "3 KV heads" in three.detail


def test_vision_models_have_no_lines_about_language_servers() -> None:
    lines = lines_of(build(VISION_ROW))
    assert not any("vLLM" in name for name in lines)
    assert lines["GGUF (llama.cpp)"].answer == "no"


@pytest.mark.parametrize(("ffn", "small", "large"), [(512, "yes", "yes"), (480, "yes", "no"), (500, "no", "no")])
def test_quantised_rows_are_whole_blocks(ffn: int, small: str, large: str) -> None:
    model = on_meta(hidden_size=256, head_dim=32, num_key_value_heads=8, intermediate_size=ffn)
    lines = {name: line for name, line in lines_of(model).items() if "all tensors" in name}
    assert [line.answer for line in lines.values()] == [small, large]
    assert all(line.evidence == "computed" for line in lines.values())
    assert all((str(ffn) in line.detail) == (line.answer == "no") for line in lines.values())


@pytest.mark.parametrize("name", ["qwen2", "granite"])
def test_families_whose_cut_heads_llama_cpp_does_not_load(name: str) -> None:
    assert lines_of(slimmed(ROWS[name], Shape(intermediate_size=40)))["GGUF (llama.cpp)"].answer == "yes"
    assert lines_of(slimmed(ROWS[name], ROWS[name].slim))["GGUF (llama.cpp)"].answer == "no"


@pytest.mark.parametrize(("ffn", "answer"), [(128, "yes"), (96, "no"), (130, "no")])
def test_four_bit_weights_need_whole_blocks(ffn: int, answer: str) -> None:
    line = lines_of(on_meta(intermediate_size=ffn))["bitsandbytes, 4 bit on a CPU"]
    assert line.answer == answer
    assert (f"x{ffn}" in line.detail) == (answer == "no")


def test_alignment_of_the_sizes() -> None:
    model = on_meta(intermediate_size=192, vocab_size=130)
    found = alignment(model, locate(model))
    assert found["intermediate_size"] == {"size": 192, "multiple_of": [8, 64]}
    assert found["hidden_size"] == {"size": 64, "multiple_of": [8, 64]}
    assert found["key and value features"] == {"size": 32, "multiple_of": [8]}
    assert found["vocab_size"] == {"size": 130, "multiple_of": []}
    assert "vocab_size" not in alignment(build(VISION_ROW), locate(build(VISION_ROW)))


def test_compiling_is_run_and_compared() -> None:
    model = build(VISION_ROW, num_hidden_layers=1).train()
    line = check_compile(model, backend="eager")
    assert (line.answer, line.evidence) == ("yes", "run")
    assert line.runtime == "torch.compile, backend eager"  # no claim about the default backend
    assert torch.__version__ in line.detail
    assert model.training


def test_a_compiler_that_computes_something_else_is_found_out() -> None:
    def wrong(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        return lambda *tensors: tuple(output * 1.5 for output in graph(*tensors))

    line = check_compile(build(VISION_ROW, num_hidden_layers=1), backend=wrong)
    assert (line.answer, line.evidence) == ("no", "run")


def test_a_compiler_that_fails_is_reported() -> None:
    def broken(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        raise RuntimeError("no such instruction")

    line = check_compile(build(VISION_ROW, num_hidden_layers=1), backend=broken)
    assert (line.answer, line.evidence) == ("no", "run")
