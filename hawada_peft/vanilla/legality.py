"""
Which sizes exist as vanilla models: asked of the config class and of what the model class builds from it.

Long because widths and depth are asked in the same way, and tell what is possible instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..errors import IllegalShapeError
from .family import Layout, hidden_home, relocate
from .resize import edit_config
from .shape import HEAD_DIM, HEADS, LAYERS, SIZES, Shape
from .skeleton import build_empty, check_constructor

MOST_REASONS = 3
"""Of one kind, in a message."""

Tensors = dict[str, tuple[int, ...]]
"""Shapes by name."""


@dataclass(frozen=True)
class Depth:
    """
    Which layers may go, and what goes with one.

    Args:
        pinned: the layers that must stay, each with the reason.
        rows: tensors outside of the layers that hold a stretch for each of them, by name: along which dimension, and
            how long a stretch is.
    """

    pinned: Mapping[int, str]
    rows: Mapping[str, tuple[int, int]]


def build_sizes(layout: Layout, shape: Shape) -> str | None:
    """
    Ask whether a vanilla model of these widths exists, by building one layer of it on the meta device.

    Returns:
        `None` if it does; otherwise the reason why not.

    Raises:
        UnsupportedModelError: if the class cannot be built from a config alone.
    """
    check_constructor(layout.model_class)
    if layout.known is not None:
        return _unknown_size(layout, shape)
    return layout.once(("sizes", shape), lambda: _build_sizes(layout, shape))


def _build_sizes(layout: Layout, shape: Shape) -> str | None:
    wanted = Shape(num_hidden_layers=1).complete(shape)
    hidden = shape.hidden_size or layout.hidden_size
    try:
        config = edit_config(layout, wanted, layers=(0,))
        built = relocate(layout, build_empty(layout.model_class, config))
    except (StrictDataclassError, ValueError, TypeError) as error:
        # The last line holds the cause; those before it name transformers' validator.
        return f"{type(layout.tower_config).__name__} refuses: {str(error).strip().splitlines()[-1].strip()}"
    experts, features = shape.num_experts or layout.num_experts, shape.head_dim or layout.head_dim
    if built.full != replace(wanted, hidden_size=hidden, num_experts=experts, head_dim=features):
        found = built.dense if shape.hidden_size is None and built.hidden_size == hidden else built.full
        return (
            f"{layout.model_class.__name__} builds {found.to_dict()} with heads of {built.head_dim} features when "
            f"asked for {wanted.to_dict()} with heads of {features}"
        )
    return None


def _unknown_size(layout: Layout, shape: Shape) -> str | None:
    """Which of a shape's widths is none of those that were found to be built."""
    sizes, full = shape.complete(layout.full).to_dict(), layout.full.to_dict()
    known = {} if layout.facts is None else layout.facts.sizes
    per_group = shape.complete(layout.dense).heads_per_group
    # Within kept KV groups, heads are counted as if all groups stayed.
    asked = {axis.name: sizes.get(axis.field) for axis in SIZES if axis.name not in (LAYERS, HEAD_DIM)}
    asked[HEADS] = per_group * full["num_key_value_heads"]
    if layout.family.heads_follow:
        hidden = shape.hidden_size or layout.hidden_size
        if shape.complete(layout.full).sizes()["num_attention_heads"] * layout.head_dim != hidden:
            return (
                f"{layout.model_class.__name__} derives the size of a head from both numbers: heads of "
                f"{layout.head_dim} features are as many as {hidden} channels of the residual stream have room for, "
                f"{hidden / layout.head_dim:g}"
            )
    if shape.head_dim not in (None, layout.head_dim):
        found = layout.once(("heads of", shape.head_dim), lambda: _head_size(layout, shape))
        if found != shape.head_dim:
            return f"{layout.model_class.__name__} builds heads of {found} features when asked for {shape.head_dim}"
    for axis in SIZES:
        name, size = axis.name, asked.get(axis.name)
        if size is None or size == full[axis.field] or size in known.get(name, ()):
            continue
        return f"{layout.model_class.__name__} was not found to build {size} of {full[axis.field]} {axis.plural}"
    return None


