"""Whether a slim folder is what it should be: what a sound one passes, and which check names which defect."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, build, gate, scattered_plan, shuffle_gates
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hawada_peft import slim_checkpoint, verify_slim
from hawada_peft.errors import HawAdaError, InvalidPlanError
from hawada_peft.files.names import REPORT_NAME

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, gates under a plan in `adapter`, and `slim`. Shared; left as it is."""
    folder = tmp_path_factory.mktemp("made")
    build(LM_ROW).save_pretrained(folder / "base")
    gated = gate(build(LM_ROW))
    gated.apply_plan(scattered_plan(gated, LM_ROW.slim))
    gated.save_pretrained(folder / "adapter")
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    return folder


def failed(folder: Path, **options: Any) -> list[str]:
    """The names of the checks that a folder fails."""
    found = verify_slim(folder, **options)
    assert len(json.loads(json.dumps(found.to_dict()))["checks"]) == len(found.checks)
    assert ("do not use this folder" in str(found)) != found.ok
    names = [check.name for check in found.checks if check.ok is False]
    assert found.ok == (not names)
    return names


def test_a_sound_folder_passes(made: Path) -> None:
    result = verify_slim(made / "slim", base=made / "base", adapter=made / "adapter")
    assert result.ok
    assert [check.name for check in result.checks] == [
        *("files", "config", "tensors", "loads", "finite", "report", "sizes", "forward", "smaller", "logits")
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
    "adapter": (lambda folder: (folder / "adapter_model.safetensors").touch(), {"files", "report"}),
    "pickle": (lambda folder: (folder / "pytorch_model.bin").touch(), {"files"}),
    "field": (lambda folder: change_json(folder / "config.json", extra={"hawada_gates": 1}), {"config", "report"}),
    "custom class": (lambda folder: change_json(folder / "generation_config.json", auto_map={}), {"config", "report"}),
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
    "NaN": (lambda folder: change_weights(folder, poison), {"finite", "report", "forward", "logits"}),
    "other weights": (
        lambda folder: change_weights(folder, lambda state: state["model.embed_tokens.weight"].mul_(2.0)),
        {"report", "logits"},
    ),
    "dense": (the_dense_model, {"report", "sizes", "smaller", "logits"}),
    "broken report": (lambda folder: (folder / REPORT_NAME).write_text("{"), {"report"}),
    "no plan in it": (lambda folder: change_json(folder / REPORT_NAME, plan={"format": 0}), {"report"}),
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
    slim_checkpoint(made / "base", made / "adapter", tmp_path / "slim", fold=False)
    gates: dict[str, Any] = {"base": made / "base", "adapter": made / "adapter"}
    assert failed(tmp_path / "slim", fold=False, **gates) == []
    assert failed(tmp_path / "slim", **gates) == ["logits"]


def test_what_was_refitted_is_not_compared_and_that_is_said(made: Path, tmp_path: Path) -> None:
    tokens = torch.randint(3, 128, (24, 16), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": part} for part in tokens.split(8)]
    slim_checkpoint(made / "base", made / "adapter", tmp_path / "slim", calibration=batches)
    result = verify_slim(tmp_path / "slim", base=made / "base", adapter=made / "adapter")
    last = result.checks[-1]
    assert (last.name, last.ok, result.ok) == ("logits", None, True)
    assert "refitted" in last.detail


def test_a_folder_without_a_report_is_checked_as_far_as_that_goes(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "slim", tmp_path / "slim")
    (tmp_path / "slim" / REPORT_NAME).unlink()
    (check,) = [check for check in verify_slim(tmp_path / "slim").checks if check.ok is None]
    assert check.name == "report"
    assert failed(tmp_path / "slim", base=made / "base", adapter=made / "adapter") == []
    bare = gate(build(LM_ROW))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(InvalidPlanError, match="there is no plan"):
        verify_slim(tmp_path / "slim", base=made / "base", adapter=tmp_path / "bare")


def test_what_cannot_be_used_is_refused(made: Path, tmp_path: Path) -> None:
    plan = scattered_plan(build(LM_ROW), LM_ROW.slim)
    build(VISION_ROW).save_pretrained(tmp_path / "vit")
    with pytest.raises(HawAdaError, match="adapter needs base"):
        verify_slim(made / "slim", adapter=made / "adapter")
    with pytest.raises(HawAdaError, match="plan needs adapter"):
        verify_slim(made / "slim", base=made / "base", plan=plan)
    with pytest.raises(HawAdaError, match="pass the base that it was cut from"):
        verify_slim(made / "slim", base=tmp_path / "vit")
    with pytest.raises(HawAdaError, match="runtimes"):
        verify_slim(made / "slim", runtimes=["tensorrt"])
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        verify_slim("nowhere")


def test_a_runtime_is_run_when_it_is_asked_for(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, backend: model)  # a compiler that changes nothing
    result = verify_slim(made / "slim", runtimes=["compile"])
    assert result.checks[-1].name == "compile"
    assert result.ok
