"""Progress bars. The library shows none by itself: whoever calls passes what makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from tqdm import tqdm

Progress: TypeAlias = Callable[..., Any]
"""Makes a progress bar: `tqdm.tqdm`, or anything that is called and used as it is."""


def progress_bar(progress: Progress | None, **options: Any) -> Any:
    """
    A progress bar to iterate, to enter as a context and to update.

    Args:
        progress: makes it; none is shown if left out.
        options: of `tqdm`: `iterable`, `total`, `desc`, `unit`, ...
    """
    return tqdm(disable=True, **options) if progress is None else progress(**options)
