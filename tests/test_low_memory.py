"""Models larger than memory: refitted layer by layer from their files, as in memory, with one layer there at once."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, LM_ROW, ROWS, VISION_ROW, Row, build, gate, scattered_plan
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hawada_peft import Plan, Shape, slim, slim_checkpoint
from hawada_peft.basis.find import find_basis
from hawada_peft.cli.program import app
from hawada_peft.errors import BadDataError, HawAdaError, UnsupportedModelError
from hawada_peft.files.checkpoint import Checkpoint
from hawada_peft.files.spill import Spill
from hawada_peft.refit import reconstruct
from hawada_peft.refit.layerwise import in_memory
from hawada_peft.refit.low_memory import refit_on_demand, start_stream
from hawada_peft.refit.on_demand import OnDemand
from hawada_peft.vanilla.buffers import compute_buffers
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.outputs import output_of

GPT2 = Row(
    "GPT2LMHeadModel",
    "GPT2Config",
    {"vocab_size": 128, "n_embd": 64, "n_head": 8, "n_layer": 4, "n_positions": 64, "n_inner": 96},
    Shape(8, 8, 40, 2),
)
MIXTRAL = Row(
    "MixtralForCausalLM",
    "MixtralConfig",
    LM_ROW.fields | {"num_local_experts": 4},
    Shape(4, 2, 40, 2),
)
WALKED = {"llama": LM_ROW, "vit": VISION_ROW, "gpt2": GPT2} | {
    name: (ROWS | KINDS)[name] for name in ("bert", "gemma2", "smollm3", "llama-bare")
}


def examples_of(row: Row, *, padded: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if row is VISION_ROW:
        return {"pixel_values": torch.randn(48, 3, 16, 16, generator=generator)}
    examples = {"input_ids": torch.randint(3, 128, (48, 12), generator=generator)}
    if padded:
        examples["attention_mask"] = torch.ones(48, 12, dtype=torch.long)
        examples["attention_mask"][1::3, :5] = 0
    return examples


def batches_of(row: Row, **options: Any) -> list[dict[str, torch.Tensor]]:
    examples = examples_of(row, **options)
    return [{name: value[start : start + 8] for name, value in examples.items()} for start in range(0, 48, 8)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def assert_as_in_memory(folder: Path, batches: list[dict[str, torch.Tensor]], **options: Any) -> None:
    """Of `base` (and `adapter`, if it is there) in the folder."""
    adapter = folder / "adapter" if (folder / "adapter").exists() else None
    loaded = slim_checkpoint(folder / "base", adapter, folder / "loaded", calibration=batches, **options)
    walked = slim_checkpoint(
        folder / "base",
        adapter,
        folder / "walked",
        calibration=batches,
        low_memory=True,
        max_shard_size="40KB",
        **options,
    )
    plain = slim_checkpoint(folder / "base", adapter, folder / "plain", **options)
    assert_close(weights_of(folder / "walked"), weights_of(folder / "loaded"))
    expected, found = loaded.reconstruction, walked.reconstruction
    assert expected
    assert found
    assert found.applied
    assert expected.applied
    assert found.metric == expected.metric
    assert found.before == pytest.approx(expected.before, rel=1e-3)
    assert found.after == pytest.approx(expected.after, rel=1e-3)
    assert [refit.damping for refit in found.refits] == [refit.damping for refit in expected.refits]
    assert all(parameter.is_meta for parameter in walked.model.parameters())
    changed = weights_of(plain.folder or Path())
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in weights_of(folder / "walked").items())


@pytest.mark.parametrize("name", WALKED)
def test_weights_are_those_refitted_in_memory(name: str, tmp_path: Path) -> None:
    model = build(WALKED[name])
    model.save_pretrained(tmp_path / "base")
    assert_as_in_memory(tmp_path, batches_of(WALKED[name]), plan=scattered_plan(model, WALKED[name].slim))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "loaded", "plain", "walked"]


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    assert_as_in_memory(tmp_path, batches_of(LM_ROW, padded=True), plan=scattered_plan(model, LM_ROW.slim))


def test_half_precision_and_gates_over_lora(tmp_path: Path) -> None:
    model = build(LM_ROW, torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    gated = gate(model, lora={"r": 2, "target_modules": ["down_proj", "q_proj"]})
    gated.apply_plan(scattered_plan(gated, LM_ROW.slim))
    gated.save_pretrained(tmp_path / "adapter")
    assert_as_in_memory(tmp_path, batches_of(LM_ROW))


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])
def test_directions_of_a_basis(row: Row, tmp_path: Path) -> None:
    model, batches = build(row), batches_of(row)
    model.save_pretrained(tmp_path / "base")
    basis = find_basis(model, batches)
    cut = scattered_plan(model, Shape(intermediate_size=48))
    dense = replace(locate(model).dense, hidden_size=64)
    plan = Plan(dense, cut.layers, cut.heads, cut.channels, hidden=tuple(range(56)), rotated=True)
    assert_as_in_memory(tmp_path, batches, plan=plan, basis=basis)


def test_channels_of_the_stream(tmp_path: Path) -> None:
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    layout, full = locate(model), Plan.keep_all(locate(model).full)
    plan = Plan(
        replace(layout.dense, hidden_size=64), full.layers, full.heads, full.channels, hidden=tuple(range(0, 64, 2))
    )
    assert_as_in_memory(tmp_path, batches_of(LM_ROW), plan=plan)


class Watched:
    """Reads weights of a model, and counts the bytes of those that are still there."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.state = model.state_dict()
        self.now = self.most = self.reads = 0

    def __call__(self, name: str) -> torch.Tensor:
        tensor = self.state[name].clone()
        self.now, self.reads = self.now + tensor.nbytes, self.reads + 1
        self.most = max(self.most, self.now)
        weakref.finalize(tensor.untyped_storage(), self._gone, tensor.nbytes)
        return tensor

    def _gone(self, count: int) -> None:
        self.now -= count


