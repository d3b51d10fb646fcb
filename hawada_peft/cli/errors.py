"""Errors as one message on stderr, and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import HawAdaError, InfeasibleBudgetError, VerificationError

DONE, FAILED, WRONG_USAGE, INFEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130

EXIT_CODES = {
    DONE: "done",
    FAILED: "an error that the message explains; or verify found something wrong",
    WRONG_USAGE: "wrong usage: an unknown option or choice, a missing argument or file, options that do not go along",
    INFEASIBLE: "no shape meets the budget; the message gives the range that can be reached",
    INTERRUPTED: "interrupted by Ctrl-C",
}

MOST_LINES = 5
"""Of a message. All of a longer one, and where it comes from, is shown with --debug."""

EXTRAS = {
    "datasets": "data",
    "matplotlib": "report",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "sklearn": "examples",
    "scipy": "examples",
    "PIL": "examples",
}
"""Which extra holds a package that is imported where it is needed."""


@contextmanager
def one_message(*, debug: bool = False) -> Iterator[None]:
    """
    Errors on bad input as one message, without a traceback.

    Args:
        debug: show where they come from.

    Raises:
        typer.Exit: with one of `EXIT_CODES`.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise  # whoever read the output has read enough; typer ends without a word
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None or debug:
            raise
        say(f"error: this needs {error.name}: pip install 'hawada_peft[{extra}]'")
        raise typer.Exit(FAILED) from None
    except explained() as error:
        if debug:
            raise
        say(shortened(f"error: {error}"))
        raise typer.Exit(INFEASIBLE if isinstance(error, InfeasibleBudgetError) else FAILED) from None


def explained() -> tuple[type[BaseException], ...]:
    """Errors whose message says what is wrong. Others are faults of this package, and show where they come from."""
    # Here: what needs no torch is said without it.
    import json
    import subprocess

    import yaml  # type: ignore[import-untyped]
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError

    found: list[type[BaseException]] = [HawAdaError, VerificationError, OSError, json.JSONDecodeError]
    found += [UnicodeDecodeError, yaml.YAMLError, SafetensorError, HFValidationError, subprocess.CalledProcessError]
    if "torch" in sys.modules:
        from torch import OutOfMemoryError

        found.append(OutOfMemoryError)
    return tuple(found)


def shortened(message: str) -> str:
    """At most `MOST_LINES` of a message."""
    lines = message.splitlines()
    if len(lines) <= MOST_LINES:
        return message
    kept = lines[: MOST_LINES - 1]
    return "\n".join([*kept, f"... and {len(lines) - len(kept)} more lines, which --debug shows"])


def say(message: str) -> None:
    """A line for the person in front of the terminal."""
    print(message, file=sys.stderr, flush=True)
