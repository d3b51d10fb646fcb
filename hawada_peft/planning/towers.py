"""Plans of models with several towers: which part of a wish, and of a plan, is about which tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import IllegalShapeError, IncompatibleBaseError, InvalidPlanError
from ..gates.reading import UnitScores
from ..vanilla.family import Layout
from ..vanilla.shape import BY_FIELD, BY_NAME, HEAD_DIM, KV_GROUPS, SIZES, Axis, Shape
from .legal import check_plan, legal_plan
from .plan import Plan

Value = TypeVar("Value")

Sizes = Shape | Mapping[str, Any]
"""A `Shape`; or sizes by their paths (`"text_config.intermediate_size"`), or a `Shape` for each tower."""

Ratio = float | Mapping[str, Any]
"""A number, or one for each axis: of every tower (`"ffn"`), or of one (`"text_config.ffn"`, `"text_config"`)."""


def plan_towers(
    layouts: Sequence[Layout],
    scores: Callable[[Layout], UnitScores],
    shape: Sizes | None,
    keep_ratio: Ratio | None,
) -> Plan:
    """
    Rank the units of every tower into one plan; a tower that is not named stays as it is.

    Args:
        layouts: of the towers that are gated.
        scores: gives those of a tower's units.
        shape: as `Sizes` says.
        keep_ratio: as `Ratio` says. With neither, what the gates close goes, in every tower.

    Raises:
        IllegalShapeError: if no vanilla model of the sizes exists.
        InvalidPlanError: if a name is none, or of several things; as `legal_plan`.
    """
    shapes = {} if shape is None else shapes_of(layouts, shape)
    ratios: Mapping[str, Any] = {}
    if shape is None and keep_ratio is not None:
        ratios = _ratios(layouts, keep_ratio)
    everything = shape is None and keep_ratio is None
    parts = []
    for layout in layouts:
        wanted, ratio = shapes.get(layout.tower), ratios.get(layout.tower)
        if everything or wanted is not None or ratio is not None:
            parts.append(legal_plan(layout, scores(layout), wanted, ratio))
        else:
            parts.append(Plan.keep_all(layout.dense, layout.tower))
    for size, sharing in shared_sizes(layouts).items():
        # One number for all of them: the largest that one needs.
        most = max(getattr(parts[each].shape, size) for each in sharing)
        for each in sharing:
            if getattr(parts[each].shape, size) != most:
                wanted = replace(parts[each].shape, **{size: most})
                parts[each] = legal_plan(layouts[each], scores(layouts[each]), wanted, None)
    return Plan.of_towers(parts)


def shared_sizes(layouts: Sequence[Layout]) -> dict[str, list[int]]:
    """The fields of a `Shape` that one number of the config says of several towers: which ones."""
    paths = [paths_of(layout) for layout in layouts]
    places = {path: [each for each, known in enumerate(paths) if path in known] for found in paths for path in found}
    return {paths[each[0]][path].field: each for path, each in places.items() if len(each) > 1}


def each_of(layouts: Sequence[Layout], plan: Plan | None) -> list[tuple[Layout, Plan | None]]:
    """
    Every tower with what a plan says of it; None: nothing, so that all of it stays.

    Raises:
        IncompatibleBaseError: if the plan speaks of a tower that is not there.
    """
    parts = {} if plan is None else {part.tower: part for part in plan.parts}
    if len(layouts) == 1 and len(parts) == 1 and "" in parts:
        return [(layouts[0], plan)]
    found = [(layout, parts.pop(layout.tower, None)) for layout in layouts]
    if parts:
        gated = [layout.tower for layout in layouts]
        names = ", ".join(repr(name) for name in gated) if any(gated) else "the model itself"
        raise IncompatibleBaseError(f"the plan is for the tower {next(iter(parts))!r}, and what is gated is {names}")
    return found


def with_all(layouts: Sequence[Layout], plan: Plan) -> Plan:
    """A plan with those of several towers that it does not speak of, behind its own: they stay as they are."""
    named = {part.tower for part in plan.parts}
    rest = [layout for layout in layouts if layout.tower not in named] if len(layouts) > 1 else []
    return Plan.of_towers([*plan.parts, *(Plan.keep_all(layout.dense, layout.tower) for layout in rest)])


def check_towers(layouts: Sequence[Layout], plan: Plan) -> list[tuple[Layout, Plan]]:
    """
    Check that a plan is one for these towers, and that a vanilla model of it exists.

    Returns:
        The towers that it speaks of, each with its part.

    Raises:
        IncompatibleBaseError, IllegalShapeError: as `check_plan`; as `each_of`.
    """
    every = each_of(layouts, plan)
    found = [(layout, part) for layout, part in every if part is not None]
    for layout, part in found:
        check_plan(layout, part)
    for size, sharing in shared_sizes(layouts).items():
        sizes = {
            every[each][0].tower: getattr((every[each][1] or Plan.keep_all(every[each][0].dense)).shape, size)
            for each in sharing
        }
        if len({*sizes.values()}) > 1:
            raise IllegalShapeError(f"one number of the config is {size} of {list(sizes)}, and the plan has {sizes}")
    return found


def paths_of(layout: Layout) -> dict[str, Axis]:
    """The sizes of a tower by the paths of their fields in the model's config; those that count units."""
    family = layout.family
    fields = {
        "heads": family.heads_field,
        KV_GROUPS: family.kv_heads_field,
        "ffn": "" if family.ffn_unit or family.ffn_channels else family.ffn_field,
        "layers": family.layers_field,
        "hidden": family.hidden_field,
        "experts": family.experts_field if family.router else "",
        HEAD_DIM: family.head_dim_field,
    }
    before = f"{layout.scope}." if layout.scope else ""
    return {f"{before}{field}": BY_NAME[axis] for axis, field in fields.items() if field}


