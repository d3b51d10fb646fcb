"""Colours: one set of names, its values in light and in dark, and pictures that follow the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "line": "#d0d7de",
    "box": "#f6f8fa",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#009e73",
    "fourth": "#b5508c",
}
DARK = {
    "paper": "#14181d",
    "ink": "#e6edf3",
    "muted": "#9aa5b1",
    "line": "#3a424c",
    "box": "#1c2128",
    "first": "#56b4e9",
    "second": "#f0a35e",
    "third": "#38c79a",
    "fourth": "#e08fc0",
}
"""After Okabe and Ito, "Color Universal Design" (2008): told apart with any kind of colour vision."""

NAMED = {name: f"#0101{number:02x}" for number, name in enumerate(LIGHT, 1)}
"""Colours that no picture has: they stand for the names while a picture is drawn."""


def follow_page(svg: str, prefix: str, text: str) -> str:
    """
    A picture for inside a page: its colours are the page's variables, its ids do not meet those of other pictures.

    Args:
        svg: as matplotlib writes it, drawn in `NAMED` and `mixed`.
        prefix: of its ids.
        text: what it shows.
    """
    svg = svg[svg.index("<svg") :]
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(text)}"', 1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # of everything on the page; it has that of its own
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\sid="|url\(#|\shref="#)', rf"\g<1>{prefix}-", svg)
    for name, colour in NAMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"#0102([0-9a-f]{2})", lambda found: _mix_of_page(int(found[1], 16)), svg)


def mixed(part: float, colours: Mapping[str, str]) -> str:
    """
    Between the first and the second colour.

    Args:
        part: of the second, in [0, 1].
        colours: `LIGHT`, `DARK` or `NAMED`.
    """
    if colours is NAMED:
        return f"#0102{round(100 * part):02x}"
    ends = [[int(colours[name][i : i + 2], 16) for i in (1, 3, 5)] for name in ("first", "second")]
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def _mix_of_page(percent: int) -> str:
    return f"color-mix(in srgb, var(--second) {percent}%, var(--first))"
