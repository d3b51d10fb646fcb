"""Errors as one message on stderr, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer
import yaml  # type: ignore[import-untyped]
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from ..errors import HawAdaError, InfeasibleBudgetError, VerificationError

DONE, FAILED, WRONG_USAGE, INFEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130

EXIT_CODES = {
    DONE: "done",
    FAILED: "an error that the message explains; or verify found something wrong",
    WRONG_USAGE: "wrong usage: an unknown option or choice, a missing argument, options that do not go together",
    INFEASIBLE: "no shape meets the budget; the message gives the range that can be reached",
    INTERRUPTED: "interrupted by Ctrl-C",
}

EXPLAINED = (
    HawAdaError,
    VerificationError,
    OSError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    yaml.YAMLError,
    SafetensorError,
    HFValidationError,
    torch.OutOfMemoryError,
    subprocess.CalledProcessError,
)
"""Errors whose message says what is wrong. All others are faults of this package, and show where they come from."""

EXTRAS = {
    "datasets": "data",
    "matplotlib": "report",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "sklearn": "examples",
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
    except EXPLAINED as error:
        if debug:
            raise
        say(f"error: {error}")
        raise typer.Exit(INFEASIBLE if isinstance(error, InfeasibleBudgetError) else FAILED) from None


def say(message: str) -> None:
    """A line for the person in front of the terminal."""
    print(message, file=sys.stderr, flush=True)
