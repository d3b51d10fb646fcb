"""What goes where: the result to stdout, everything else to stderr, bars only to a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial

from tqdm import tqdm

from ..progress import Progress
from .errors import say


@contextmanager
def working(*, quiet: bool = False, debug: bool = False) -> Iterator[Progress | None]:
    """
    Keep stdout clean while a command works: what libraries print goes to stderr.

    Args:
        quiet: no progress and no log lines; only warnings and errors.
        debug: also the package's log.

    Yields:
        What makes progress bars; None where nobody would see them.
    """
    shown = sys.stderr.isatty() and not quiet
    package, handler = logging.getLogger("hawada_peft"), logging.StreamHandler(sys.stderr)
    level = package.level
    if debug:
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere if quiet else sys.stderr),
        _other_libraries(shown=shown, quiet=quiet),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of one library to another
        warnings.showwarning = _show_once()
        from .. import registered  # noqa: F401 (here: it takes seconds)

        try:
            yield partial(tqdm, file=sys.stderr) if shown else None
        finally:
            package.removeHandler(handler)
            package.setLevel(level)


@contextmanager
def _other_libraries(*, shown: bool, quiet: bool) -> Iterator[None]:
    """The bars and notices of transformers and huggingface_hub; both are put back."""
    # Here: they take half a second to import.
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    hub_bars = not are_progress_bars_disabled()
    if not shown:
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def _show_once() -> Callable[..., None]:
    """
    Shows warnings in one line, without the place in the code; of those that differ only in their numbers the first.
    """
    seen = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        words = category, re.sub(r"[\d.]+", "", str(message).partition("(")[0])
        if words not in seen:
            seen.add(words)
            say(f"warning: {message}")

    return show
