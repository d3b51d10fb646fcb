"""Plans of models larger than memory: by one walk through the layers, as if the model had been loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LM_ROW, VISION_ROW, Row, build, difference, logits_of
from safetensors.torch import save_file
from test_low_memory import GPT2, MIXTRAL, batches_of, examples_of
from torch.nn.functional import cosine_similarity
from toys import REGIME, once
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from hawada_peft import LatencyBudget, Plan, Shape, slim, slim_checkpoint
from hawada_peft.cli.program import app
from hawada_peft.errors import BadDataError, HawAdaError, IllegalShapeError, InfeasibleBudgetError
from hawada_peft.race.judge import Judge
from hawada_peft.search.space import search_space
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.outputs import output_of
from hawada_peft.walked import ActivityQuality, plan_checkpoint, walk_checkpoint

ROWS = {"llama": LM_ROW, "vit": VISION_ROW, "gpt2": GPT2, "mixtral": MIXTRAL}


def walked(row: Row, folder: Path, **options: Any) -> tuple[PreTrainedModel, ActivityQuality]:
    model = build(row)
    model.save_pretrained(folder / "base")
    return model, walk_checkpoint(folder / "base", batches_of(row, **options), spill=folder)


def plain_activity(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> tuple[Any, ...]:
    """Per layer the influence, the energy of the stream, of heads and of channels: by hooks on the whole model."""
    layout = locate(model)
    layers = model.get_submodule(layout.stack)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _module, args, output: seen.setdefault(name, []).extend(
            [args[0], output if isinstance(output, torch.Tensor) else output[0]]
        )

    for index, layer in enumerate(layers):
        layer.register_forward_hook(watch(f"layer {index}"))
        for name in (layout.attention_out(index), layout.ffn_out(index)):
            model.get_submodule(name).register_forward_hook(watch(name))
    found = []
    for index in range(len(layers)):
        influence, stream, energies = [], 0.0, {}
        for batch in batches:
            seen.clear()
            output_of(model, batch)
            mask = batch.get("attention_mask", torch.ones(seen[f"layer {index}"][0].shape[:2])).bool()
            before, after = (each[mask] for each in seen[f"layer {index}"])
            influence.append(float((1 - cosine_similarity(before, after, dim=-1)).mean()))
            stream += float(after.square().sum())
            for name in (layout.attention_out(index), layout.ffn_out(index)):
                module = model.get_submodule(name)
                if hasattr(module, "weight"):
                    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                    add = seen[name][0][mask].square().sum(0) * weight.square().sum(0)
                    energies[name] = energies.get(name, 0) + add.detach()
        heads = energies[layout.attention_out(index)].reshape(-1, layout.head_dim).sum(1)
        found.append((sum(influence) / len(batches), stream, heads, energies.get(layout.ffn_out(index))))
    return tuple(zip(*found, strict=True))


@pytest.mark.parametrize(("name", "padded"), [*((name, False) for name in ROWS), ("llama", True), ("mixtral", True)])
def test_activity_is_that_of_the_whole_model(name: str, padded: bool, tmp_path: Path) -> None:
    row = ROWS[name]
    model, quality = walked(row, tmp_path, padded=padded)
    influence, stream, heads, channels = plain_activity(model, batches_of(row, padded=padded))
    found = quality.activity
    assert found.influence == pytest.approx(influence, rel=1e-4)
    assert found.stream == pytest.approx(stream, rel=1e-4)
    for mine, plain in zip((*found.heads, *found.channels), (*heads, *channels), strict=True):
        if plain is None:  # experts
            assert not len(mine)
        else:
            torch.testing.assert_close(mine.float(), plain, rtol=1e-3, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_race_judges_by_the_same_activity(tmp_path: Path) -> None:
    model, quality = walked(LM_ROW, tmp_path)
    judge = Judge(model, batches_of(LM_ROW))
    assert judge.influence == pytest.approx(quality.activity.influence)
    shape = Shape(4, 2, 40, 3)
    weakest = min(range(4), key=lambda layer: judge.influence[layer])
    assert judge.at(shape, [weakest]) == quality.plan(shape)


@pytest.mark.parametrize("name", ROWS)
def test_what_stays_at_a_shape_is_what_does_most(name: str, tmp_path: Path) -> None:
    model, quality = walked(ROWS[name], tmp_path)
    shape = Shape(num_hidden_layers=3, **({"intermediate_size": 40} if name != "mixtral" else {}))
    plan = quality.plan(shape)
    assert plan.shape == shape.complete(quality.layout.dense)
    activity = quality.activity
    gone = set(range(4)) - set(plan.layers)
    assert max(activity.influence[layer] for layer in gone) <= min(activity.influence[layer] for layer in plan.layers)
    if name != "mixtral":
        assert "ffn" in quality.free
        for layer, kept in zip(plan.layers, plan.channels, strict=True):
            rest = [channel for channel in range(96) if channel not in kept]
            assert activity.channels[layer][list(kept)].min() >= activity.channels[layer][rest].max()
    else:
        assert quality.free == ("heads", "layers")
    assert slim(model, plan).num_parameters() < model.num_parameters()


def test_predictions_are_the_sums_of_what_is_cut(tmp_path: Path) -> None:
    _, quality = walked(LM_ROW, tmp_path)
    space = search_space(quality.layout, REGIME, free=quality.free)
    predicted = quality.predict(space)
    assert predicted.shape == (len(space.layers), len(space.heads), len(space.ffn))
    shapes = [space.shape(index) for index in range(predicted.size)]
    activity = quality.activity
    for index in (0, predicted.size // 3, predicted.size // 2, predicted.size - 1):
        plan, cost = quality.plan(shapes[index]), 0.0
        for layer in range(4):
            if layer not in plan.layers:
                cost += activity.influence[layer]
                continue
            at = plan.layers.index(layer)
            heads = set(range(8)) - set(plan.heads[at])
            channels = set(range(96)) - set(plan.channels[at])
            energy = activity.heads[layer][list(heads)].sum() + activity.channels[layer][list(channels)].sum()
            cost += float(energy) / (2 * activity.stream[layer])
        assert predicted.flat[index] == pytest.approx(cost, rel=1e-6, abs=1e-12)
    assert predicted.flat[shapes.index(quality.layout.dense)] == 0
    assert (np.diff(predicted, axis=2) <= 0).all()  # wider is no worse
    assert quality.evaluate(quality.layout.dense) is None


def test_a_small_change_of_the_stream_costs_what_its_cosine_says(tmp_path: Path) -> None:
    """The two measures, of layers and of units, are one where little is changed."""
    change = 0.01 * torch.randn(1000, 64)
    stream = torch.randn(1000, 64)
    cosine = float((1 - cosine_similarity(stream, stream + change, dim=-1)).mean())
    assert cosine == pytest.approx(float(change.square().sum() / stream.square().sum() / 2), rel=0.1)


def test_a_budget_is_searched_without_the_model(tmp_path: Path) -> None:
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    budget, batches = LatencyBudget(speedup=1.5, batch_size=1, seq_len=8), batches_of(LM_ROW)
    found = plan_checkpoint(tmp_path / "base", budget, batches, judge=False, spill=tmp_path, effort=once())
    assert found.speedup >= 1.5
    assert found.best.measured_loss is None
    assert found.best.predicted_loss > 0
    assert found.plan.shape == found.best.shape
    assert "cosine" in found.loss
    written = slim_checkpoint(
        tmp_path / "base", None, tmp_path / "slim", plan=found.plan, calibration=batches, low_memory=True
    )
    assert written.parameters == found.best.parameters
    with pytest.raises(InfeasibleBudgetError):
        plan_checkpoint(tmp_path / "base", LatencyBudget(speedup=1e6, seq_len=8), batches, judge=False, effort=once())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, quality = walked(LM_ROW, tmp_path)
    with pytest.raises(IllegalShapeError, match="num_key_value_heads"):
        quality.plan(Shape(num_key_value_heads=3))
    with pytest.raises(HawAdaError, match="at least one"):
        walk_checkpoint(tmp_path / "base", [])
    with pytest.raises(BadDataError, match="input_ids"):
        walk_checkpoint(tmp_path / "base", [{}])


@pytest.mark.usefixtures("toy_machine")
@pytest.mark.parametrize("how", [("--no-judge",), ("--no-rotate",), ("--rotate",)], ids=" ".join)
def test_commands_plan_and_slim_without_loading(
    how: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    save_file(examples_of(LM_ROW), tmp_path / "data.safetensors")
    monkeypatch.chdir(tmp_path)
    words = ["plan", "base", "data.safetensors", "--low-memory", "--speedup", "1.4", "--seq-len", "8", "--json"]
    for refused in ("--hidden", "--no-refit"):
        done = CliRunner().invoke(app, [*words, refused])
        assert done.exit_code == 2
        assert "does not go with --low-memory" in done.output
    done = CliRunner().invoke(app, [*words, "--no-judge", "--rotate"])
    assert done.exit_code == 2
    assert "leave out --no-judge" in done.output
    done = CliRunner().invoke(app, [*words, "--effort", "quick", *how])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["speedup"] >= 1.4
    assert (said["measured_loss"] is None) == ("--no-judge" in how)
    assert (said["basis"] is not None) == (said["shape"].get("hidden_size", 64) < 64)
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert said["shape"] == plan.shape.to_dict()
    done = CliRunner().invoke(
        app, ["slim", "base", "slim", "--plan", "plan.json", "--calibration", "data.safetensors", "--low-memory"]
    )
    assert done.exit_code == 0, done.output
    assert difference(logits_of(type(model).from_pretrained("slim")), logits_of(model)) < 1