def _head_size(layout: Layout, shape: Shape) -> int | None:
    """The features of each head in what a class builds of a size of these; None if it refuses."""
    try:
        config = edit_config(layout, replace(layout.dense, head_dim=shape.head_dim))
        return relocate(layout, build_empty(layout.model_class, config)).head_dim
    except (StrictDataclassError, ValueError, TypeError):
        return None


def depth_of(layout: Layout) -> Depth:
    """
    Ask which layers may go, by building the model without one of them on the meta device: what is left must be the
    layers that stay, each as it was. Neighbours that hold the same tensors are asked once.

    Raises:
        UnsupportedModelError: if the class cannot be built from a config alone.
    """
    if layout.facts is not None:
        return Depth(layout.facts.pinned, layout.facts.per_layer)
    return layout.once("depth", lambda: _depth(layout))


def _depth(layout: Layout) -> Depth:
    total = layout.dense.sizes()["num_hidden_layers"]
    outside, inside = _by_layer(layout, tuple(range(total)))
    pinned: dict[int, str] = {}
    rows: dict[str, tuple[int, int]] = {}
    first = 0
    while first < total:
        end = next((i for i in range(first, total) if inside[i] != inside[first]), total)
        alone = {start for start, stop in layout.stages if stop - start == 1}  # its stage would fall together
        tried = next((layer for layer in range(first, end) if layer not in alone), first)
        reason, found = ("it is the only layer", rows) if total == 1 else _without(layout, tried, outside, inside)
        pinned |= {} if reason is None else dict.fromkeys(range(first, end), reason)
        rows |= found
        first = end
    return Depth(pinned | dict(layout.family.pinned), rows)


def _without(
    layout: Layout, gone: int, outside: Tensors, inside: list[Tensors]
) -> tuple[str | None, dict[str, tuple[int, int]]]:
    """Why a layer cannot go, or None; and what else is cut with it."""
    kept = tuple(layer for layer in range(len(inside)) if layer != gone)
    rows: dict[str, tuple[int, int]] = {}
    try:
        rest, layers = _by_layer(layout, kept)
    except (StrictDataclassError, ValueError, TypeError, IndexError) as error:
        return f"{type(layout.config).__name__} refuses: {str(error).strip().splitlines()[-1].strip()}", rows
    for layer, mine, built in zip(kept, [inside[layer] for layer in kept], layers, strict=True):
        if mine != built:
            differing = min(name for name in {*mine, *built} if mine.get(name) != built.get(name))
            return (
                f"without it {layout.model_class.__name__} builds another layer where layer {layer} comes then: "
                f"{differing} would be {built.get(differing, 'missing')}, and is {mine.get(differing, 'missing')}",
                rows,
            )
    for name in {*outside, *rest}:
        old, new = outside.get(name, ()), rest.get(name, ())
        moved = [dim for dim in range(len(old)) if len(old) == len(new) and old[dim] != new[dim]]
        width = old[moved[0]] // len(inside) if len(moved) == 1 else 0
        if width and (old[moved[0]], new[moved[0]]) == (len(inside) * width, len(kept) * width):
            rows[name] = (moved[0], width)
        elif old != new:
            return f"{name} {old} outside of the layers would be {new or 'missing'}, and holds no row per layer", rows
    return None, rows


def _by_layer(layout: Layout, layers: tuple[int, ...]) -> tuple[Tensors, list[Tensors]]:
    """What the class builds with some of the layers: the shapes outside of them, and those of each, by name."""
    shape = replace(layout.dense, num_hidden_layers=len(layers))
    every = len(layers) == layout.dense.num_hidden_layers
    tensors = tensors_of(layout) if every else _tensors(layout, edit_config(layout, shape, layers=layers))
    outside: Tensors = {}
    inside: list[Tensors] = [{} for _ in layers]
    for name, each in tensors.items():
        index, _, short = name.removeprefix(f"{layout.stack}.").partition(".")
        if name.startswith(f"{layout.stack}.") and index.isdigit() and int(index) < len(layers):
            inside[int(index)][short] = each
        else:
            outside[name] = each
    return outside, inside


