"""The scripts in examples/, as a user starts them."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoProcessor

EXAMPLES = Path(__file__).parents[1] / "examples"
AUTO = {"slim_vit": AutoModelForImageClassification, "slim_llama": AutoModelForCausalLM}
QUICK = ["--steps", "4", "--recover-steps", "2", "--held-out", "8", "--calibration", "8", "--train-batch-size", "4"]


def run(script: str, *options: str | Path) -> str:
    """What the script prints, run as `python SCRIPT OPTIONS`, but for the seconds that a new process imports."""
    path, printed = EXAMPLES / f"{script}.py", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(path), *map(str, options)])
        patch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def check(script: str, output: Path, dense: Path, printed: str) -> None:
    """The folder reloads, is smaller, and the lines that were printed say what its report does."""
    models = {"dense": AUTO[script].from_pretrained(dense), "slim": AUTO[script].from_pretrained(output / "slim")}
    assert models["slim"].num_parameters() < models["dense"].num_parameters()
    report = json.loads((output / "slim" / "hawada_report.json").read_text())
    (quality,) = report["quality"]
    for name, model in models.items():
        line = re.search(rf"^{name}: +([\d,]+) parameters, ([\d.]+) ms, (\w+) ([\d.]+)", printed, re.MULTILINE)
        assert line is not None, printed
        assert int(line[1].replace(",", "")) == model.num_parameters()
        assert float(line[2]) == pytest.approx(report["latency"][f"{name}_ms"], abs=0.006)
        assert quality["name"].startswith(line[3])
        assert float(line[4]) == pytest.approx(quality[name], abs=0.06)
    assert re.search(r"^speedup: [\d.]+x, asked for [\d.]+x \(.*cpu\)$", printed, re.MULTILINE)
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    assert "reconstruction" in report
    assert type(AutoProcessor.from_pretrained(output / "slim")) is type(AutoProcessor.from_pretrained(dense))


@pytest.fixture(scope="module", params=AUTO)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """A run of the script that needs nothing: its name, its output, what it printed."""
    output = tmp_path_factory.mktemp(request.param) / "out"
    return request.param, output, run(request.param, "--tiny", *QUICK, "--output", output)


def test_tiny(tiny: tuple[str, Path, str]) -> None:
    script, output, printed = tiny
    check(script, output, output / "teacher", printed)


@pytest.mark.parametrize("script", AUTO)
def test_a_folder_that_holds_something_is_refused_at_once(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as refused:
        run(script, "--tiny", "--output", tmp_path)
    assert refused.value.code == 2
    assert "holds something: give another --output" in capsys.readouterr().err


def write_rows(script: str, folder: Path) -> list[str]:
    """A dataset of one's own: pictures in a folder per class, or texts in a json file. The options that it needs."""
    folder.mkdir()
    if script == "slim_llama":
        texts = [f"Statement {row}: " + "the value of an expression is not a name. " * 5 for row in range(64)]
        (folder / "texts.json").write_text("\n".join(json.dumps({"body": text}) for text in texts))
        return ["--text-column", "body", "--seq-len", "32"]
    from PIL import Image

    for row in range(64):
        (folder / str(row % 2)).mkdir(exist_ok=True)
        Image.new("L", (8, 8), color=3 * row).save(folder / str(row % 2) / f"{row}.png")
    return []


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_dataset_in_a_folder(tiny: tuple[str, Path, str], tmp_path: Path, streaming: bool) -> None:
    pytest.importorskip("datasets")
    script, made, _ = tiny
    options = ["--tiny", *QUICK, *write_rows(script, tmp_path / "data"), *["--streaming"] * streaming]
    given = ["--model", made / "teacher", "--dataset", tmp_path / "data", "--output", tmp_path / "out"]
    check(script, tmp_path / "out", made / "teacher", run(script, *given, *options))
