"""What each layer is worth, as a picture and a section: why those layers went and not others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .drawing import COLOURS, Picture, legend, picture_of, wide_scale
from .known import SlimFacts
from .parts import Part, figure, folded, number, table, text


def dropped_picture(facts: SlimFacts) -> Picture | None:
    """The loss without each layer alone, and the loss as one layer goes after the other."""
    depth = facts.depth
    if depth is None:
        return None
    alone, together, gone = dict(depth["alone"]), depth["together"], facts.dropped

    def draw(figure: Any) -> None:
        single, all_of_them = figure.subplots(2, 1)
        for layers, colour, label in (
            ([layer for layer in alone if layer not in gone], "first", "kept"),
            ([layer for layer in alone if layer in gone], "second", "dropped"),
        ):
            if layers:
                heights = [alone[layer] for layer in layers]
                single.bar(layers, heights, color=COLOURS[colour], width=0.75, label=label)
        wide_scale(single, list(alone.values()))
        single.set_xlabel("dense layer, dropped alone")
        single.xaxis.get_major_locator().set_params(integer=True)
        single.set_ylabel("loss")
        legend(figure, single)
        counts = list(range(1, len(together) + 1))
        all_of_them.plot(counts, together, "o-", color=COLOURS["muted"], markersize=4, linewidth=1)
        every = max(1, -(-len(counts) // 24))
        for count, layer, loss in list(zip(counts, depth["order"], together, strict=True))[::every]:
            all_of_them.annotate(
                str(layer), (count, loss), (0, 5), textcoords="offset points", ha="center", fontsize=8,
                color=COLOURS["second" if layer in gone else "muted"],
            )  # fmt: skip
        wide_scale(all_of_them, together)
        all_of_them.margins(y=0.18)
        all_of_them.xaxis.get_major_locator().set_params(integer=True)
        all_of_them.set_xlabel("layers dropped; at the points: which one goes")
        all_of_them.set_ylabel("loss")

    cheap, dear = min(alone, key=alone.__getitem__), max(alone, key=alone.__getitem__)
    said = (
        f"Loss without each of {len(alone)} layers alone: least {alone[cheap]:.3g} without layer {cheap}, most "
        f"{alone[dear]:.3g} without layer {dear}. In the order of dropping: {', '.join(map(str, depth['order']))}."
    )
    return picture_of("dropped", said, draw, 4.6)


def dropped_section(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """Which layer costs what, and in which order they were tried."""
    depth = facts.depth
    if depth is None:
        return
    yield text(
        "Each layer was closed by itself, and the cheapest went; those that remained were judged anew before each "
        "further one. Loss: divergence from the dense model on the calibration batches, gates closed, nothing "
        "refitted."
    )
    if "dropped" in pictures:
        yield figure(pictures["dropped"], pictures["dropped"].text)
    alone, gone = dict(depth["alone"]), facts.dropped
    tried = zip(depth["order"], depth["together"], strict=True)
    steps = {layer: (place, loss) for place, (layer, loss) in enumerate(tried, 1)}
    rows = [
        (
            f"layer {layer}",
            number(loss),
            number(steps[layer][0] if layer in steps else None, "d"),
            number(steps[layer][1] if layer in steps else None),
            "dropped" if layer in gone else "kept",
        )
        for layer, loss in alone.items()
    ]
    yield folded(
        f"{len(rows)} layers in numbers",
        table(
            "The loss without a layer alone; when it went as one went after the other, and the loss then.",
            ("layer", "loss alone", "went as", "loss together", ""),
            rows,
        ),
    )
