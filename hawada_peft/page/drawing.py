"""How a picture is made: as SVG for the page, and as a PNG file, in light colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HawAdaError

WIDTH = 4.8
"""Inches: with text of 10 points this can be read on a phone, where it is as wide as the screen."""

COLOURS = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "line": "#d0d7de",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#009e73",
    "fourth": "#cc79a7",
    "fifth": "#e69f00",
}
"""After Okabe and Ito, "Color Universal Design" (2008): told apart with any kind of colour vision."""


@dataclass(frozen=True)
class Picture:
    """
    A picture of the page.

    Args:
        name (`str`): of its file, without the ending.
        text (`str`): what it shows, for those who do not see it.
        svg (`bytes`): for the page.
        png (`bytes`): for a file.
    """

    name: str
    text: str
    svg: bytes
    png: bytes

    @property
    def source(self) -> str:
        """The SVG as an address: the page needs no other file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def picture_of(name: str, text: str, draw: Callable[[Any], None], height: float) -> Picture:
    """
    A picture, drawn once for the page and for a file.

    Args:
        name: of its file, without the ending.
        text: what it shows, for those who do not see it.
        draw: draws it into a matplotlib figure.
        height: inches.

    Raises:
        HawAdaError: if matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise HawAdaError(
            "pictures need matplotlib: pip install 'hawada_peft[report]', or leave them out (pictures=False)"
        ) from None
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # names may hold dollars
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), COLOURS["ink"]),
        **dict.fromkeys(("xtick.color", "ytick.color"), COLOURS["muted"]),
        "axes.edgecolor": COLOURS["line"],
        "figure.facecolor": COLOURS["paper"],
    }
    files: dict[str, bytes] = {}
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        for ending in ("svg", "png"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=160, metadata={"Date": None} if ending == "svg" else None)
            files[ending] = buffer.getvalue()
    return Picture(name, text, files["svg"], files["png"])


FAR = 30
"""Values that are so many times apart are drawn on a logarithmic axis."""


def wide_scale(axes: Any, values: Sequence[float]) -> bool:
    """A logarithmic axis for losses that are far apart, linear near 0. Returns whether it is one."""
    above = [value for value in values if value > 0]
    if not above or max(above) / min(above) <= FAR:
        return False
    axes.set_yscale("symlog", linthresh=min(above))
    axes.yaxis.set_major_formatter("{x:g}")  # the scale's own writes formulas, which are left as text here
    return True


def legend(figure: Any, axes: Any, columns: int = 3) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9, labelcolor=COLOURS["ink"],
        borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip


def write_pngs(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write the PNG files into a folder that exists. Returns their paths."""
    paths = []
    for picture in pictures:
        paths.append(folder / f"{picture.name}.png")
        paths[-1].write_bytes(picture.png)
    return paths