def shapes_of(layouts: Sequence[Layout], sizes: Sizes) -> dict[str, Shape]:
    """
    The sizes that are wanted of each tower that is named.

    Raises:
        InvalidPlanError: if a name is none, or of several things, or one shape is given for several towers.
    """
    if isinstance(sizes, Shape):
        if len(layouts) > 1:
            raise InvalidPlanError(
                f"a Shape is about one tower, and gated are {[each.tower for each in layouts]}: give one for each by "
                f"its name, as {{{layouts[0].tower!r}: Shape(...)}}, or sizes by their paths, as "
                f"{{'{layouts[0].tower}.{SIZES[2].field}': ...}}; or gate one alone, as "
                f"HawAdaConfig(towers=({layouts[0].tower!r},))"
            )
        return {layouts[0].tower: sizes}
    whole = {tower: shape for tower, shape in sizes.items() if isinstance(shape, Shape)}
    towers = [layout.tower for layout in layouts]
    if unknown := sorted(set(whole) - set(towers)):
        raise InvalidPlanError(f"there are no gated towers {unknown}; there are {towers}")
    found: dict[str, dict[str, Any]] = {}
    for name, size in sizes.items():
        if name in whole:
            continue
        for layout, axis in _resolved(layouts, name):
            if axis.field in found.setdefault(layout.tower, {}) or layout.tower in whole:
                raise InvalidPlanError(
                    f"{name!r} says again what the size of {axis.plural} in {layout.tower!r} is to be"
                )
            found[layout.tower][axis.field] = size
    return {**whole, **{tower: Shape(**each) for tower, each in found.items()}}


def _ratios(layouts: Sequence[Layout], keep_ratio: Ratio) -> dict[str, Any]:
    if not isinstance(keep_ratio, Mapping):
        return {layout.tower: keep_ratio for layout in layouts}
    towers = {layout.tower for layout in layouts}
    common = {name: ratio for name, ratio in keep_ratio.items() if name in BY_NAME}
    found: dict[str, Any] = {tower: dict(common) for tower in towers} if common else {}
    for name, ratio in keep_ratio.items():
        if name in common:
            continue
        if name in towers and name:
            found[name] = found[name] | _by_axis(ratio) if name in found else ratio
            continue
        if len(layouts) == 1 and "." not in str(name):  # `legal_plan` says which axes there are
            found.setdefault(layouts[0].tower, {})[name] = ratio
            continue
        for layout, axis in _resolved(layouts, name):
            found.setdefault(layout.tower, {})[axis.name] = ratio
    return found or {layouts[0].tower: keep_ratio}


def _by_axis(ratio: Any) -> dict[str, Any]:
    return dict(ratio) if isinstance(ratio, Mapping) else {"heads": ratio, "ffn": ratio}


def _resolved(layouts: Sequence[Layout], name: Any) -> list[tuple[Layout, Axis]]:
    """
    The tower and the axis of a name: a path of a config's field; a tower's name before that of an axis. Several towers
    where the field is of all of them.
    """
    found: list[tuple[Layout, Axis]] = []
    for layout in layouts:
        before = f"{layout.tower}." if layout.tower else ""
        short = str(name).removeprefix(before) if str(name).startswith(before) else ""
        axis = BY_NAME.get(short) or BY_FIELD.get(short) or paths_of(layout).get(str(name))
        if axis is None and len(layouts) == 1:
            axis = BY_NAME.get(str(name)) or BY_FIELD.get(str(name))
        found += [] if axis is None else [(layout, axis)]
    shared = len(found) > 1 and all(str(name) in paths_of(layout) for layout, _ in found)
    if len(found) != 1 and not shared:
        known = sorted({f"{layout.tower}.{axis.name}".lstrip(".") for layout in layouts for axis in SIZES})
        paths = sorted({path for layout in layouts for path in paths_of(layout)})
        wrong = "names sizes of several towers" if found else "names no size"
        raise InvalidPlanError(f"{name!r} {wrong}; names are paths of config fields ({paths}), or of axes ({known})")
    return found