def skeleton_and_weights(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Watched]:
    model.save_pretrained(folder)
    return Checkpoint(folder).skeleton, Watched(model)


def bytes_of(model: PreTrainedModel) -> tuple[int, int]:
    """Of the largest layer, and of all that is in no layer."""
    stack = locate(model).stack
    sizes = {id(tensor): (name, tensor.nbytes) for name, tensor in model.state_dict(keep_vars=True).items()}
    layers: dict[str, int] = {}
    for name, size in sizes.values():
        layer = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else ""
        layers[layer] = layers.get(layer, 0) + size
    return max(size for layer, size in layers.items() if layer), layers[""]


@pytest.mark.parametrize("name", ["llama", "vit", "smollm3"])
def test_one_layer_of_each_model_is_there_at_once(name: str, tmp_path: Path) -> None:
    row = WALKED[name]
    model = build(row, num_hidden_layers=6, **({"no_rope_layers": None} if name == "smollm3" else {}))
    plan = scattered_plan(model, Shape(num_hidden_layers=4, intermediate_size=64))
    small, expected = slim(model, plan), slim(model, plan)
    skeleton, read = skeleton_and_weights(model, tmp_path / "dense")
    narrow, read_narrow = skeleton_and_weights(small, tmp_path / "slim")
    batches = batches_of(row)
    with OnDemand(skeleton, locate(skeleton), read) as dense, OnDemand(narrow, locate(narrow), read_narrow) as slimmed:
        done = refit_on_demand(dense, slimmed, plan, batches, keep=Spill(tmp_path))
        for one, watched, whole in ((dense, read, model), (slimmed, read_narrow, small)):
            layer, outside = bytes_of(whole)
            assert one.most <= layer + outside < sum(tensor.nbytes for tensor in whole.state_dict().values())
            assert (
                one.most <= watched.most <= layer + outside + max(tensor.nbytes for tensor in watched.state.values())
            )
            assert watched.now == 0
            assert watched.reads <= 3 * len(watched.state)
            assert all(tensor.is_meta for tensor in one.model.state_dict().values())
        reconstruct(model, expected, plan, batches)
        assert done.applied
        for key, tensor in slimmed.changed.items():
            torch.testing.assert_close(tensor, expected.state_dict()[key])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "slim"]


def test_what_was_changed_is_there_the_next_time(tmp_path: Path) -> None:
    skeleton, read = skeleton_and_weights(build(LM_ROW), tmp_path)
    with OnDemand(skeleton, locate(skeleton), read) as weights:
        name = "model.layers.1.mlp.down_proj"
        weights.layer(1)
        module = skeleton.get_submodule(name)
        module.weight.data = 2 * module.weight.data
        weights.layer(2)
        assert module.weight.is_meta
        assert list(weights.changed) == [f"{name}.weight"]
        weights.layer(1)
        assert torch.equal(module.weight, 2 * read.state[f"{name}.weight"])
        weights.layer(0)
        assert torch.equal(weights.changed[f"{name}.weight"], 2 * read.state[f"{name}.weight"])


@pytest.mark.parametrize("name", WALKED)
def test_a_stream_behind_the_last_layer_becomes_the_models_prediction(name: str, tmp_path: Path) -> None:
    model, batches = build(WALKED[name]), batches_of(WALKED[name])[:2]
    skeleton, read = skeleton_and_weights(model, tmp_path)
    with OnDemand(skeleton, locate(skeleton), read) as weights, torch.no_grad():
        stream = start_stream(weights, batches, in_memory)
        for layer in range(len(stream.layers)):
            stream.advance(layer)
        with weights.outside():
            for number, batch in enumerate(batches):
                torch.testing.assert_close(stream.prediction(number, batch), output_of(model, batch))


