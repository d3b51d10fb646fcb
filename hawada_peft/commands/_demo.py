"""`hawada demo` as a call."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..progress import Progress

if TYPE_CHECKING:
    from ..demo.table import Row


@dataclass(frozen=True)
class DemoResult:
    """
    What the demo found.

    Args:
        rows (`tuple`): per model dense, masked and slim.
    """

    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        from ..demo.table import render

        return render(self.rows)


def demo(
    output: str | os.PathLike[str] = "demo-output", *, quick: bool = False, progress: Progress | None = None
) -> DemoResult:
    """
    Train two small teachers on real data, slim them, and measure what came out.

    Needs `pip install hawada_peft[examples]`.

    Args:
        output: folder for teachers, adapters and slim models; those of an earlier demo are replaced.
        quick: a shorter training: under a minute on two cores.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        FileExistsError: if the folder holds something else under the demo's names.
        subprocess.CalledProcessError: if the exporting process fails.
    """
    from ..demo.pipeline import run_demo

    return DemoResult(tuple(run_demo(os.fspath(output), quick=quick, progress=progress)))
