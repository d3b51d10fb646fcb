"""Export is all or nothing: what cannot be right is refused, and what fails leaves the gated model as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from conftest import (
    BARE_ROW,
    LM_ROW,
    ROWS,
    VISION_ROW,
    Row,
    assert_same_state,
    build,
    difference,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    shuffle_gates,
    state_of,
)
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel

import hawada_peft.surgery.gated
from hawada_peft import HawAdaConfig, Plan, collect_gates, slim
from hawada_peft.errors import (
    BadDataError,
    BrokenGatesError,
    HawAdaError,
    IllegalShapeError,
    InvalidPlanError,
    UnsupportedModelError,
    VerificationError,
)
from hawada_peft.files.verify import compare
from hawada_peft.surgery.comparison import turned_tolerance
from hawada_peft.surgery.dense import dense_view
from hawada_peft.vanilla.outputs import outputs_of
from hawada_peft.vanilla.skeleton import auto_class_of

TIED = {"tie_word_embeddings": True}
KINDS = {"llama": LM_ROW, "vit": VISION_ROW, "bare": BARE_ROW, "tied": ROWS["smollm3"]}
BACKBONE = Row(
    "Dinov2Backbone",
    "Dinov2Config",
    {
        **VISION_ROW.fields,
        "mlp_ratio": 2,
        "num_hidden_layers": 6,
        "out_indices": [1, 2, 4, 6],
        "reshape_hidden_states": False,
    },
    VISION_ROW.slim,
)


def planned(row: Row, **options: Any) -> PeftModel:
    model = gate(build(row), **options)
    model.apply_plan(model.plan(keep_ratio=0.5))
    return model


# ------------------------------------------------------------------ all or nothing


def interrupted(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[type[BaseException], Callable[[PeftModel, pytest.MonkeyPatch], Any]]] = {
    "Ctrl-C while refitting": (
        KeyboardInterrupt,
        lambda model, patch: (
            patch.setattr(hawada_peft.surgery.gated, "reconstruct", interrupted),
            model.merge_and_unload(calibration=[inputs_of(model)] * 2),
        ),
    ),
    "Ctrl-C while slicing": (
        KeyboardInterrupt,
        lambda model, patch: (patch.setattr(hawada_peft.surgery.gated, "slim", interrupted), model.merge_and_unload()),
    ),
    "no calibration data": (HawAdaError, lambda model, patch: model.merge_and_unload(calibration=[])),
    "another model's plan": (
        HawAdaError,
        lambda model, patch: model.merge_and_unload(plan=Plan.keep_all(locate_other())),
    ),
}


def locate_other() -> Any:
    return scattered_plan(build(LM_ROW, num_hidden_layers=3), LM_ROW.slim).dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_merge_leaves_the_gated_model(kind: str, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planned(KINDS[kind])
    expected, state, plan = logits_of(model), state_of(model), model.applied_plan()
    config = model.get_base_model().config.to_dict()
    error, act = FAILURES[failure]
    with pytest.raises(error):
        act(model, monkeypatch)
    monkeypatch.undo()
    assert torch.equal(logits_of(model), expected)
    assert_same_state(state_of(model), state)
    assert model.applied_plan() == plan
    assert model.get_base_model().config.to_dict() == config
    assert difference(logits_of(model.merge_and_unload()), expected) <= 1e-5


@pytest.mark.parametrize("planned_first", [True, False])
def test_a_weight_that_is_no_number_is_refused_before_anything_changes(planned_first: bool) -> None:
    model = gate(build(LM_ROW))
    if planned_first:
        model.apply_plan(model.plan(keep_ratio=0.5))
    model.get_base_model().get_submodule("model.layers.3.mlp.down_proj").base_layer.weight.data.fill_(torch.inf)
    state = state_of(model)
    with pytest.warns() if not planned_first else nullcontext(), pytest.raises(BrokenGatesError):
        model.merge_and_unload(safe_merge=True)
    assert_same_state(state_of(model), state)


def test_gates_that_are_no_numbers_are_named() -> None:
    model = planned(LM_ROW)
    name, broken = next(iter(collect_gates(model).items()))
    broken.theta.data.fill_(torch.inf)
    with pytest.raises(BrokenGatesError, match=name.removeprefix("base_model.model.")):
        model.merge_and_unload()


def test_afterwards_the_base_is_the_dense_model(row: Row) -> None:
    base = build(row)
    dense, weights = logits_of(base), state_of(base)
    model = gate(base)
    slimmed = model.slim(plan=scattered_plan(model, row.slim))
    assert slimmed.dense is base
    assert torch.equal(logits_of(base), dense)
    assert_same_state(state_of(base), weights)
    assert slimmed.reference is not None
    compare(outputs_of(slimmed.model, inputs_of(base)), slimmed.reference.outputs, torch.float32)


def test_a_model_without_gates_is_not_merged_or_saved_again(tmp_path: Path) -> None:
    model = planned(LM_ROW)
    model.merge_and_unload()
    for again in (model.merge_and_unload, lambda: model.plan(keep_ratio=0.5), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(InvalidPlanError, match="no gates in this model any more"):
            again()
    assert not list(tmp_path.glob("*.safetensors"))


def test_slim_needs_a_plan() -> None:
    with pytest.raises(InvalidPlanError, match="there is no plan"):
        gate(build(LM_ROW)).slim()


@pytest.mark.parametrize(
    "keep_ratio", [True, False, {}, {"heads": True}, 0, 1.5, float("nan"), "half", {"depth": 0.5}]
)
def test_a_keep_ratio_that_says_nothing_is_refused(keep_ratio: Any) -> None:
    with pytest.raises(InvalidPlanError):
        gate(build(LM_ROW)).plan(keep_ratio=keep_ratio)


def test_what_was_slimmed_saves_itself(tmp_path: Path) -> None:
    batch = inputs_of(build(LM_ROW))
    build(LM_ROW).save_pretrained(tmp_path / "dense")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
    model = gate(base)
    model.apply_plan(model.plan(keep_ratio=0.5))
    slimmed = model.slim(calibration=[batch, batch])
    saved = slimmed.save(tmp_path / "slim", license="mit")
    report = json.loads((tmp_path / "slim" / "hawada_report.json").read_text())
    assert saved.folder == tmp_path / "slim"
    assert saved.verification is not None
    assert report["base"] == {"name": "dense", "license": "mit"}
    assert report["calibration"] == slimmed.calibration
    assert report["reconstruction"]["metric"] == "kl"
    assert (tmp_path / "slim" / "README.md").exists()


# ------------------------------------------------------------------ weights that are not the class's


def longer_head(model: PreTrainedModel) -> None:
    model.lm_head = nn.Linear(64, 130, bias=False)


def other_classes(model: PreTrainedModel) -> None:
    model.classifier = nn.Linear(64, 7)


def sequential(model: PreTrainedModel) -> None:
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(64, 3))


def biased(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(64))


def masked(model: PreTrainedModel) -> None:
    prune.random_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.5)


def normed(model: PreTrainedModel) -> None:
    parametrizations.weight_norm(model.model.layers[1].self_attn.q_proj)


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (LM_ROW, longer_head, r"lm_head\.weight .*\(130, 64\)"),
        (VISION_ROW, other_classes, r"classifier.*config\.num_labels = 7"),
        (VISION_ROW, sequential, r"classifier\.1\.weight"),
        (LM_ROW, biased, r"down_proj\.bias"),
        (LM_ROW, masked, r"prune\.remove"),
        (LM_ROW, normed, r"remove_parametrizations"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_that_no_slim_model_can_hold_are_refused_at_once(
    row: Row, change: Callable[[PreTrainedModel], None], message: str
) -> None:
    base = build(row)
    change(base)
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(base, HawAdaConfig())
    with pytest.raises(UnsupportedModelError, match=message):
        slim(base, scattered_plan(base, row.slim))
    late = planned(row)
    before = logits_of(late)
    below = late.get_base_model()
    if change in (other_classes, sequential, longer_head):
        kept = dict(below._modules)
        change(below)
        with pytest.raises(UnsupportedModelError, match=message):
            late.merge_and_unload()
        below._modules.update(kept)
        assert torch.equal(logits_of(late), before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_no_plain_numbers_are_refused(dtype: torch.dtype) -> None:
    base = build(LM_ROW)
    layer = base.model.layers[1].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    for export in (lambda: slim(base, scattered_plan(base, LM_ROW.slim)), lambda: planned_on(base).merge_and_unload()):
        with pytest.raises(UnsupportedModelError, match="quantized"):
            export()


class Packed(torch.Tensor):
    """As torchao's and quanto's: a floating dtype outside, other numbers inside."""


def test_weights_in_tensors_of_an_own_class_are_refused() -> None:
    base = build(LM_ROW)
    layer = base.model.layers[1].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="Packed"):
        slim(base, scattered_plan(base, LM_ROW.slim))


def planned_on(base: PreTrainedModel) -> PeftModel:
    model = get_peft_model(base, HawAdaConfig())
    model.apply_plan(model.plan(keep_ratio=0.5))
    return model


def test_offloaded_weights_are_refused() -> None:
    base = build(LM_ROW)
    plan = scattered_plan(base, LM_ROW.slim)
    cpu_offload(base, execution_device=torch.device("cpu"))
    for use in (lambda: get_peft_model(base, HawAdaConfig()), lambda: slim(base, plan)):
        with pytest.raises(UnsupportedModelError, match=r"offloaded.*slim_checkpoint"):
            use()


class Extra(transformers.LlamaForCausalLM):
    """A class that takes more than a config."""

    def __init__(self, config: Any, size: int) -> None:
        super().__init__(config)
        self.size = size


def test_a_constructor_that_takes_more_is_named() -> None:
    config = transformers.LlamaConfig(**LM_ROW.fields)
    with pytest.raises(UnsupportedModelError, match=r"Extra cannot be built from a config alone.*size"):
        get_peft_model(Extra(config, 3), HawAdaConfig())


# ------------------------------------------------------------------ what is computed beside the weights


def replaced(base: PreTrainedModel) -> None:
    forward = base.model.layers[0].mlp.forward
    base.model.layers[0].mlp.forward = lambda x: forward(x) * 3


def edited(base: PreTrainedModel) -> None:
    for layer in base.model.layers:
        layer.input_layernorm.variance_epsilon = 10.0


def hook(base: PreTrainedModel) -> None:
    base.model.layers[3].register_forward_hook(lambda module, args, output: output * 3)


def buffer(base: PreTrainedModel) -> None:
    base.model.rotary_emb.inv_freq.mul_(0.5)


def broken(base: PreTrainedModel) -> None:
    weight = base.model.layers[1].mlp.up_proj.weight
    weight.data = weight.index_fill(0, torch.arange(len(weight)), torch.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [(replaced, "replaced forward of"), (edited, "variance_epsilon is 10"), (hook, "hooks on"), (buffer, "buffer")],
)
def test_what_the_slim_model_cannot_have_is_found(change: Callable[[PreTrainedModel], None], message: str) -> None:
    model = planned(LM_ROW)
    change(model.get_base_model())
    expected, state = logits_of(model), state_of(model)
    with pytest.raises(VerificationError, match=message):
        model.merge_and_unload()
    assert torch.equal(logits_of(model), expected)
    assert_same_state(state_of(model), state)
    model.merge_and_unload(verify=False)


def test_the_comparison_takes_inputs_of_the_user() -> None:
    model = planned(VISION_ROW)
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "interpolate_pos_encoding": True}
    slimmed = model.slim(inputs=inputs)
    assert slimmed.reference is not None
    assert slimmed.reference.inputs is inputs


def second_head(base: PreTrainedModel) -> None:
    for head, offset in ((base.cls_classifier, 1), (base.distillation_classifier, -1)):  # their mean stays
        head.register_forward_hook(lambda module, args, output, offset=offset: output + offset)


def first_map(base: PreTrainedModel) -> None:
    forward = base.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.feature_maps = (output.feature_maps[0] * 3, *output.feature_maps[1:])
        return output

    base.forward = changed


def end_of_answers(base: PreTrainedModel) -> None:
    base.qa_outputs.register_forward_hook(lambda module, args, output: output * torch.tensor([1.0, 3.0]))


def no_padding(base: PreTrainedModel) -> None:
    base.score.register_forward_hook(lambda module, args, output: output * 3)


def decoder(base: PreTrainedModel) -> None:
    base.decoder.register_forward_hook(lambda module, args, output: output * 3)


def pooler(base: PreTrainedModel) -> None:
    base.pooler.register_forward_hook(lambda module, args, output: output * 3)


OTHER_HEADS: dict[str, tuple[Row, Callable[[PreTrainedModel], None], str]] = {
    "two heads": (
        Row("DeiTForImageClassificationWithTeacher", "DeiTConfig", ROWS["deit"].fields, VISION_ROW.slim),
        second_head,
        "cls_logits",
    ),
    "feature maps": (BACKBONE, first_map, r"feature_maps\.0"),
    "answers": (
        Row("Qwen2ForQuestionAnswering", "Qwen2Config", ROWS["qwen2"].fields, VISION_ROW.slim),
        end_of_answers,
        "end_logits",
    ),
    "no padding": (
        Row(
            "Qwen3ForSequenceClassification",
            "Qwen3Config",
            ROWS["qwen3"].fields | {"pad_token_id": None},
            VISION_ROW.slim,
        ),
        no_padding,
        "logits",
    ),
    "masked images": (
        Row("DeiTForMaskedImageModeling", "DeiTConfig", VISION_ROW.fields | {"encoder_stride": 8}, VISION_ROW.slim),
        decoder,
        "reconstruction",
    ),
    "pooled": (ROWS["vit-bare"], pooler, "pooler_output"),
}


@pytest.mark.parametrize("head", OTHER_HEADS)
def test_every_output_of_every_head_is_compared_in_a_merge(head: str) -> None:
    row, change, output = OTHER_HEADS[head]
    planned(row).merge_and_unload()
    model = planned(row)
    change(model.get_base_model())
    state = state_of(model)
    with pytest.raises(VerificationError, match=f"{output} differ by"):
        model.merge_and_unload()
    assert_same_state(state_of(model), state)


@pytest.mark.parametrize("inputs", [{}, {"pixel_values": torch.zeros(1, 3, 16, 16)}, [1], {"input_ids": [[1]]}])
def test_inputs_that_the_model_cannot_take_are_told(inputs: Any) -> None:
    with pytest.raises(BadDataError):
        planned(LM_ROW).merge_and_unload(inputs=inputs)


# ------------------------------------------------------------------ tied weights, buffers, layers that share


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "smollm3"])
@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.filterwarnings("ignore:.*tie")
def test_a_trained_head_of_a_tied_model_stays(name: str, trained: str, fold: bool) -> None:
    base = build(ROWS[name], **TIED)
    dense = logits_of(base)
    model = gate(base, shuffle=fold, modules_to_save=[trained])
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            parameter.data += torch.randn_like(parameter)
    model.apply_plan(model.plan(keep_ratio=0.5))
    masked = logits_of(model)
    slimmed = model.slim(fold=fold)
    assert difference(logits_of(slimmed.model), masked) <= 1e-5
    assert not slimmed.model.config.tie_word_embeddings
    assert base.config.tie_word_embeddings
    assert torch.equal(logits_of(base), dense)


def test_weights_untied_by_hand_stay_untied() -> None:
    base = build(LM_ROW, **TIED)
    base.lm_head.weight = nn.Parameter(torch.randn(128, 64))
    expected = logits_of(base)
    small = slim(base, Plan.keep_all(scattered_plan(base, LM_ROW.slim).dense))
    assert torch.equal(logits_of(small), expected)
    assert not small.config.tie_word_embeddings
    assert base.config.tie_word_embeddings


def test_layers_that_share_weights_are_sliced_each_by_its_own_units() -> None:
    base = build(LM_ROW)
    for name in ("up_proj", "gate_proj", "down_proj"):
        getattr(base.model.layers[3].mlp, name).weight = getattr(base.model.layers[1].mlp, name).weight
    model = gate(base)
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    masked = logits_of(model)
    small = model.merge_and_unload()
    assert difference(logits_of(small), masked) <= 1e-5
    assert small.model.layers[0].mlp.up_proj.weight is not small.model.layers[1].mlp.up_proj.weight


ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def test_frequencies_of_a_long_input_do_not_stay() -> None:
    base = build(LM_ROW, max_position_embeddings=32, rope_parameters=ROPE)
    fresh = base.model.rotary_emb.inv_freq.clone()
    model = planned_on(base)
    model(input_ids=torch.randint(128, (1, 60)))
    assert not torch.equal(base.model.rotary_emb.inv_freq, fresh)
    masked = logits_of(model)
    model(input_ids=torch.randint(128, (1, 60)))
    assert torch.equal(dense_view(base).model.rotary_emb.inv_freq, fresh)
    small = model.merge_and_unload()
    assert torch.equal(small.model.rotary_emb.inv_freq, fresh)
    assert difference(logits_of(small), masked) <= 1e-5


def test_frequencies_that_a_cast_has_rounded_are_exact_again() -> None:
    base = build(LM_ROW)
    fresh = base.model.rotary_emb.inv_freq.clone()
    base = base.to(torch.bfloat16).float()
    assert not torch.equal(base.model.rotary_emb.inv_freq, fresh)
    assert torch.equal(planned_on(base).merge_and_unload().model.rotary_emb.inv_freq, fresh)


# ------------------------------------------------------------------ modes, stages, Auto classes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gates", [("heads", "ffn", "layers"), ("heads", "ffn", "blocks", "hidden")])
def test_new_gates_have_the_mode_of_their_module(training: bool, gates: tuple[str, ...]) -> None:
    model = get_peft_model(build(LM_ROW).train(training), HawAdaConfig(gates=gates))
    assert {found.training for found in collect_gates(model).values()} == {training}
    model = shuffle_gates(model.train(training))
    plan = model.plan(keep_ratio=0.5)
    model.add_adapter("new", HawAdaConfig(gates=gates))
    model.add_weighted_adapter(["default"], [1.0], "sum")
    for name in ("new", "sum"):
        assert {found.training for found in collect_gates(model, name).values()} == {training}
    if not training:
        model.set_adapter("sum")
        model.apply_plan(plan)
        inputs = inputs_of(model)
        assert torch.equal(model(**inputs).logits, logits_of(model))


def merging_stages(full: Plan) -> Plan:
    layers = (0, 1, 5)
    return Plan(full.dense, layers, tuple(full.heads[i] for i in layers), tuple(full.channels[i] for i in layers))


@pytest.mark.parametrize("seed", range(5))
def test_a_backbone_keeps_its_feature_maps(seed: int) -> None:
    model = shuffle_gates(gate(build(BACKBONE)), seed=seed)
    plan = model.plan(keep_ratio={"layers": 0.5})
    assert len(plan.layers) == 4
    pixels = torch.randn(2, 3, 16, 16)
    model.apply_plan(plan)
    with torch.no_grad():
        masked = model(pixel_values=pixels).feature_maps
        found = model.merge_and_unload()(pixel_values=pixels).feature_maps
    assert len(found) == len(masked) == 4
    assert all(difference(new, old) <= 1e-5 for new, old in zip(found, masked, strict=True))


def test_plans_in_which_stages_fall_together_are_illegal() -> None:
    model = gate(build(BACKBONE))
    plan = merging_stages(model.plan(keep_ratio=1.0))
    for use in (model.apply_plan, lambda plan: model.slim(plan=plan), lambda plan: slim(build(BACKBONE), plan)):
        with pytest.raises(IllegalShapeError, match=r"at least 4|one layer before each stage"):
            use(plan)
    with pytest.raises(IllegalShapeError, match="at least 4"):
        model.plan(hawada_peft.Shape(num_hidden_layers=3))


def test_fields_of_custom_code_and_of_packed_weights_are_left_out() -> None:
    base = build(LM_ROW)
    base.config.auto_map = {"AutoModelForCausalLM": "code.Custom"}
    small = slim(base, scattered_plan(base, LM_ROW.slim))
    assert "auto_map" not in small.config.to_dict()


@pytest.mark.parametrize("name", ["DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_every_class_of_an_auto_class_is_found(name: str) -> None:
    model = getattr(transformers, name)(transformers.DeiTConfig(**ROWS["deit"].fields))
    assert auto_class_of(model) is transformers.AutoModelForImageClassification


def test_a_copy_of_a_gated_model_merges_by_itself() -> None:
    model = planned(LM_ROW)
    expected = logits_of(model)
    copied = copy.deepcopy(model)
    copied.merge_and_unload()
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize(
    ("dtype", "device", "allowed"),
    [
        (torch.float32, "cpu", 1e-4),
        (torch.float32, "cuda", 2e-2),  # it may compute in TF32
        (torch.float64, "cuda", 1e-4),  # norms compute in float32
        (torch.bfloat16, "cuda", 1e-1),
    ],
)
def test_new_coordinates_may_round_as_the_device_does(dtype: torch.dtype, device: str, allowed: float) -> None:
    assert turned_tolerance(dtype, torch.device(device)) == allowed
