"""How a function becomes a command: shared options are added, its result is printed."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer

from .errors import FAILED, one_message
from .streams import working

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Mode(str, Enum):
    """What is timed."""

    forward = "forward"
    prefill = "prefill"
    decode = "decode"


class Dtype(str, Enum):
    """Of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Backend(str, Enum):
    """How a model is run."""

    eager = "eager"
    compile = "compile"
    cuda_graph = "cuda_graph"


class Effort(str, Enum):
    """How hard is measured and searched."""

    quick = "quick"
    normal = "normal"


@dataclass(frozen=True)
class Said:
    """
    What a command has to say.

    Args:
        text: for people.
        data: for scripts: JSON.
        ok: whether the command did what it was asked for.
    """

    text: str
    data: dict[str, Any]
    ok: bool = True


def size(text: str) -> int:
    """Bytes, out of `"5GB"` or `"500MB"`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size: write it as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


Model = Annotated[str, typer.Argument(help="Folder or id of the dense model.", show_default=False)]
Fold = Annotated[bool, typer.Option(help="Fold the gates' soft values into the weights.")]


def regime(
    mode: Annotated[Mode | None, typer.Option(help="By the kind of model if left out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per call.")] = 1,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per row; models of text need it.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels along each side; the config's if left out.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="The model's if left out.")] = None,
    backend: Annotated[Backend, typer.Option(help="How it is run.")] = Backend.eager,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Under which conditions is timed: fields of `LatencyBudget`."""


Level = Annotated[Effort, typer.Option(help="How hard is measured and searched: quick takes seconds for tiny models.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure the latency table anew, even if there is one here.")]


def printing(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log lines.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the log, and where an error comes from.")] = False,
) -> None:
    """The options of every command."""


def add(app: typer.Typer, function: Callable[..., Said | None], examples: Sequence[str]) -> None:
    """
    Make a function a command, named after its module.

    It gets the options of `printing`. `**regime` in its signature stands for those of `regime`, and `progress` for
    what makes progress bars. What it returns is printed; None is what another process prints.

    Args:
        app: the program.
        function: the command.
        examples: command lines, for its help.
    """
    own = inspect.signature(function, eval_str=True).parameters
    kept = [each for each in own.values() if each.kind is not each.VAR_KEYWORD and each.name != "progress"]
    if any(each.kind is each.VAR_KEYWORD for each in own.values()):
        kept += inspect.signature(regime, eval_str=True).parameters.values()
    kept += inspect.signature(printing, eval_str=True).parameters.values()

    @functools.wraps(function)
    def run(*, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
        given = {name: each.value if isinstance(each, Enum) else each for name, each in options.items()}
        with one_message(debug=debug):
            with working(quiet=quiet, debug=debug) as progress:
                said = function(**given, **({"progress": progress} if "progress" in own else {}))
            if said is not None:
                typer.echo(json.dumps(said.data) if as_json else said.text)
                if not said.ok:
                    raise typer.Exit(FAILED)

    run.__signature__ = inspect.Signature(kept, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in kept} | {"return": None}
    app.command(function.__module__.rpartition(".")[2], epilog=listed("Examples:", examples))(run)


def refuse(given: Mapping[str, object], why: str) -> None:
    """
    Refuse options that the chosen way has no use for.

    Args:
        given: options and their values; None where they were left out.
        why: what is said of those that were not.
    """
    if named := [name for name, value in given.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(named)} {why}")


def listed(title: str, lines: Sequence[str]) -> str:
    """Lines of a help text that are not wrapped."""
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])
