"""What the commands do: what they write, what scripts get of it, what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LM_ROW, VISION_ROW, build, gate, scattered_plan
from safetensors.torch import save_file
from typer.testing import CliRunner

from hawada_peft import Plan, verify_slim
from hawada_peft.cli import errors
from hawada_peft.cli.program import app
from hawada_peft.latency.table import LatencyTable

pytestmark = pytest.mark.usefixtures("toy_machine")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in `base`, its gates under a plan in `adapter`, `data.safetensors`; a ViT in `vit`. Left as it is."""
    folder = tmp_path_factory.mktemp("made")
    build(LM_ROW).save_pretrained(folder / "base")
    build(VISION_ROW).save_pretrained(folder / "vit")
    gated = gate(build(LM_ROW))
    gated.apply_plan(scattered_plan(gated, LM_ROW.slim))
    gated.save_pretrained(folder / "adapter")
    tokens = torch.randint(3, 128, (24, 16), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": tokens}, folder / "data.safetensors")
    return folder


def words(*given: Any, **options: Any) -> list[str]:
    """A command line."""
    line = [str(each) for each in given]
    for name, value in options.items():
        word = "--" + name.replace("_", "-")
        line += [word] if value is True else ["--no-" + word[2:]] if value is False else [word, str(value)]
    return line


def said(*given: Any, **options: Any) -> dict[str, Any]:
    """What a script gets of a command that succeeds."""
    done = CliRunner().invoke(app, [*words(*given, **options), "--json"])
    assert done.exit_code == errors.DONE, done.output
    return json.loads(done.stdout)


def refused(*given: Any, code: int = errors.FAILED, **options: Any) -> str:
    """What a person is told by a command that fails: one message, no traceback."""
    done = CliRunner().invoke(app, words(*given, **options))
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


# ------------------------------------------------------------------------------------------------------ measure, plan


def test_measure_gives_the_table(made: Path) -> None:
    found = said("measure", made / "base", batch_size=2, seq_len=8)
    table = LatencyTable.from_dict(found)
    assert (table.regime.batch_size, table.regime.device) == (2, "cpu")
    text = CliRunner().invoke(app, words("measure", made / "base", batch_size=2, seq_len=8)).stdout
    assert "2 of 4 layers" in text


def test_a_plan_is_timed_by_the_program_that_is_asked_to(made: Path, tmp_path: Path) -> None:
    options = {"clock_command": f"{sys.executable} -c 'raise SystemExit(7)' {{folder}}", "effort": "quick"}
    budget = {"speedup": 1.2, "seq_len": 8, "output": tmp_path / "plan.json"}
    told = refused("plan", made / "base", made / "data.safetensors", **budget, **options)
    assert "ended with code 7" in told


def test_measure_takes_whole_answers_and_a_program_that_times(made: Path) -> None:
    command = f"{sys.executable} -c 'print(0.25)' {{folder}} {{prompt}} {{output}}"
    asked = {"prompt_tokens": 8, "output_tokens": 4, "effort": "quick"}
    here = LatencyTable.from_dict(said("measure", made / "base", **asked))
    there = LatencyTable.from_dict(said("measure", made / "base", clock_command=command, **asked))
    assert str(here.regime) == str(there.regime) == "generate 1x(8+4), float32, eager, cpu"
    assert (there.device_name, round(there.dense_ms)) == (command, 250)


def test_narrow_makes_a_base_for_the_other_commands(made: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "images.safetensors", tmp_path / "narrow"
    save_file({"pixel_values": torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(3))}, data)
    found = said("narrow", made / "vit", data, folder, head_dim=4, examples=24)
    assert (found["head_dim"], found["dense_head_dim"]) == (4, 8)
    assert found["parameters"] < found["dense"]
    assert said("verify", folder, base=made / "vit")["ok"]
    card = (folder / "README.md").read_text()
    assert "| features per head | 8 | 4 | 50% |" in card
    assert f"| parameters | {found['dense']:,} | {found['parameters']:,} |" in card
    assert said("evaluate", folder, base=made / "vit", data=data, examples=8, latency=False)
    assert said("inspect", folder)
    told = refused("narrow", made / "base", made / "data.safetensors", tmp_path / "other", head_dim=4)
    assert "a shift of all keys" in told
    assert not (tmp_path / "other").exists()
    assert "from 1 to 8" in refused("narrow", made / "vit", data, tmp_path / "other", head_dim=9)


@pytest.mark.parametrize("refit", [None, False])
@pytest.mark.parametrize("gates", ["fresh", "trained"])
def test_a_plan_is_what_slim_takes(made: Path, tmp_path: Path, gates: str, refit: bool | None) -> None:
    options: dict[str, Any] = {"speedup": 1.3, "seq_len": 8, "examples": 8, "rotate": False}
    options |= {"adapter": made / "adapter"} if gates == "trained" else {}
    options |= {} if refit is None else {"refit": refit}
    path = tmp_path / "new" / "plan.json"
    found = said("plan", made / "base", made / "data.safetensors", output=path, **options)
    assert found["speedup"] >= 1.3
    plan = Plan.from_json(path.read_text())
    assert plan.shape.to_dict() == found["shape"]
    assert found["shape"] in [point["shape"] for point in json.loads(Path(found["search"]).read_text())["points"]]
    places = [made / "adapter", tmp_path / "slim"] if gates == "trained" else [tmp_path / "slim"]
    written = said("slim", made / "base", *places, plan=path, refit=False)
    assert written["shape"] == found["shape"]
    assert written["parameters"] == found["parameters"]
    assert said("verify", tmp_path / "slim", base=made / "base")["ok"]


@pytest.mark.filterwarnings("ignore::hawada_peft.errors.UntiedEmbeddingsWarning")
@pytest.mark.parametrize("trained", [False, True], ids=["plan alone, streamed", "with gates, refitted"])
def test_a_plan_of_directions_has_its_basis_beside_it(made: Path, tmp_path: Path, trained: bool) -> None:
    gate(build(LM_ROW), gates=("ffn",)).save_pretrained(tmp_path / "ffn")
    least = {"max_parameters": 55_000, "effort": "quick", "seq_len": 16, "refit": False}
    line = ("plan", made / "base", made / "data.safetensors")
    without = {"rotate": False, "output": tmp_path / "plan.json", "code": errors.INFEASIBLE}
    assert "no legal shape" in refused(*line, adapter=tmp_path / "ffn", **without, **least)
    found = said(*line, adapter=tmp_path / "ffn", output=tmp_path / "plan.json", **least)
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.rotated
    assert found["basis"] == str(tmp_path / "plan.basis.safetensors")
    gates = [tmp_path / "ffn"] if trained else []
    more = {"calibration": made / "data.safetensors"} if trained else {"verify": "full"}
    said("slim", made / "base", *gates, tmp_path / "slim", plan=tmp_path / "plan.json", **more)
    verify_slim(tmp_path / "slim").require()
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["hidden_size"] == plan.shape.hidden_size
    (tmp_path / "plan.basis.safetensors").unlink()
    assert "basis" in refused("slim", made / "base", *gates, tmp_path / "other", plan=tmp_path / "plan.json")


def test_a_budget_that_cannot_be_met_writes_nothing(made: Path, tmp_path: Path) -> None:
    options = {"latency_ms": 1e-3, "seq_len": 8, "examples": 8, "output": tmp_path / "plan.json"}
    refused("plan", made / "base", made / "data.safetensors", code=errors.INFEASIBLE, **options)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- slim


def test_slim_tells_what_it_wrote(made: Path, tmp_path: Path) -> None:
    found = said("slim", made / "base", made / "adapter", tmp_path / "slim", verify="full", max_shard_size="50KB")
    assert found["shape"] == LM_ROW.slim.to_dict()
    assert found["verification"]
    assert len(list((tmp_path / "slim").glob("*.safetensors"))) > 1
    assert verify_slim(tmp_path / "slim", base=made / "base", adapter=made / "adapter").ok


@pytest.mark.parametrize("gates", ["trained", "none"])
def test_slim_refits(made: Path, tmp_path: Path, gates: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(scattered_plan(build(LM_ROW), LM_ROW.slim).to_json())
    places = [made / "adapter", tmp_path / "slim"] if gates == "trained" else [tmp_path / "slim"]
    found = said("slim", made / "base", *places, plan=plan, calibration=made / "data.safetensors")
    assert found["shape"] == LM_ROW.slim.to_dict()
    assert found["reconstruction"]["after"] < found["reconstruction"]["before"]


def test_the_way_without_training(made: Path, tmp_path: Path) -> None:
    """Each command finds what the one before left: the plan's data, its search, its regime."""
    plan, slim, data = tmp_path / "plan.json", tmp_path / "slim", made / "data.safetensors"
    said("plan", made / "base", data, speedup=1.2, batch_size=2, seq_len=8, examples=8, output=plan, effort="quick")
    made_slim = said("slim", made / "base", slim, plan=plan)
    assert made_slim["reconstruction"]["after"] < made_slim["reconstruction"]["before"]
    before = json.loads((slim / "hawada_report.json").read_text())
    assert before["search"]["regime"]["seq_len"] == 8
    assert before["calibration"]["examples"] == 8
    assert str(made) not in json.dumps(before)
    found = said("evaluate", slim, base=made / "base", data=data, effort="quick")
    assert found["speedup"] > 1
    assert found["regime"] == before["search"]["regime"]
    after = json.loads((slim / "hawada_report.json").read_text())
    assert after["latency"]["slim_ms"] == found["latency_ms"]["slim"]
    assert {each["data"] for each in after["quality"]} == {"16 held-out examples of 16 tokens"}  # 8 were calibrated on
    again = said("evaluate", slim, base=made / "base", data=data, latency=False, examples=4)
    assert again["speedup"] is None
    assert len(json.loads((slim / "hawada_report.json").read_text())["quality"]) == 2 * len(after["quality"])
    card = (slim / "README.md").read_text()
    assert "## Latency" in card
    assert "perplexity" in card
    assert verify_slim(slim, base=made / "base").ok


def test_slim_by_a_plan_can_leave_the_weights_as_they_are(made: Path, tmp_path: Path) -> None:
    plan, data = tmp_path / "plan.json", made / "data.safetensors"
    said("plan", made / "base", data, speedup=1.2, batch_size=2, seq_len=8, examples=4, output=plan, effort="quick")
    assert said("slim", made / "base", tmp_path / "slim", plan=plan, refit=False)["reconstruction"] is None
    wrong = refused(
        "slim", made / "base", tmp_path / "x", plan=plan, refit=True, verify="full", code=errors.WRONG_USAGE
    )
    assert "--verify does not go with --refit" in wrong
    plan.with_suffix(".search.json").write_text("[]")
    assert "holds no search" in refused("slim", made / "base", tmp_path / "x", plan=plan)


def test_what_was_calibrated_on_is_not_evaluated(made: Path, tmp_path: Path) -> None:
    plan, slim = tmp_path / "plan.json", tmp_path / "slim"
    plan.write_text(scattered_plan(build(LM_ROW), LM_ROW.slim).to_json())
    said("slim", made / "base", slim, plan=plan, calibration=made / "data.safetensors")
    told = refused("evaluate", slim, base=made / "base", data=made / "data.safetensors", latency=False)
    assert "was calibrated on all 24 examples" in told


def test_push_shows_what_will_be_public(made: Path) -> None:
    found = said("push", made / "base", "name/model", dry_run=True)
    assert set(found["files"]) == {path.name for path in (made / "base").iterdir()}
    shown = CliRunner().invoke(app, words("push", made / "base", "name/model"), input="n\n")
    assert shown.exit_code == errors.FAILED
    assert "model.safetensors" in shown.stderr
    assert "nothing was put anywhere" in shown.stdout


@pytest.mark.parametrize("planned", [False, True])
def test_init_writes_a_recipe_that_train_takes(made: Path, tmp_path: Path, planned: bool) -> None:
    recipe, plan = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    plan.write_text(scattered_plan(build(LM_ROW), LM_ROW.slim).to_json())
    given = {"speedup": 1.2, "seq_len": 8, "output": recipe, "folder": tmp_path / "out", "effort": "quick"}
    found = said("init", made / "base", made / "data.safetensors", **given, **({"plan": plan} if planned else {}))
    assert found["seconds"]["recovery"] > 0
    assert (found["seconds"]["gates"] == 0) == planned
    assert found["steps"] == said("train", recipe, dry_run=True)["steps"]
    assert "exists" in refused("init", made / "base", made / "data.safetensors", **given)


def test_slim_refuses_what_it_has_no_use_for(made: Path, tmp_path: Path) -> None:
    places, wrong = (made / "base", made / "adapter", tmp_path / "x"), errors.WRONG_USAGE
    assert "--seq-len, --device needs --calibration" in refused("slim", *places, code=wrong, seq_len=4, device="cpu")
    both = {"calibration": made / "data.safetensors", "verify": "full"}
    assert "--verify does not go with --calibration" in refused("slim", *places, code=wrong, **both)
    assert "--plan is needed" in refused("slim", made / "base", tmp_path / "x", code=wrong)
    assert "is no size" in refused("slim", *places, code=wrong, max_shard_size="big")
    assert "give an adapter and an output folder" in refused("slim", *places, "more", code=wrong)
    for text in ("[]", "{", '{"format": 0}'):
        (tmp_path / "plan.json").write_text(text)
        assert "plan.json holds no plan" in refused("slim", *places, plan=tmp_path / "plan.json")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------ sources and examples


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["measure", "{made}/nosuch"], "there is no folder {made}/nosuch"),
        (["measure", "nosuch"], "there is no folder nosuch"),
        (["measure", "{made}/data.safetensors"], "it is a file"),
        (["measure", "{made}"], "there is no config.json in it"),
        (["measure", "{made}/adapter"], "does not hold a model, but an adapter: name the dense model first"),
        (["slim", "{made}/adapter", "{made}/base", "x"], "does not hold a model, but an adapter"),
        (["slim", "{made}/base", "{made}/vit", "x"], "does not hold an adapter, but a model"),
        (["slim", "{made}/base", "{made}/nosuch", "x"], "there is no folder {made}/nosuch"),
        (["verify", "nosuch"], "'nosuch' does not exist"),
        (["report", "nosuch"], "'nosuch' does not exist"),
        (["report", "{made}/base"], "holds no hawada_report.json"),
        (["train", "nosuch.yaml"], "'nosuch.yaml' does not exist"),
    ],
)
def test_what_is_not_there_is_said_and_the_hub_is_not_asked_for_folders(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code = errors.WRONG_USAGE if "does not exist" in message else errors.FAILED
    assert message.format(made=made) in refused(*(word.format(made=made) for word in given), code=code)
    assert list(tmp_path.iterdir()) == []


def tokens(*shape: int, high: int = 128) -> torch.Tensor:
    return torch.randint(3, high, shape)


BAD: dict[str, tuple[str, Any, str]] = {
    "text for an image model": ("vit", b"some text", "is text, and ViTForImageClassification takes pixel_values"),
    "text without a tokenizer": ("base", b"some text", "has no tokenizer that could be loaded"),
    "no text": ("base", b"\xff\xfe\x00", "has no tokenizer"),
    "tokens for an image model": ("vit", {"input_ids": tokens(8, 4)}, "which ViTForImageClassification does not take"),
    "pixels for a language model": ("base", {"pixel_values": torch.ones(8, 3, 16, 16)}, "does not take"),
    "unknown name": ("base", {"tokens": tokens(8, 4)}, "['tokens'], which LlamaForCausalLM does not take"),
    "only a mask": ("base", {"attention_mask": tokens(8, 4)}, "no input_ids, which LlamaForCausalLM needs"),
    "beyond the vocabulary": ("base", {"input_ids": tokens(8, 16) + 125}, "the model's vocabulary has 128 tokens"),
    "negative tokens": ("base", {"input_ids": tokens(8, 16) - 100}, "the model's vocabulary has 128 tokens"),
    "one token": ("base", {"input_ids": tokens(8, 1)}, "at least 2 are needed"),
    "too many tokens": ("base", {"input_ids": tokens(8, 65)}, "the model has 64 positions"),
    "floats": ("base", {"input_ids": torch.rand(8, 16)}, "must be whole numbers"),
    "mask of another length": (
        "base",
        {"input_ids": tokens(8, 16), "attention_mask": torch.ones(8, 15)},
        "is not of the shape of input_ids",
    ),
    "other rows": ("base", {"input_ids": tokens(8, 16), "attention_mask": torch.ones(7, 16)}, "same number of rows"),
    "no rows": ("base", {"input_ids": tokens(0, 16)}, "input_ids is empty"),
    "a number": ("base", {"input_ids": torch.tensor(3)}, "same number of rows"),
    "nothing": ("base", {}, "same number of rows"),
    "NaN": ("vit", {"pixel_values": torch.full((8, 3, 16, 16), torch.nan)}, "NaN or infinite"),
    "channels": ("vit", {"pixel_values": torch.ones(8, 4, 16, 16)}, "has 4 channels"),
    "an array of words": ("base", np.array(["a", "b"]), "must hold whole numbers"),
    "an array of objects": ("base", np.array([None]), "is no .npy file of numbers"),
    "an image": ("vit", np.ones((3, 16, 16)), "must hold whole numbers"),
    "a short stream": ("base", np.ones(4, dtype=np.uint16), "less than one window"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_examples_of_any_modality_are_one_message(made: Path, tmp_path: Path, case: str) -> None:
    model, content, message = BAD[case]
    path = tmp_path / {dict: "x.safetensors", bytes: "x.txt", np.ndarray: "x.npy"}[type(content)]
    if isinstance(content, dict):
        save_file(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    budget = {"speedup": 1.2, "seq_len": 16} if model == "base" else {"speedup": 1.2}
    assert message in refused("plan", made / model, path, output=tmp_path / "plan.json", **budget)


@pytest.mark.parametrize("ending", ["safetensors", "npy"])
@pytest.mark.parametrize("left", [0, 9, 200])
def test_a_cut_file_is_one_message(made: Path, tmp_path: Path, ending: str, left: int) -> None:
    path = tmp_path / f"x.{ending}"
    if ending == "npy":
        np.save(path, np.ones((64, 16), dtype=np.uint16))
    else:
        save_file({"input_ids": tokens(64, 16)}, path)
    path.write_bytes(path.read_bytes()[:left])
    assert str(path) in refused("plan", made / "base", path, speedup=1.2, seq_len=16, output=tmp_path / "plan.json")


def test_a_file_that_is_not_there_or_of_another_kind_is_said(made: Path, tmp_path: Path) -> None:
    budget: dict[str, Any] = {"speedup": 1.2, "seq_len": 16, "output": tmp_path / "plan.json"}
    wrong = errors.WRONG_USAGE
    assert "'nosuch.txt' does not exist" in refused("plan", made / "base", "nosuch.txt", code=wrong, **budget)
    (tmp_path / "data.doc").touch()
    assert "must be a file of" in refused("plan", made / "base", tmp_path / "data.doc", **budget)


@pytest.mark.parametrize(("device", "message"), [("cuda:7", "no CUDA device here"), ("abacus", "'abacus'")])
def test_a_device_that_is_not_here_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = made / "data.safetensors"
    assert message in refused("measure", made / "base", device=device)
    assert message in refused("plan", made / "base", data, speedup=2, output=tmp_path / "plan.json", device=device)
    places = (made / "base", made / "adapter", tmp_path / "x")
    assert message in refused("slim", *places, calibration=data, device=device)


def test_a_model_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "nonesuch" in refused("measure", tmp_path)


# ------------------------------------------------------------------------------------------------------ train, report


def test_a_dry_run_gives_the_steps() -> None:
    recipe = Path(__file__).parents[1] / "examples" / "recipes" / "tiny.yaml"
    found = said("train", recipe, "--set", "seed=7", dry_run=True)
    assert found["recipe"]["seed"] == 7
    text = CliRunner().invoke(app, words("train", recipe, dry_run=True)).stdout
    assert text.startswith("1. load ")
    assert all(f"missing here: {path}" in text for path in found["missing"])


def test_report_writes_a_page(made: Path, tmp_path: Path) -> None:
    said("slim", made / "base", made / "adapter", tmp_path / "slim")
    found = said("report", tmp_path / "slim", output=tmp_path / "page")
    assert Path(found["page"]).is_file()
    assert str(tmp_path / "slim") not in found["page"]
