"""How a function becomes a command: shared options are added, its result is printed."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from .errors import FAILED, one_message, say
from .streams import working

EXAMPLES = "Examples:"


def regime(
    mode: Annotated[
        str | None, typer.Option(help="forward, prefill or decode; by the kind of model if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per call.")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels along each side; the config's if left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's if left out.")] = None,
    backend: Annotated[str, typer.Option(help="eager, compile or cuda_graph.")] = "eager",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """The options of `RegimeOptions`: under which conditions is timed."""


def printing(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log lines.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the log, and where an error comes from.")] = False,
) -> None:
    """The options of every command."""


def command(
    app: typer.Typer, *examples: str, wrong: Callable[[Any], Sequence[str]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """
    Make a function a command.

    It gets the options of `printing`. `**regime` in its signature stands for those of `regime`, and `progress` for
    what makes progress bars. What it returns is printed: by `to_dict()` with `--json`, by `str()` without.

    Args:
        app: the program.
        examples: command lines, for its help.
        wrong: what is wrong with a result; if there is something, the command has failed.
    """

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        kept = [each for each in own.values() if each.kind is not each.VAR_KEYWORD and each.name != "progress"]
        if len(kept) < len(own) and any(each.kind is each.VAR_KEYWORD for each in own.values()):
            kept += inspect.signature(regime, eval_str=True).parameters.values()
        kept += inspect.signature(printing, eval_str=True).parameters.values()

        @functools.wraps(function)
        def run(*, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
            with one_message(debug=debug):
                with working(quiet=quiet, debug=debug) as progress:
                    result = function(**options, **({"progress": progress} if "progress" in own else {}))
                if result is None:  # another process prints
                    return
                typer.echo(json.dumps(result.to_dict()) if as_json else str(result))
                problems = () if wrong is None else wrong(result)
                for problem in problems:
                    say(f"error: {problem}")
                if problems:
                    raise typer.Exit(FAILED)

        run.__signature__ = inspect.Signature(kept, return_annotation=None)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in kept} | {"return": None}
        app.command(function.__name__, epilog=listed(EXAMPLES, examples))(run)
        return run

    return register


def listed(title: str, lines: Sequence[str]) -> str:
    """Lines of a help text that are not wrapped."""
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])
