"""Which axis of which parameter belongs to heads, KV groups, FFN and hidden channels: found by building."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import UnsupportedModelError
from ..vanilla.family import Layout
from ..vanilla.legality import build_sizes
from ..vanilla.resize import edit_config
from ..vanilla.shape import FFN, HEADS, HIDDEN, KV_GROUPS, SIZES, Shape, SliceRule
from ..vanilla.skeleton import build_empty


def find_axes(layout: Layout, *, hidden: bool = False) -> dict[str, tuple[SliceRule, ...]]:
    """
    The slicing rules of every parameter and persistent buffer that depends on a width.

    The model's class is built on the meta device with one layer, and again with one size changed; what moved depends
    on that size.

    Args:
        layout: the dense model's, with its class and config.
        hidden: also find what depends on the size of the residual stream.

    Returns:
        Rules by parameter name relative to a layer (`"self_attn.q_proj.weight"`); outside of the layers by the name
        with a dot before it (`".model.norm.weight"`).

    Raises:
        UnsupportedModelError: if a dimension is not made of whole units, or of several things in an undeclared order.
    """
    if layout.rules is not None:
        return {
            name: kept
            for name, rules in layout.rules.items()
            if (kept := tuple(rule for rule in rules if hidden or HIDDEN not in rule.segments))
        }
    one_layer = Shape(num_hidden_layers=1).complete(layout.dense)
    plain = _shapes(layout, one_layer)
    axes_of: dict[tuple[str, int], list[str]] = {}
    for axis, changed in _probes(layout, one_layer, hidden):
        for name, shape in _shapes(layout, changed).items():
            for dim, (old, new) in enumerate(zip(plain[name], shape, strict=True)):
                if old != new:
                    axes_of.setdefault((name, dim), []).append(axis)
    rules: dict[str, tuple[SliceRule, ...]] = {}
    prefix = f"{layout.stack}.0."
    for (name, dim), axes in axes_of.items():
        if not name.startswith(prefix) and axes != [HIDDEN]:
            raise UnsupportedModelError(
                f"{name!r} lies outside the layers and depends on {axes}: a family row cannot express that"
            )
        short = name.removeprefix(prefix) if name.startswith(prefix) else f".{name}"
        rules[short] = (*rules.get(short, ()), _rule(layout, short, dim, axes, plain[name][dim]))
    return rules


def _shapes(layout: Layout, shape: Shape) -> dict[str, tuple[int, ...]]:
    config = edit_config(layout, shape, layers=(0,))
    built = build_empty(layout.model_class, config)
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def _probes(layout: Layout, plain: Shape, hidden: bool) -> Iterator[tuple[str, Shape]]:
    """Per axis, the nearest other size that the class builds as asked; an axis that has none is not free."""
    heads, groups, ffn, _ = plain.sizes().values()
    grouped = bool(layout.family.kv_heads_field)
    candidates = {
        HEADS: [Shape(groups * n if grouped else n, groups if grouped else n) for n in range(2 * heads, 0, -1)],
        KV_GROUPS: [Shape(heads, n) for n in range(heads, 0, -1) if heads % n == 0] if grouped else [],
        FFN: [Shape(intermediate_size=size) for size in (2 * ffn, ffn + layout.hidden_size, ffn + 1)],
    }
    if hidden:
        # Where the FFN size is a multiple of the hidden size, the latter must be changed by a factor of that.
        candidates[HIDDEN] = [Shape(hidden_size=size) for size in _multiples(layout.hidden_size, ffn)]
    for axis, shapes in candidates.items():
        for shape in shapes:
            changed = shape.complete(plain)
            if changed != plain and build_sizes(layout, changed) is None:
                yield axis, changed
                break


def _multiples(hidden: int, ffn: int) -> list[int]:
    ratio = max(1, ffn // hidden)
    return [2 * hidden, ratio * hidden, *(hidden // part for part in (2, 3, 5, 7) if hidden % part == 0)]


def _rule(layout: Layout, name: str, dim: int, axes: list[str], size: int) -> SliceRule:
    full = layout.full.to_dict()
    units = {axis.name: full[axis.field] for axis in SIZES}
    declared = dict(layout.family.fused).get(name.rpartition(".")[0])
    if (dim != 0 and axes != [HIDDEN]) or (axes == [HIDDEN] and set(declared or ()) != {HIDDEN}):
        declared = None  # it is about another dimension
    segments = declared or tuple(axes)
    width, rest = divmod(size, sum(units[axis] for axis in segments))
    # Rows of a head are its features, or one entry of a per-head table. Any other width hides several things in one
    # dimension, whose order only the row can tell.
    natural = {HEADS: (1, layout.head_dim), KV_GROUPS: (1, layout.head_dim), FFN: (1,), HIDDEN: (1,)}
    if rest or set(segments) != set(axes) or (not declared and (len(axes) > 1 or width not in natural[axes[0]])):
        raise UnsupportedModelError(
            f"dimension {dim} of {name!r} (size {size}) depends on {axes}, and the order of its rows is not known: "
            f"name {name.rpartition('.')[0]!r} in `fused` of the family row for {layout.model_type!r}"
        )
    return SliceRule(dim=dim, segments=segments, width=width)
