"""The commands as Python calls: what they do, what they return, and what `verify` finds."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import LM_ROW, build, gate, scattered_plan, shuffle_gates
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from hawada_peft import LatencyTable, Plan, SlimCheckpoint, commands
from hawada_peft.commands._regime import RegimeOptions
from hawada_peft.errors import (
    HawAdaError,
    InfeasibleBudgetError,
    InvalidPlanError,
    InvalidRegimeError,
    UnsupportedModelError,
)
from hawada_peft.files.names import REPORT_NAME
from hawada_peft.latency import Effort, ToyClock

WEIGHTS = "model.safetensors"


EFFORT = Effort(clock=ToyClock(lambda model, regime: cast(Any, model).num_parameters() / 1e3), cache=False)
"""A machine on which a model takes as long as it has parameters."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, gates under a plan in `adapter`, `data.safetensors`, and `slim`. Shared; left as it is."""
    folder = tmp_path_factory.mktemp("made")
    build(LM_ROW).save_pretrained(folder / "base")
    gated = gate(build(LM_ROW))
    gated.apply_plan(scattered_plan(gated, LM_ROW.slim))
    gated.save_pretrained(folder / "adapter")
    tokens = torch.randint(3, 128, (24, 16), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": tokens}, folder / "data.safetensors")
    commands.slim(folder / "base", folder / "adapter", folder / "slim")
    return folder


def plain(result: Any) -> dict[str, Any]:
    """What a script gets: the result's dictionary, through JSON."""
    return json.loads(json.dumps(result.to_dict()))


def failed(folder: Path, **options: Any) -> list[str]:
    """The names of the checks that a folder fails."""
    result = commands.verify(folder, **options)
    assert result.ok == (not result.problems)
    assert len(plain(result)["checks"]) == len(result.checks)
    assert ("do not use this folder" in str(result)) != result.ok
    return [check.name for check in result.checks if check.ok is False]


# ------------------------------------------------------------------------------------------------------ measure, plan


def test_measure_returns_the_table(made: Path) -> None:
    result = commands.measure(made / "base", batch_size=2, seq_len=8, effort=EFFORT)
    assert LatencyTable.from_dict(plain(result)) == result.table
    assert (result.table.regime.batch_size, result.table.regime.device) == (2, "cpu")
    assert "2 of 4 layers" in str(result)


@pytest.mark.parametrize("gates", ["fresh", "trained"])
def test_plan_writes_a_plan_that_slim_takes(made: Path, tmp_path: Path, gates: str) -> None:
    adapter = made / "adapter" if gates == "trained" else None
    path, seen = tmp_path / "new" / "plan.json", set()

    def bars(**options: Any) -> Any:
        seen.add(options["desc"].partition(": ")[2] or options["desc"])
        return tqdm(**options, disable=True)

    budget: dict[str, Any] = {
        "speedup": 1.3,
        "seq_len": 8,
        "examples": 8,
        "adapter": adapter,
        "progress": bars,
        "effort": EFFORT,
    }
    result = commands.plan(made / "base", made / "data.safetensors", output=path, **budget)
    said = plain(result)
    assert said["speedup"] == pytest.approx(result.search.speedup)
    assert said["speedup"] >= 1.3
    assert str(path) in str(result)
    assert json.loads(Path(said["search"]).read_text())["points"] == plain(result.search)["points"]
    written = commands.slim(made / "base", made / "adapter", tmp_path / "slim", plan=path, progress=bars)
    assert written.plan == Plan.from_json(path.read_text())
    assert written.plan.shape.to_dict() == said["shape"]
    assert written.parameters == said["parameters"]
    assert failed(tmp_path / "slim", base=made / "base", adapter=made / "adapter") == []
    assert seen >= {"dropping layers", "refitting depths", "slimming"}
    assert ("importance" in seen) == (adapter is None)


def test_plan_judges_by_closed_gates_if_asked(made: Path, tmp_path: Path) -> None:
    seen = set()

    def bars(**options: Any) -> Any:
        seen.add(options["desc"].partition(": ")[2] or options["desc"])
        return tqdm(**options, disable=True)

    budget: dict[str, Any] = {
        "speedup": 1.3,
        "seq_len": 8,
        "examples": 8,
        "refit": False,
        "progress": bars,
        "effort": EFFORT,
    }
    result = commands.plan(made / "base", made / "data.safetensors", output=tmp_path / "plan.json", **budget)
    assert seen >= {"dropping layers", "importance"}
    assert "refitting depths" not in seen
    assert result.search_path == tmp_path / "plan.search.json"


def test_a_budget_that_cannot_be_met_writes_nothing(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleBudgetError):
        commands.plan(
            made / "base",
            made / "data.safetensors",
            output=tmp_path / "p.json",
            latency_ms=1e-3,
            seq_len=8,
            examples=8,
            effort=EFFORT,
        )
    assert not (tmp_path / "p.json").exists()


# --------------------------------------------------------------------------------------------------------------- slim


def test_slim_tells_what_it_wrote(made: Path, tmp_path: Path) -> None:
    result = commands.slim(made / "base", made / "adapter", tmp_path / "slim", verify="full", max_shard_size="50KB")
    assert isinstance(result, SlimCheckpoint)
    assert plain(result)["shape"] == LM_ROW.slim.to_dict()
    assert f"{result.parameters:,} of {result.dense_parameters:,} parameters stay" in str(result)
    assert "logits differ by at most" in str(result)
    assert failed(tmp_path / "slim", base=made / "base", adapter=made / "adapter") == []


def test_slim_refuses_what_it_has_no_use_for(made: Path, tmp_path: Path) -> None:
    with pytest.raises(HawAdaError, match="seq_len, device needs calibration"):
        commands.slim(made / "base", made / "adapter", tmp_path / "x", seq_len=4, device="cpu")
    for text in ("[]", "{", '{"format": 0}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(HawAdaError, match=r"plan\.json holds no plan"):
            commands.slim(made / "base", made / "adapter", tmp_path / "x", plan=tmp_path / "plan.json")
    assert not (tmp_path / "x").exists()


def test_examples_that_the_model_does_not_take_are_refused(made: Path, tmp_path: Path) -> None:
    save_file({"tokens": torch.ones(8, 4, dtype=torch.long)}, tmp_path / "data.safetensors")
    with pytest.raises(HawAdaError, match=r"\['tokens'\], which LlamaForCausalLM does not take"):
        commands.slim(made / "base", made / "adapter", tmp_path / "x", calibration=tmp_path / "data.safetensors")


# ------------------------------------------------------------------------------------------------------------- verify


def test_a_sound_folder_passes(made: Path) -> None:
    result = commands.verify(made / "slim", base=made / "base", adapter=made / "adapter")
    assert result.ok
    assert [check.name for check in result.checks] == [
        *("files", "config", "tensors", "loads", "sizes", "forward", "smaller", "logits")
    ]
    assert all(check.ok for check in result.checks)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def poison(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight"][0] = torch.nan


def the_dense_model(folder: Path) -> None:
    """The dense model under the slim one's report."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(folder.parent / "base" / name, folder / name)


DEFECTS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "code": (lambda folder: (folder / "modeling_slim.py").touch(), {"files"}),
    "adapter": (lambda folder: (folder / "adapter_model.safetensors").touch(), {"files"}),
    "pickle": (lambda folder: (folder / "pytorch_model.bin").touch(), {"files"}),
    "field": (lambda folder: change_json(folder / "config.json", extra={"hawada_gates": 1}), {"config"}),
    "custom class": (lambda folder: change_json(folder / "generation_config.json", auto_map={}), {"config"}),
    "no config": (lambda folder: (folder / "config.json").unlink(), {"config", "loads"}),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), {"config", "loads"}),
    "illegal config": (lambda folder: change_json(folder / "config.json", num_attention_heads=3), {"loads"}),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), {"tensors", "loads"}),
    "broken weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x08" * 64), {"tensors", "loads"}),
    "gates": (
        lambda folder: change_weights(folder, lambda state: state.update({"hawada_heads": torch.ones(1)})),
        {"tensors", "loads"},
    ),
    "missing tensor": (lambda folder: change_weights(folder, lambda state: state.pop("model.norm.weight")), {"loads"}),
    "NaN": (lambda folder: change_weights(folder, poison), {"forward", "logits"}),
    "other weights": (
        lambda folder: change_weights(folder, lambda state: state["model.embed_tokens.weight"].mul_(2.0)),
        {"logits"},
    ),
    "dense": (the_dense_model, {"sizes", "smaller", "logits"}),
    "broken report": (lambda folder: (folder / REPORT_NAME).write_text("{"), {"sizes"}),
    "no plan in it": (lambda folder: change_json(folder / REPORT_NAME, plan={"format": 0}), {"sizes"}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named(made: Path, tmp_path: Path, defect: str) -> None:
    break_it, expected = DEFECTS[defect]
    shutil.copytree(made / "slim", tmp_path / "slim")
    shutil.copytree(made / "base", tmp_path / "base")
    break_it(tmp_path / "slim")
    reports = "report" not in defect and "plan" not in defect
    gates: dict[str, Any] = {"base": made / "base", "adapter": made / "adapter"} if reports else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own words on some of these
        assert set(failed(tmp_path / "slim", **gates)) == expected


def test_gates_of_another_training_do_not_fit(made: Path, tmp_path: Path) -> None:
    other: Any = PeftModel.from_pretrained(build(LM_ROW), made / "adapter")
    shuffle_gates(other, seed=9).save_pretrained(tmp_path / "adapter")
    assert failed(made / "slim", base=made / "base", adapter=tmp_path / "adapter") == ["logits"]


def test_an_export_without_folding_is_compared_without(made: Path, tmp_path: Path) -> None:
    commands.slim(made / "base", made / "adapter", tmp_path / "slim", fold=False)
    gates: dict[str, Any] = {"base": made / "base", "adapter": made / "adapter"}
    assert failed(tmp_path / "slim", fold=False, **gates) == []
    assert failed(tmp_path / "slim", **gates) == ["logits"]


def test_what_was_refitted_is_not_compared_and_that_is_said(made: Path, tmp_path: Path) -> None:
    commands.slim(made / "base", made / "adapter", tmp_path / "slim", calibration=made / "data.safetensors")
    result = commands.verify(tmp_path / "slim", base=made / "base", adapter=made / "adapter")
    last = result.checks[-1]
    assert (last.name, last.ok, result.ok) == ("logits", None, True)
    assert "refitted" in last.detail


def test_a_folder_without_a_report_is_checked_as_far_as_that_goes(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "slim", tmp_path / "slim")
    (tmp_path / "slim" / REPORT_NAME).unlink()
    (check,) = [check for check in commands.verify(tmp_path / "slim").checks if check.ok is None]
    assert check.name == "sizes"
    assert failed(tmp_path / "slim", base=made / "base", adapter=made / "adapter") == []
    bare = gate(build(LM_ROW))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(InvalidPlanError, match="there is no plan"):
        commands.verify(tmp_path / "slim", base=made / "base", adapter=tmp_path / "bare")


def test_verify_refuses_what_it_cannot_use(made: Path, tmp_path: Path) -> None:
    with pytest.raises(HawAdaError, match="adapter needs base"):
        commands.verify(made / "slim", adapter=made / "adapter")
    with pytest.raises(HawAdaError, match="plan needs adapter"):
        commands.verify(made / "slim", base=made / "base", plan=tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        commands.verify(tmp_path / "nowhere")


def test_a_runtime_is_run_when_it_is_asked_for(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, backend: model)  # a compiler that changes nothing
    result = commands.verify(made / "slim", compile=True)
    assert result.checks[-1].name == "compile"
    assert result.ok


# ------------------------------------------------------------------------------------------------- train, demo, report


def test_a_dry_run_returns_the_steps() -> None:
    recipe = Path(__file__).parents[1] / "examples" / "recipes" / "tiny.yaml"
    result = commands.train(recipe, set=["seed=7"], dry_run=True)
    assert plain(result)["recipe"]["seed"] == 7
    assert str(result).startswith("1. load ")
    assert all(f"missing here: {path}" in str(result) for path in plain(result)["missing"])


def test_a_model_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedModelError, match="nonesuch"):
        commands.measure(tmp_path)


@pytest.mark.parametrize(("device", "words"), [("cuda:7", "no CUDA device here"), ("abacus", "is none")])
def test_a_device_that_is_not_here_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data: dict[str, Any] = {"calibration": made / "data.safetensors", "device": device}
    for call in (
        lambda: commands.measure(made / "base", device=device),
        lambda: commands.plan(made / "base", speedup=2, output=tmp_path / "plan.json", **data),
        lambda: commands.slim(made / "base", made / "adapter", tmp_path / "x", **data),
    ):
        with pytest.raises(InvalidRegimeError, match=words):
            call()


def test_report_writes_a_page(made: Path, tmp_path: Path) -> None:
    result = commands.report(made / "slim", output=tmp_path / "page")
    assert result.page.is_file()
    assert plain(result)["page"] == str(result.page)
    assert str(result.page) in str(result)


def test_every_command_is_documented_and_typed() -> None:
    for name in commands.__all__:
        assert inspect.getdoc(getattr(commands, name))
    functions = [each for each in vars(commands).values() if inspect.isfunction(each)]
    assert len(functions) == 7
    for function in functions:
        for parameter in inspect.signature(function).parameters:
            own = RegimeOptions.__doc__ if parameter == "regime" else ""
            assert parameter in (function.__doc__ or "") + (own or "")