def tensors_of(layout: Layout) -> Tensors:
    """The shapes of all tensors that the class builds from the dense model's config, by name."""
    return layout.once("tensors", lambda: _tensors(layout, layout.config))


def _tensors(layout: Layout, config: PreTrainedConfig) -> Tensors:
    built = build_empty(layout.model_class, config)
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def least_layers(layout: Layout) -> int:
    """The fewest layers that can stay: those that must, and one before each stage of a backbone."""
    pinned = depth_of(layout).pinned
    return max(1, len(pinned) + sum(not pinned.keys() & range(start, end) for start, end in layout.stages))


def fit_hidden(layout: Layout, shape: Shape, *, step: int, at_least: bool = False) -> Shape:
    """
    The legal shape nearest to one whose `hidden_size` need not be legal.

    Where the FFN size is a multiple of the hidden size it is rounded to one, without exceeding the dense one.

    Args:
        layout: the dense model's, with its class and config.
        shape: the sizes wished for, complete.
        step: hidden sizes are multiples of it, or the dense one.
        at_least: take no smaller hidden size than the one wished for.
    """
    wish, ffn = shape.hidden_size or layout.hidden_size, shape.sizes()["intermediate_size"]
    sizes = {*range(step, layout.hidden_size, step), layout.hidden_size}
    for size in sorted(sizes, key=lambda size: (abs(size - wish), -size)):
        if at_least and size < wish:
            continue
        candidate = layout.with_heads(replace(shape, hidden_size=size))
        if layout.family.ffn_unit == "hidden_size":
            most = layout.dense.sizes()["intermediate_size"] // size
            candidate = replace(candidate, intermediate_size=size * max(1, min(most, round(ffn / size))))
        if build_sizes(layout, candidate) is None:
            return candidate
    return replace(shape, hidden_size=None)


def head_shapes(dense: Shape) -> list[Shape]:
    """Every (query heads, KV groups) with the same number of query heads in each kept group, most heads first."""
    groups, per_group = dense.sizes()["num_key_value_heads"], dense.heads_per_group
    pairs = {(g * r, g) for g in range(1, groups + 1) for r in range(1, per_group + 1)}
    return [Shape(num_attention_heads=h, num_key_value_heads=g) for h, g in sorted(pairs, reverse=True)]


def legal_head_shapes(layout: Layout, hidden_size: int | None = None) -> list[Shape]:
    """The (query heads, KV groups) of `head_shapes` that the model's class builds as asked (at a hidden size)."""
    dense = layout.narrowed(hidden_size)
    return [shape for shape in head_shapes(layout.dense) if build_sizes(layout, shape.complete(dense)) is None]


