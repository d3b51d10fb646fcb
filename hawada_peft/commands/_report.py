"""`hawada report` as a call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..page.write import WrittenReport


def report(
    slim: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    training: str | os.PathLike[str] | None = None,
    search: str | os.PathLike[str] | None = None,
    peers: str | os.PathLike[str] | None = None,
    pictures: bool = True,
) -> WrittenReport:
    """
    Write a page about a slim model, and its pictures.

    Needs `pip install hawada_peft[report]`.

    Args:
        slim: the slim model's folder.
        output: folder for the page and the pictures; see `write_report`.
        training: folder of the training, for the gates' way through it.
        search: file of the search that `plan` left, where the slim folder knows of none.
        peers: file of other models' measurements.
        pictures: also write the pictures as files.

    Raises:
        HawAdaError, OSError: as `write_report`.
    """
    from ..page.write import write_report

    return write_report(slim, output, training=training, search=search, peers=peers, pictures=pictures)
