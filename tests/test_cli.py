"""The command line: what it takes, what goes to which stream, and with which code it ends."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import LM_ROW, build, gate, scattered_plan
from typer.testing import CliRunner

from hawada_peft import __version__
from hawada_peft.cli import errors
from hawada_peft.cli.program import app
from hawada_peft.cli.streams import working
from hawada_peft.errors import InfeasibleBudgetError

ROOT = Path(__file__).parents[1]
PROGRAM: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = PROGRAM.commands
PRINTING = {"json", "quiet", "debug"}

run = CliRunner().invoke


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and gates under a plan in `adapter`. Shared; left as it is."""
    folder = tmp_path_factory.mktemp("made")
    build(LM_ROW).save_pretrained(folder / "base")
    gated = gate(build(LM_ROW))
    gated.apply_plan(scattered_plan(gated, LM_ROW.slim))
    gated.save_pretrained(folder / "adapter")
    return folder


def separate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, whose streams are no terminals."""
    return subprocess.run(
        [sys.executable, "-m", "hawada_peft.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=1800,
    )


# -------------------------------------------------------------------------------------------------- words and examples


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run(app, [name, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    lines = [line.strip() for line in shown.output.rpartition("Examples:")[2].splitlines() if line.strip()]
    assert lines
    for line in lines:
        start, command, *arguments = re.split(rf"\b({name})\b", line.partition(" > ")[0], maxsplit=1)
        assert start in ("hawada ", "accelerate launch -m hawada_peft.cli ")
        words = shlex.split(arguments[0])
        for word in words:  # what must be there to be accepted
            made = tmp_path / word
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch() if made.suffix else made.mkdir(exist_ok=True)
        assert COMMANDS[command].make_context(name, words).params


def test_help_gives_the_whole_way() -> None:
    shown = run(app, ["--help"])
    assert shown.exit_code == 0
    assert set(re.findall(r"hawada (\w+)", shown.output.partition("The whole way:")[2])) == set(COMMANDS) - {"demo"}
    assert all(re.search(rf"^ +{code}  ", shown.output, re.MULTILINE) for code in errors.EXIT_CODES)
    assert "..." not in shown.output.partition("Commands:")[2]


def test_version() -> None:
    assert run(app, ["--version"]).output == f"hawada_peft {__version__}\n"


def test_extras_that_messages_name_exist() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(errors.EXTRAS.values()) | {"cli"} <= set(settings["options.extras_require"])


# -------------------------------------------------------------------------------------------------------------- errors


def test_demo_does_not_overwrite(tmp_path: Path) -> None:
    for name in ("digits", "topics"):
        (tmp_path / name).mkdir()
    result = run(app, ["demo", "--output", str(tmp_path), "--quick"])
    assert result.exit_code == errors.FAILED
    assert "choose another output folder" in result.stderr
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["digits", "topics"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nowhere.yaml"], errors.WRONG_USAGE, "nowhere.yaml"),
        (["verify", "nowhere"], errors.WRONG_USAGE, "nowhere"),
        (["measure", "no/such/model"], errors.FAILED, "no/such/model"),
        (["plan", "m", ".", "--speedup", "0.5"], errors.FAILED, "speedup must be at least 1"),
        (["plan", "m", "data.npy", "--backend", "magic"], errors.WRONG_USAGE, "--backend"),
        (["measure", "m", "--mode", "idle"], errors.WRONG_USAGE, "'prefill'"),
        (["measure", "m", "--seq-len", "0"], errors.WRONG_USAGE, "--seq-len"),
        (["plan", "m"], errors.WRONG_USAGE, "DATA"),
        (["plan", "m", "data.npy", "--examples", "0"], errors.WRONG_USAGE, "--examples"),
        (["measure", "m", "--nonsense"], errors.WRONG_USAGE, "--nonsense"),
        (["nonsense"], errors.WRONG_USAGE, "nonsense"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(app, arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InfeasibleBudgetError("reachable: 1.1x to 2x"), errors.INFEASIBLE, "error: reachable: 1.1x to 2x"),
        (KeyboardInterrupt(), errors.INTERRUPTED, "interrupted"),
        (ModuleNotFoundError("gone", name="sklearn.datasets"), errors.FAILED, "pip install 'hawada_peft[examples]'"),
        (json.JSONDecodeError("bad", "{", 0), errors.FAILED, "error: bad"),
    ],
    ids=["infeasible", "interrupted", "extra", "JSON"],
)
def test_errors_have_codes(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str) -> None:
    with pytest.raises(typer.Exit) as ended, errors.one_message():
        raise error
    assert ended.value.exit_code == code
    assert message in capsys.readouterr().err


def test_faults_of_the_package_show_where_they_come_from() -> None:
    for error in (TypeError("a fault"), ModuleNotFoundError("gone", name="nonesuch"), BrokenPipeError()):
        with pytest.raises(type(error)), errors.one_message():
            raise error
    with pytest.raises(FileNotFoundError), errors.one_message(debug=True):
        raise FileNotFoundError("nowhere")


# ------------------------------------------------------------------------------------------------------------- streams


def test_results_go_to_stdout_and_nothing_else(made: Path, tmp_path: Path) -> None:
    done = run(app, ["slim", *(str(made / name) for name in ("base", "adapter")), str(tmp_path / "slim"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["shape"] == LM_ROW.slim.to_dict()
    places = ["--base", str(made / "base"), "--adapter", str(made / "adapter")]
    text = run(app, ["verify", str(tmp_path / "slim"), *places])
    assert text.exit_code == 0, text.output
    assert text.stdout.splitlines()[-1] == f"{tmp_path / 'slim'}: vanilla, and what it should be"
    (tmp_path / "slim" / "modeling.py").touch()
    found = run(app, ["verify", str(tmp_path / "slim"), "--json"])
    assert found.exit_code == errors.FAILED
    assert not json.loads(found.stdout)["ok"]
    assert found.stderr == ""


@pytest.mark.filterwarnings("always:doubtful")
def test_what_libraries_print_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    for quiet in (False, True):
        with working(quiet=quiet) as progress:
            assert progress is None  # stderr is no terminal here
            print("chatter")
            for number in (3, 4):  # the same, but for its numbers: once
                warnings.warn(f"doubtful by {number}.5%", UserWarning, stacklevel=1)
        out, err = capsys.readouterr()
        assert out == ""
        assert err == ("" if quiet else "chatter\n") + "warning: doubtful by 3.5%\n"


def test_bars_are_made_for_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with working() as progress:
        assert progress is not None
        for _ in progress(iterable=range(2), desc="timing"):
            pass
    assert "timing" in capsys.readouterr().err
    with working(quiet=True) as progress:
        assert progress is None


# ----------------------------------------------------------------------------------------------------------- processes


def test_a_process_of_its_own_is_quiet_where_there_is_no_terminal(made: Path, tmp_path: Path) -> None:
    places = [str(made / "base"), str(made / "adapter"), str(tmp_path / "slim")]
    done = separate("slim", *places, "--verify", "full", "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == errors.DONE, done.stderr
    assert json.loads(done.stdout)["verification"]
    assert done.stderr == ""


def test_ctrl_c_ends_a_process_without_a_traceback(made: Path, tmp_path: Path) -> None:
    """Interrupted while it waits for the plan: a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "plan.json")
    code = (
        "import signal, hawada_peft.cli.program; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('ready', flush=True); hawada_peft.cli.main()"
    )
    places = [str(made / "base"), str(made / "adapter"), str(tmp_path / "slim")]
    command = [sys.executable, "-c", code, "slim", *places, "--plan", str(tmp_path / "plan.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        with (tmp_path / "plan.json").open("w"):  # opens once the other side reads
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=1800)
    assert process.returncode == errors.INTERRUPTED
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def test_without_typer_the_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; from hawada_peft.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == errors.FAILED
    assert done.stderr == "error: the command line needs typer: pip install 'hawada_peft[cli]'\n"
