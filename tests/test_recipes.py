"""Recipes: checked before any work, done in one go, resumed, and the same through the command line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import LM_ROW, TOKENS, VISION_ROW, Row, assert_same_state, build, logits_of
from pairs import in_two
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from test_basis import basis_plan, random_basis
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTImageProcessorPil
from typer.testing import CliRunner

from hawada_peft import Shape, train_recipe
from hawada_peft.basis.bases import Bases
from hawada_peft.basis.stored import save_basis
from hawada_peft.cli.program import app
from hawada_peft.errors import HawAdaError
from hawada_peft.latency.regime import Regime
from hawada_peft.recipes import Recipe, RecipeResult
from hawada_peft.recipes.digests import recipe_digests
from hawada_peft.recipes.examples import batches_from, load_data
from hawada_peft.recipes.record import RESULT, Record
from hawada_peft.recipes.settings import DataSource
from hawada_peft.refit.projections import Refit
from hawada_peft.refit.reconstruction import Reconstruction
from hawada_peft.training.history import HISTORY_FILE

FILES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
SHORT = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}
SEARCH = {
    "clock": "toy",
    "quick": True,
    "effort": {"cache": False, "candidates": 1, "search_rounds": 1, "margin": 0.0, "min_rounds": 1, "max_rounds": 1},
}
run = CliRunner().invoke
BART = Row("BartForConditionalGeneration", "BartConfig", TOKENS | {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
}, Shape(8, 8, 48, 1))  # fmt: skip


def language(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for a tiny Llama on tokens with a pattern."""
    build(LM_ROW).save_pretrained(folder / "teacher")
    tokens = (np.arange(16 * 60) ** 2 // 7) % LM_ROW.fields["vocab_size"]
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    return {
        "model": str(folder / "teacher"),
        "output": str(folder / "out"),
        "data": {"files": str(folder / "tokens.npy"), "seq_len": 16, "held_out": 8},
        "shape": LM_ROW.slim.to_dict(),
        "training": SHORT | {"learning_rate": 0.05, "calibration_examples": 8},
        "reconstruction": {"examples": 16, "batch_size": 8},
        "recovery": SHORT | {"learning_rate": 1e-3},
    } | changes


def written(recipe: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def done(recipe: dict[str, Any], **options: Any) -> Any:
    return train_recipe(Recipe.from_dict(recipe), **options)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    result = run(app, ["train", str(path), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    steps = json.loads(result.output)["steps"]
    assert steps[0].startswith("load ")
    assert steps[-1].startswith("save the slim model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run. Shared by tests, which leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = language(folder)
    for section in ("training", "recovery"):
        recipe[section] |= {"save_strategy": "steps", "save_steps": 2}
    done(recipe)
    return folder / "out"


def test_a_language_model_from_recipe_to_verified_folder(whole: Path) -> None:
    out, result = whole, RecipeResult.from_dict(json.loads((whole / RESULT).read_text()))
    slim = AutoModelForCausalLM.from_pretrained(out / "slim")
    for name, size in LM_ROW.slim.to_dict().items():
        assert getattr(slim.config, name) == result.slim[name] == size
    assert slim.num_parameters() == result.slim_parameters < result.dense_parameters
    assert (out / "adapter" / "adapter_config.json").exists()
    assert len(json.loads((out / HISTORY_FILE).read_text())["entries"]) > 1
    assert {"README.md", "hawada_report.json"} <= {path.name for path in (out / "slim").iterdir()}
    assert result.losses.keys() == {"gates", "recovery_start", "recovery_end"}
    report = json.loads((out / "slim" / "hawada_report.json").read_text())
    assert report["losses"] == result.losses
    for found in (result.reconstruction, report["reconstruction"]):  # the same by every route
        assert found.keys() == {field.name for field in fields(Reconstruction)}
        assert found["applied"]
        assert {name for refit in found["refits"] for name in refit} == {field.name for field in fields(Refit)}
    assert result.losses["recovery_start"] < result.losses["gates"]  # refitted in between
    assert result.losses["recovery_end"] < result.losses["recovery_start"]
    assert {each["name"] for each in result.quality} == {"predictions that are the dense model's, in %", "perplexity"}
    assert all(str(size) in str(result) for size in LM_ROW.slim.to_dict().values())


@pytest.mark.usefixtures("toy_machine")
def test_digits_under_a_budget_with_lora_in_both_trainings(tmp_path: Path) -> None:
    build(VISION_ROW, image_size=8, patch_size=4, num_channels=1, num_labels=10).save_pretrained(tmp_path / "teacher")
    scans, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(scans[:64], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    save_file({"pixel_values": pixels, "labels": torch.tensor(labels[:64])}, tmp_path / "digits.safetensors")
    lora = {"r": 2, "target_modules": "all-linear"}
    recipe = {
        "model": str(tmp_path / "teacher"),
        "output": str(tmp_path / "out"),
        "data": {"files": str(tmp_path / "digits.safetensors"), "held_out": 16},
        "budget": {"max_parameters": 100_000, "batch_size": 4},
        "search": SEARCH,
        "gates": {"gates": ["heads", "ffn", "layers"], "lora": lora},
        "training": SHORT | {"learning_rate": 1e-3, "gate_learning_rate": 0.05, "calibration_examples": 8},
        "recovery": SHORT | {"learning_rate": 1e-3, "lora": lora},
        "save_dtype": "bfloat16",
    }
    result = done(recipe)
    slim = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "slim")
    assert slim.dtype == torch.bfloat16
    assert slim.num_parameters() == result.slim_parameters <= 100_000 < result.dense_parameters
    assert result.latency["dense_ms"] > 0
    assert result.latency["slim_ms"] > 0
    assert {each["name"] for each in result.quality} >= {"accuracy in %"}
    report = json.loads((tmp_path / "out" / "slim" / "hawada_report.json").read_text())
    assert report["latency"]["slim_ms"] == result.latency["slim_ms"]
    (chosen,) = [point for point in report["search"]["points"] if point["rejected"] is None]
    assert chosen["shape"].items() <= result.slim.items()


def test_without_reconstruction_and_recovery_the_slim_model_is_what_was_evaluated(tmp_path: Path) -> None:
    recipe = language(tmp_path)
    del recipe["reconstruction"], recipe["recovery"]
    result = done(recipe)
    assert result.losses.keys() == {"gates"}
    assert result.reconstruction is None
    assert result.latency is None
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert_same_state(teacher.state_dict(), build(LM_ROW).state_dict())


@pytest.mark.parametrize("stage", ["gates", "recovery"])
def test_an_interrupted_run_is_resumed_to_the_same_bits(tmp_path: Path, whole: Path, stage: str) -> None:
    recipe = json.loads((whole / "recipe.json").read_text())["recipe"] | {"output": str(tmp_path / "out")}
    out = shutil.copytree(whole, tmp_path / "out")
    # What a run leaves that is killed right after the second step of the stage.
    (out / RESULT).unlink()
    for path in (out / stage / "checkpoint-4").glob("*.json"):  # killed while it was written
        path.unlink()
    if stage == "gates":
        shutil.rmtree(out / "recovery")
        shutil.rmtree(out / "adapter")
        record = json.loads((out / "recipe.json").read_text())
        del record["gates"]
        (out / "recipe.json").write_text(json.dumps(record))
    done(recipe, resume=True)
    states = [AutoModelForCausalLM.from_pretrained(folder / "slim").state_dict() for folder in (out, whole)]
    assert_same_state(*states)
    found, expected = (json.loads((folder / RESULT).read_text()) for folder in (out, whole))
    assert found | {"folder": expected["folder"]} == expected


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    recipe = language(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        done(recipe)
    (tmp_path / "out" / "mine.txt").unlink()
    (tmp_path / "out" / "recipe.json").write_text(json.dumps({"recipe": Recipe.from_dict(recipe).to_dict()}))
    with pytest.raises(FileExistsError, match="--resume"):
        done(recipe)
    with pytest.raises(HawAdaError, match=r"differs in \['seed'\]"):
        done(recipe | {"seed": 3}, resume=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("changed", ["teacher/model.safetensors", "tokens.npy"])
def test_a_run_is_resumed_on_the_same_model_and_data_only(tmp_path: Path, whole: Path, changed: str) -> None:
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    recipe = json.loads((whole / "recipe.json").read_text())["recipe"]
    recipe |= {"output": str(tmp_path / "out"), "model": str(tmp_path / "teacher")}
    recipe["data"]["files"] = str(tmp_path / "tokens.npy")
    record = tmp_path / "out" / "recipe.json"
    (tmp_path / "out" / RESULT).unlink()
    content = {"recipe": Recipe.from_dict(recipe).to_dict(), "digests": recipe_digests(Recipe.from_dict(recipe))}
    record.write_text(json.dumps(content))
    with (tmp_path / changed).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HawAdaError, match="begun with other content"):
        done(recipe, resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(language(tmp_path))
    first, second = (Record(recipe, resume=True, main=True) for _ in range(2))
    first.begin()
    with pytest.raises(FileExistsError, match="another process works in"):
        second.begin()
    first.end()
    second.begin()
    second.end()
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "tokens.npy", "out"}


@pytest.mark.parametrize("text", ["{", "[1]", "1", '{"recipe": 3}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    recipe = language(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(text)
    with pytest.raises(HawAdaError):
        done(recipe, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": SHORT | {"fp16": True}}, "training.fp16 needs a GPU"),
        ({"training": SHORT | {"report_to": "clearml"}}, "training.report_to"),
        ({"shape": None, "budget": {"speedup": 1.2, "seq_len": 8, "image_size": 16}}, "budget.image_size is not for"),
        ({"shape": None, "budget": {"speedup": 1.2}}, "needs seq_len"),
        ({"model": "nosuch"}, "there is no folder nosuch"),
    ],
)
def test_what_cannot_be_done_here_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((HawAdaError, FileNotFoundError), match=message):
        done(language(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    recipe = language(tmp_path, modle="x", dtype="int4", gates={"gates": ["heads"], "group_size": "8"})
    recipe["training"] = {"relaxatio": "closing", "max_steps": "5", "output_dir": "x"}
    recipe["recovery"] = {"lora": {"rank": 8}}
    recipe["search"] = {"effort": {"candidates": 1.5}}
    recipe["race"] = {"preparations": [1]}
    recipe["keep_ratio"] = {"heads": "half"}
    with pytest.raises(HawAdaError) as error:
        done(recipe)
    for part in (
        "unknown name 'modle'; near are ['model'",
        "unknown name 'relaxatio'; near are ['relaxation']",
        "unknown name 'output_dir'",
        "training.max_steps must be a valid integer, got '5'",
        "gates.group_size must be a valid integer, got '8'",
        "recovery.lora: unknown name 'rank'",
        "search.effort.candidates must be a valid integer, got 1.5",
        "race.preparations.0 must be a valid string, got 1",
        "keep_ratio.heads must be a valid number, got 'half'",
        "give one of ['budget', 'shape', 'keep_ratio', 'plan'], or a plan and its budget, got ['shape', 'keep_ratio']",
        "dtype must be 'auto', 'float32'",
    ):
        assert part in str(error.value), part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("training", {"relaxation": "open"}, "relaxation must be one of"),
        ("training", {"kl_weight": 0.0}, "weights must be"),
        ("gates", {"gates": ["legs"]}, "gates must be among"),
        ("data", {"files": "x", "dataset": "y"}, "give one of `files` and `dataset`"),
        ("shape", {"intermediate_size": 0}, "intermediate_size must be a whole number"),
        ("shape", None, "give one of"),
        ("reconstruction", {"examples": 1}, "examples must be at least 2"),
        ("recovery", [1], "recovery must be a mapping"),
        ("data", None, "missing ['data']"),
    ],
)
def test_values_are_judged_by_the_classes_that_they_go_to(
    tmp_path: Path, section: str, value: Any, message: str
) -> None:
    with pytest.raises(HawAdaError) as error:
        done(language(tmp_path, **{section: value}))
    assert message in str(error.value)


def test_sizes_of_several_towers_are_named_by_their_paths(tmp_path: Path) -> None:
    sizes = {"text_config.intermediate_size": 40, "decoder.layers": 3}
    given = {"model": "m", "output": str(tmp_path), "data": {"files": "x.npy"}}
    assert Recipe.from_dict(given | {"shape": sizes}).goal() == {"shape": sizes}
    ratios = {"vision_config.ffn": 0.5, "heads": 0.5}
    assert Recipe.from_dict(given | {"keep_ratio": ratios}).goal() == {"keep_ratio": ratios}
    with pytest.raises(HawAdaError, match=r"shape.decoder.layers must be a whole number of at least 1, got 0"):
        Recipe.from_dict(given | {"shape": {"decoder.layers": 0}})
    with pytest.raises(HawAdaError, match="unknown axis 'width'"):
        Recipe.from_dict(given | {"keep_ratio": {"vision_config.width": 0.5}})


def test_plans_of_several_towers_race_for_their_budget(tmp_path: Path) -> None:
    build(BART).save_pretrained(tmp_path / "teacher")
    np.save(tmp_path / "tokens.npy", (np.arange(12 * 40) % 100 + 5).astype(np.uint16))
    recipe = {
        "model": str(tmp_path / "teacher"), "output": str(tmp_path / "out"),
        "data": {"files": str(tmp_path / "tokens.npy"), "seq_len": 12, "held_out": 8},
        "budget": {"speedup": 1.5, "seq_len": 12}, "search": SEARCH, "training": SHORT,
        "recovery": SHORT | {"max_steps": 8}, "race": {"plans": 3, "steps": 1, "share": 0.9, "neighbours": False},
    }  # fmt: skip
    done(recipe)
    race = json.loads((tmp_path / "out" / "slim" / "hawada_report.json").read_text())["race"]
    assert race["winner"]
    assert any("encoder: " in each["name"] and "decoder: " in each["name"] for each in race["entrants"])


@pytest.mark.filterwarnings("ignore::hawada_peft.errors.UntiedEmbeddingsWarning")
def test_a_plan_of_directions_has_its_basis_beside_it(tmp_path: Path) -> None:
    recipe, model = language(tmp_path), build(LM_ROW)
    for section in ("shape", "training", "recovery"):
        del recipe[section]
    (tmp_path / "plan.json").write_text(basis_plan(model, Shape(), 48).to_json())
    recipe |= {"plan": str(tmp_path / "plan.json")}
    with pytest.raises(HawAdaError, match="residual stream"):
        done(recipe)
    save_basis(Bases(random_basis(model)), tmp_path / "plan.basis.safetensors")
    done(recipe | {"output": str(tmp_path / "other")})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "other" / "slim").config.hidden_size == 48


def test_overrides_replace_add_and_leave_out(tmp_path: Path) -> None:
    path = written(language(tmp_path), tmp_path)
    recipe = Recipe.read(path, ["recovery=null", "training.learning_rate=1e-4", "gates.group_size=8", "seed=7"])
    assert recipe.recovery is None
    assert recipe.training is not None
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.gates == {"group_size": 8}
    assert recipe.seed == 7
    for wrong in ("seed", "model.name=x", "=3", "seed=[1"):
        with pytest.raises(HawAdaError):
            Recipe.read(path, [wrong])


def test_the_command_prints_json_and_nothing_else(tmp_path: Path) -> None:
    recipe = language(tmp_path)
    del recipe["recovery"]
    path = str(written(recipe, tmp_path))
    result = json.loads(run(app, ["train", path, "--json"]).stdout)
    assert result == json.loads((tmp_path / "out" / RESULT).read_text())
    again = run(app, ["train", path, "--resume", "--json"])
    assert json.loads(again.stdout) == result
    refused = run(app, ["train", path])
    assert refused.exit_code == 1
    assert "--resume" in refused.output


def test_missing_files_are_noticed_before_any_work(tmp_path: Path) -> None:
    recipe = language(tmp_path)
    (tmp_path / "tokens.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens\.npy"):
        done(recipe)
    assert not (tmp_path / "out").exists()


def process(recipe: Path, folder: Path) -> None:
    """What each of two processes does."""
    trained = run(app, ["train", str(recipe), "--json"], catch_exceptions=False)
    assert trained.exit_code == 0
    (folder / f"printed-{os.environ['RANK']}").write_text(trained.stdout)


def test_two_processes_write_one_result(tmp_path: Path) -> None:
    recipe = language(tmp_path)
    parallel = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    recipe["training"] |= parallel
    recipe["recovery"] |= parallel
    in_two(process, written(recipe, tmp_path), tmp_path)
    printed = [(tmp_path / f"printed-{rank}").read_text() for rank in range(2)]
    result = json.loads(printed[0])
    assert not printed[1]
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "slim")
    assert slim.num_parameters() == result["slim_parameters"]
    assert result["losses"]["recovery_end"] < result["losses"]["gates"]
    assert logits_of(slim).isfinite().all()


def test_folders_of_images_are_read_through_the_models_processor(tmp_path: Path) -> None:
    build(VISION_ROW).save_pretrained(tmp_path / "teacher")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "teacher")
    for index in range(5):
        (tmp_path / "images" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + index, 30), (50 * index, 0, 0)).save(tmp_path / f"images/{index % 2}/{index}.png")
    source = DataSource(files=str(tmp_path / "images"), held_out=2)
    train, held_out = load_data(source, str(tmp_path / "teacher"), seed=0)
    (batch,) = batches_from(train, 8, 8)
    (other,) = batches_from(held_out, 8, 8)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    seen = {round(float(image[0].mean()), 4) for image in [*batch["pixel_values"], *other["pixel_values"]]}
    assert len(seen) == 5  # every image once, none in both parts


def test_a_folder_of_a_dataset_is_cut_into_windows(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<e>", "<u>", *"abcdef"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    build(LM_ROW).save_pretrained(tmp_path / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", unk_token="<u>").save_pretrained(
        tmp_path / "teacher"
    )
    (tmp_path / "data").mkdir()
    rows = [{"words": "a b c"}, {"words": "d e"}, {"words": "f"}]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = DataSource(dataset=str(tmp_path / "data"), column="words", seq_len=2, held_out=1)
    train, held_out = load_data(source, str(tmp_path / "teacher"), seed=0)
    found = sorted(tuple(each["input_ids"].tolist()) for part in (train, held_out) for each in part)
    assert found == sorted([(2, 3), (4, 0), (5, 6), (0, 7)])
    with pytest.raises(HawAdaError, match="no column 'text'"):
        load_data(DataSource(dataset=str(tmp_path / "data"), held_out=1), str(tmp_path / "teacher"), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": None, "keep_ratio": {}}, "keep_ratio names no axis"),
        ({"shape": None, "keep_ratio": 0}, "keep_ratio of heads must be"),
        ({"shape": None, "keep_ratio": float("nan")}, "keep_ratio of heads must be"),
        ({"shape": None, "keep_ratio": {"depth": 0.5}}, "unknown axis"),
        ({"training": SHORT | {"num_train_epochs": float("nan")}}, "num_train_epochs"),
        ({"training": SHORT | {"save_steps": -1}}, "save_steps"),
        ({"training": SHORT | {"logging_steps": -3}}, "logging_steps"),
        ({"training": SHORT | {"gradient_accumulation_steps": -1}}, "gradient_accumulation_steps"),
        ({"training": SHORT | {"seed": -1}}, "seed"),
        ({"recovery": SHORT | {"max_steps": -3}}, "max_steps"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_in_a_dry_run(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {name: value for name, value in language(tmp_path, **changes).items() if value is not None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    result = run(app, ["train", str(tmp_path / "recipe.yaml"), "--dry-run"])
    assert result.exit_code == 1
    assert message in result.output


def test_a_program_that_times_is_checked_with_the_recipe(tmp_path: Path) -> None:
    given = language(tmp_path) | {"budget": {"speedup": 1.2, "prompt": 8, "output": 4}, "training": SHORT}
    del given["shape"]
    clock = Recipe.from_dict(given | {"search": {"clock_command": "time {folder}"}}).effort().clock
    assert clock.device_name(Regime()) == "time {folder}"
    for search, message in (
        ({"clock_command": "time it"}, "has no {folder}"),
        ({"clock_command": "time {folder}", "clock": "toy"}, "either clock or clock_command"),
    ):
        with pytest.raises(HawAdaError, match=message):
            Recipe.from_dict(given | {"search": search})
