"""Which axis of which parameter belongs to heads, KV groups, FFN, layers and hidden channels: found by building."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..vanilla.family import Layout
from ..vanilla.legality import build_sizes, depth_of
from ..vanilla.resize import edit_config
from ..vanilla.shape import EXPERTS, FFN, HEADS, HIDDEN, KV_GROUPS, LAYERS, SIZES, Shape, SliceRule
from ..vanilla.skeleton import build_empty


def find_axes(
    layout: Layout, *, hidden: bool = False, cut: Collection[str] = (HEADS, KV_GROUPS, FFN, EXPERTS)
) -> dict[str, tuple[SliceRule, ...]]:
    """
    The slicing rules of every parameter and persistent buffer that depends on a width, or holds a stretch per layer.

    The model's class is built on the meta device with one layer, and again with one size changed; what moved depends
    on that size.

    Args:
        layout: the dense model's, with its class and config.
        hidden: also find what depends on the size of the residual stream.
        cut: the axes that are to be cut: what is not known of others is no matter.

    Returns:
        Rules by parameter name relative to a layer (`"self_attn.q_proj.weight"`); outside of the layers by the name
        with a dot before it (`".model.norm.weight"`).

    Raises:
        UnsupportedModelError: if a dimension is not made of whole units, or of several things in an undeclared order.
    """
    if layout.facts is not None:
        others = tuple(f"{stack}." for stack in layout.beside)
        found = {
            name: tuple(
                rule
                for rule in each
                if (hidden or HIDDEN not in rule.segments) and not (rule.place and rule.place.startswith(others))
            )
            for name, each in layout.facts.rules.items()
        }
        return {name: each for name, each in found.items() if each}
    rules, problems = layout.once(("axes", hidden), lambda: _find_axes(layout, hidden))
    wanted = {*cut, HIDDEN} if hidden else {*cut}
    for axes, problem in problems:
        if wanted & axes:
            raise UnsupportedModelError(problem)
    return rules


Problems = list[tuple[set[str], str]]
"""What is not known: of which axes, and what."""


def _find_axes(layout: Layout, hidden: bool) -> tuple[dict[str, tuple[SliceRule, ...]], Problems]:
    one_layer = Shape(num_hidden_layers=1).complete(layout.dense)
    plain = _shapes(layout, one_layer)
    axes_of: dict[tuple[str, int], list[str]] = {}
    for axis, changed in _probes(layout, one_layer, hidden):
        for name, shape in _shapes(layout, changed).items():
            for dim, (old, new) in enumerate(zip(plain[name], shape, strict=True)):
                if old != new:
                    axes_of.setdefault((name, dim), []).append(axis)
    rules: dict[str, tuple[SliceRule, ...]] = {}
    problems: Problems = []
    prefix = f"{layout.stack}.0."
    for (name, dim), axes in axes_of.items():
        short = name.removeprefix(prefix) if name.startswith(prefix) else f".{name}"
        try:
            if not name.startswith(prefix) and axes != [HIDDEN]:
                raise UnsupportedModelError(
                    f"{name!r} lies outside the layers and depends on {axes}: a family row cannot express that"
                )
            rule = _rule(layout, short, dim, axes, plain[name][dim])
        except UnsupportedModelError as error:
            problems.append((set(axes), str(error)))
            continue
        rules[short] = (*rules.get(short, ()), rule)
    for name, (dim, width) in depth_of(layout).rows.items():
        rules[f".{name}"] = (*rules.get(f".{name}", ()), SliceRule(dim, (LAYERS,), width))
    return rules, problems


def cut_by(plan: Plan) -> set[str]:
    """The axes of which a plan removes units in the layers that stay, for `find_axes`."""
    slim, dense = plan.shape, plan.dense
    heads = (slim.num_attention_heads, slim.num_key_value_heads, slim.head_dim) != (
        dense.num_attention_heads,
        dense.num_key_value_heads,
        dense.head_dim,
    )
    cut = {HEADS, KV_GROUPS} if heads else set()
    cut |= {FFN} if slim.intermediate_size != dense.intermediate_size else set()
    return cut | ({EXPERTS} if plan.experts is not None else set())


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
        EXPERTS: [Shape(num_experts=layout.num_experts * 2)] if layout.num_experts else [],
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
    units = {axis.name: full[axis.field] for axis in SIZES if axis.field in full}
    fused = dict(layout.family.fused)
    declared = fused.get(name.rpartition(".")[0])
    if name in fused:
        declared = fused[name] if {*axes} == {*fused[name]} else None
    elif (dim != 0 and axes != [HIDDEN]) or (axes == [HIDDEN] and set(declared or ()) != {HIDDEN}):
        declared = None  # it is about another dimension
    segments = declared or tuple(axes)
    width, rest = divmod(size, sum(units[axis] for axis in segments))
    # Rows of a head are its features, or one entry of a per-head table. Any other width hides several things in one
    # dimension, whose order only the row can tell.
    natural = {HEADS: (1, layout.head_dim), KV_GROUPS: (1, layout.head_dim), FFN: (1,), HIDDEN: (1,), EXPERTS: (1,)}
    if rest or set(segments) != set(axes) or (not declared and (len(axes) > 1 or width not in natural[axes[0]])):
        raise UnsupportedModelError(
            f"dimension {dim} of {name!r} (size {size}) depends on {axes}, and the order of its rows is not known: "
            f"name {name.rpartition('.')[0]!r} in `fused` of the family row for {layout.model_type!r}"
        )
    return SliceRule(dim=dim, segments=segments, width=width)