@pytest.mark.parametrize("name", [*WALKED, "qwen2"])
def test_buffers_are_those_of_a_loaded_model(name: str, tmp_path: Path) -> None:
    model = build((WALKED | ROWS)[name])
    skeleton, _ = skeleton_and_weights(model, tmp_path)
    compute_buffers(skeleton)
    unsaved = dict(skeleton.named_buffers()).keys() - skeleton.state_dict().keys()
    for key in unsaved:
        torch.testing.assert_close(skeleton.get_buffer(key), model.get_buffer(key), rtol=0, atol=0)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_what_nobody_computes_is_refused(tmp_path: Path) -> None:
    skeleton, _ = skeleton_and_weights(build(LM_ROW), tmp_path)
    skeleton.register_buffer("table", torch.ones(3, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModelError, match="table of LlamaForCausalLM is in no file"):
        compute_buffers(skeleton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_spilled_tensor_is_a_copy_in_a_file_without_a_name(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(12).to(dtype).reshape(3, 4).T
    spilled = Spill(tmp_path)(tensor)
    assert torch.equal(spilled, tensor)
    assert spilled.dtype == dtype
    assert not list(tmp_path.iterdir())
    spilled += 1
    assert not torch.equal(spilled, tensor)
    assert Spill(tmp_path)(torch.empty(0, 2)).shape == (0, 2)


CLIP_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48}
TOWERS = Row(
    "CLIPModel",
    "CLIPConfig",
    {
        "text_config": CLIP_SIZES | {"vocab_size": 128, "max_position_embeddings": 32},
        "vision_config": CLIP_SIZES | {"image_size": 16, "patch_size": 8},
        "projection_dim": 16,
    },
    Shape(4, 4, 24, 2),
)
CONV = Row(
    "DebertaV2ForSequenceClassification",
    "DebertaV2Config",
    {name: ROWS["vit"].fields[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    | {"num_hidden_layers": 4, "vocab_size": 128, "conv_kernel_size": 3, "num_labels": 3},
    Shape(8, 8, 40, 2),
)


@pytest.mark.parametrize(
    ("row", "facts"),
    [(TOWERS, "several stacks of layers"), (CONV, "layer 1 gets other hidden states than layer 0 gives")],
    ids=["towers", "more than layers"],
)
def test_what_is_no_walk_through_layers_is_refused(row: Row, facts: str, tmp_path: Path) -> None:
    model = build(row)
    skeleton, read = skeleton_and_weights(model, tmp_path)
    examples = {"input_ids": torch.randint(3, 128, (4, 8))}
    with OnDemand(skeleton, locate(skeleton), read) as weights, pytest.raises(UnsupportedModelError, match=facts):
        start_stream(weights, [examples], in_memory)


@pytest.mark.parametrize(
    ("options", "error", "facts"),
    [
        ({"low_memory": True}, HawAdaError, "low_memory needs calibration"),
        ({"low_memory": True, "calibration": 1, "verify": "full"}, HawAdaError, "compares with the plain slim model"),
        ({"low_memory": True, "calibration": [{}]}, BadDataError, "input_ids"),
        ({"low_memory": True, "calibration": []}, HawAdaError, "at least one"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    options: dict[str, Any], error: type[Exception], facts: str, tmp_path: Path
) -> None:
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    plan = scattered_plan(model, LM_ROW.slim)
    if options.get("calibration") == 1:
        options = options | {"calibration": batches_of(LM_ROW)}
    with pytest.raises(error, match=facts):
        slim_checkpoint(tmp_path / "base", None, tmp_path / "slim", plan=plan, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_plan_that_cuts_nothing_leaves_nothing_to_refit(tmp_path: Path) -> None:
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    plan = Plan.keep_all(locate(model).dense)
    written = slim_checkpoint(
        tmp_path / "base", None, tmp_path / "slim", plan=plan, calibration=batches_of(LM_ROW), low_memory=True
    )
    assert written.reconstruction is None
    assert (tmp_path / "slim" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "model.safetensors"
    ).read_bytes()


def test_command_refits_layer_by_layer(tmp_path: Path) -> None:
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "plan.json").write_text(scattered_plan(model, LM_ROW.slim).to_json())
    save_file(examples_of(LM_ROW), tmp_path / "data.safetensors")
    words = ["slim", str(tmp_path / "base"), str(tmp_path / "slim"), "--plan", str(tmp_path / "plan.json")]
    done = CliRunner().invoke(app, [*words, "--low-memory"])
    assert done.exit_code == 2
    assert "needs --calibration" in done.output
    words += ["--calibration", str(tmp_path / "data.safetensors"), "--low-memory", "--max-shard-size", "100KB"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "projections refitted" in done.output
    assert len(list((tmp_path / "slim").glob("*.safetensors"))) > 1