def check_legal(layout: Layout, shape: Shape) -> None:
    """
    Check that a vanilla model of this shape exists.

    Args:
        layout: the dense model's, with its class and config.
        shape: the sizes wanted, complete.

    Raises:
        IllegalShapeError: with every problem, and the sizes that are possible instead.
        UnsupportedModelError: if the residual stream of this family cannot be cut.
    """
    if shape.hidden_size not in (None, layout.hidden_size):
        hidden_home(layout)
    dense, sizes = layout.full.to_dict(), layout.full.to_dict() | shape.to_dict()
    if shape.num_experts is not None:
        check_experts(layout, shape.num_experts)
    problems = [f"{name} {sizes[name]} exceeds {dense[name]}" for name in dense if sizes[name] > dense[name]]
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if not problems and Shape(heads, groups) not in head_shapes(layout.dense):
        problems.append(
            f"{heads} query heads in {groups} KV groups: every group must keep the same number of heads, at most "
            f"{layout.dense.heads_per_group}"
        )
    if sizes["num_hidden_layers"] < dense["num_hidden_layers"] and sizes["num_hidden_layers"] < least_layers(layout):
        reasons = [f"layer {layer} stays: {reason}" for layer, reason in sorted(depth_of(layout).pinned.items())]
        if layout.stages:
            reasons.append(
                "a layer stays before each stage whose feature map the backbone gives (out_indices "
                f"{list(layout.tower_config.out_indices)})"
            )
        problems.append(
            f"num_hidden_layers must be at least {least_layers(layout)}, got {sizes['num_hidden_layers']}; "
            + "; ".join(reasons[:MOST_REASONS])
        )
    if not problems and shape != layout.dense:
        reason = build_sizes(layout, shape)
        problems += [reason] if reason else []
    if not problems:
        return
    widths = asdict(shape) | {"num_attention_heads": None, "num_key_value_heads": None, "num_hidden_layers": None}
    if build_sizes(layout, Shape(**widths).complete(layout.dense)) is None:
        possible = ", ".join(_pairs(legal_head_shapes(layout, shape.hidden_size)))
        problems.append(f"possible (query heads, KV groups) in {layout.model_class.__name__}: {possible}")
    elif shape.hidden_size is not None and sizes["hidden_size"] <= dense["hidden_size"]:
        nearest = fit_hidden(layout, shape, step=1)
        problems.append(f"nearest that {layout.model_class.__name__} builds: {nearest.to_dict()}")
    elif layout.family.ffn_unit:
        unit = getattr(layout.tower_config, layout.family.ffn_unit)
        problems.append(f"possible intermediate_size: multiples of {layout.family.ffn_unit} = {unit}")
    raise IllegalShapeError(f"no vanilla model of the shape {shape.to_dict()}:\n" + "\n".join(problems))


def check_experts(layout: Layout, count: int) -> None:
    """
    Check that a token still finds as many experts as are chosen for it.

    Raises:
        IllegalShapeError: if not, or if the model has no experts.
    """
    if not layout.num_experts:
        raise IllegalShapeError(
            f"num_experts {count}: the family row of model_type={layout.model_type!r} names no router, so there are "
            "no experts to choose from; leave it out"
        )
    least = least_experts(layout)
    if not least <= count <= layout.num_experts:
        raise IllegalShapeError(
            f"num_experts must be {least} (which {layout.family.chosen_field} says are chosen for a token) to "
            f"{layout.num_experts}, got {count}"
        )


def least_experts(layout: Layout) -> int:
    """The fewest experts that can stay: as many as are chosen for a token."""
    return int(getattr(layout.tower_config, layout.family.chosen_field)) if layout.num_experts else 0


def check_layers(layout: Layout, layers: Iterable[int]) -> None:
    """
    Check that the layers that must stay do, and that a backbone keeps as many feature maps as it has: a layer before
    each of its stages.

    Args:
        layout: the dense model's.
        layers: those that stay.

    Raises:
        IllegalShapeError: naming the layers, or the stages that would fall together.
    """
    kept = set(layers)
    if len(kept) == layout.dense.num_hidden_layers:
        return
    gone = [f"layer {layer}: {why}" for layer, why in sorted(depth_of(layout).pinned.items()) if layer not in kept]
    if gone:
        raise IllegalShapeError(f"these layers must stay: {'; '.join(gone[:MOST_REASONS])}")
    empty = [(start, end) for start, end in layout.stages if kept.isdisjoint(range(start, end))]
    if empty:
        raise IllegalShapeError(
            f"the backbone gives a feature map after each of the layers {[end for _, end in layout.stages]}; without "
            f"any of the layers {', '.join(f'{start} to {end - 1}' for start, end in empty)} two of them would be the "
            "same. Keep one layer before each stage, as `model.plan` does"
        )


def _pairs(shapes: Iterable[Shape]) -> list[str]:
    return [f"({shape.num_attention_heads}, {shape.num_key_value_heads})" for shape in shapes]
