"""How a function becomes a command: shared options are added, its result is printed."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..latency.budget import LatencyBudget
from ..latency.regime import Conditions
from .errors import FAILED, one_message, say
from .streams import working

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Effort(str, Enum):
    """How hard is measured and searched."""

    quick = "quick"
    normal = "normal"
    thorough = "thorough"


@dataclass(frozen=True)
class Said:
    """
    What a command has to say.

    Args:
        text: for people.
        data: for scripts: JSON.
        ok: whether the command did what it was asked for.
        next: command lines that could come next, with a word on each.
    """

    text: str
    data: dict[str, Any]
    ok: bool = True
    next: Sequence[str] = ()


def size(text: str) -> int:
    """Bytes, out of `"5GB"` or `"500MB"`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size: write it as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


Model = Annotated[str, typer.Argument(help="Folder or id of the dense model.", show_default=False)]
FILE: dict[str, Any] = {"exists": True, "dir_okay": False, "show_default": False}
FOLDER: dict[str, Any] = {"exists": True, "file_okay": False, "show_default": False}
"""What an option or argument must name, or is refused."""

Slim = Annotated[Path, typer.Argument(help="Folder of the slim model.", **FOLDER)]
Fold = Annotated[bool, typer.Option(help="Fold the gates' soft values into the weights.")]


DEVICE = "cpu"
"""Where a model is loaded and timed if nothing is said."""


def options_of(cls: type) -> Iterator[inspect.Parameter]:
    """An option for every field of a dataclass that says what it is for: of `Conditions` or `LatencyBudget`."""
    hints = get_type_hints(cls)
    for each in sorted(fields(cls), key=lambda each: each.name in Conditions.__dataclass_fields__):
        kind, default = hints[each.name], DEVICE if each.name == "device" else each.default
        form: dict[str, Any] = {"min": 1} if kind in (int, int | None) else {}
        if choices := each.metadata.get("choices"):
            named: Any = Enum(each.name, {choice: choice for choice in choices}, type=str)  # type: ignore[misc]
            kind = named | None if default is None else named
            default = None if default is None else named(default)
        elif each.metadata.get("unit") == "bytes":
            kind, form = int | None, {"parser": size, "metavar": "SIZE"}
        flags = [each.metadata["option"]] if "option" in each.metadata else []
        option = Annotated[kind, typer.Option(*flags, help=each.metadata["help"], **form)]  # type: ignore[valid-type]
        yield inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)


OPTIONS = {"regime": Conditions, "budget": LatencyBudget}
"""What `**regime` and `**budget` in a command's signature stand for."""

Level = Annotated[Effort, typer.Option(help="How hard is measured and searched: quick takes seconds for tiny models.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure the latency table anew, even if there is one here.")]

ClockCommand = Annotated[
    str | None,
    typer.Option(
        help="Program that times the model in {folder} where it is deployed, and prints seconds; {batch_size}, "
        "{seq_len}, {prompt} and {output} stand for what is asked.",
        show_default=False,
    ),
]


def printing(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log lines.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the log, and where an error comes from.")] = False,
) -> None:
    """The options of every command."""


def add(
    app: typer.Typer,
    function: Callable[..., Said | None],
    examples: Sequence[str],
    check: Callable[..., None] | None = None,
) -> None:
    """
    Make a function a command, named after its module.

    It gets the options of `printing`. `**regime` and `**budget` in its signature stand for those of `OPTIONS`, and
    `progress` for what makes progress bars. What it returns is printed; None is what another process prints.

    Args:
        app: the program.
        function: the command.
        examples: command lines, for its help.
        check: refuses what can be refused without torch, before it is imported. It takes some of the command's
            options; `**options` are all.
    """
    own = inspect.signature(function, eval_str=True).parameters
    kept = [each for each in own.values() if each.kind is not each.VAR_KEYWORD and each.name != "progress"]
    kept += [option for each in own.values() if each.name in OPTIONS for option in options_of(OPTIONS[each.name])]
    kept += inspect.signature(printing, eval_str=True).parameters.values()

    @functools.wraps(function)
    def run(*, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
        given = {name: each.value if isinstance(each, Enum) else each for name, each in options.items()}
        with one_message(debug=debug):
            if check is not None:
                taken = inspect.signature(check).parameters
                check(**{name: each for name, each in given.items() if name in taken or "options" in taken})
            with working(quiet=quiet, debug=debug) as progress:
                said = function(**given, **({"progress": progress} if "progress" in own else {}))
            if said is not None:
                show(said, as_json=as_json, quiet=quiet)

    run.__signature__ = inspect.Signature(kept, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in kept} | {"return": None}
    app.command(function.__module__.rpartition(".")[2], epilog=listed("Examples:", examples))(run)


def show(said: Said, *, as_json: bool, quiet: bool) -> None:
    """Print what a command has to say, and to a person what could come next."""
    typer.echo(json.dumps(said.data) if as_json else said.text)
    if said.next and not as_json and not quiet:
        say("\n" + "\n".join(["next:", *(f"  {line}" for line in said.next)]))
    if not said.ok:
        raise typer.Exit(FAILED)


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
