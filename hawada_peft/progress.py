"""Progress bars. The library shows none by itself: whoever calls passes what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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


def in_steps(progress: Progress | None, names: Sequence[str]) -> Progress | None:
    """
    Bars that tell which step of how many they are: "step 2 of 4: dropping layers". A step that shows several bars has
    one, which grows.

    Args:
        progress: makes them.
        names: the steps; bars of other names are shown as they are.
    """
    if progress is None:
        return None
    growing: dict[str, Any] = {}

    def bar(*, desc: str = "", **options: Any) -> Any:
        if desc not in names:
            return progress(desc=desc, **options)
        iterable, total = options.pop("iterable", None), options.pop("total", None)
        if total is None and iterable is not None:
            total = len(iterable)
        if desc not in growing:
            growing[desc] = progress(
                desc=f"step {names.index(desc) + 1} of {len(names)}: {desc}", **({"total": 0} | options)
            )
        growing[desc].total += total or 0
        growing[desc].refresh()
        return _Part(growing[desc], iterable)

    return bar


class _Part:
    """A part of a growing bar: what is iterated, entered and updated in its place."""

    def __init__(self, bar: Any, iterable: Iterable[Any] | None) -> None:
        self.bar, self.iterable = bar, iterable

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *error: object) -> None:
        """The bar stays for the next part."""

    def update(self, count: int = 1) -> None:
        self.bar.update(count)

    def __iter__(self) -> Iterator[Any]:
        for each in self.iterable or ():
            yield each
            self.bar.update(1)
