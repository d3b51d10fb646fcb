"""Plans of which vanilla models exist: made so, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..errors import InvalidPlanError
from ..gates.reading import UnitScores
from ..vanilla.family import Layout
from ..vanilla.legality import check_layers, check_legal, fit_hidden, legal_head_shapes
from ..vanilla.shape import Shape
from .further import SIZES
from .plan import Plan
from .ranking import rank
from .reasons import explained
from .sizes import hidden_multiple, open_shape, ratio_shape


def legal_plan(
    layout: Layout, scores: UnitScores, shape: Shape | None, keep_ratio: float | Mapping[str, float] | None
) -> Plan:
    """
    Rank a model's units into a plan.

    Args:
        layout: the dense model's.
        scores: of its units.
        shape: the sizes; what it leaves out stays. None: the legal ones nearest to those of the ratio, or, without
            one, with room for all gates that are open.
        keep_ratio: as in `HawAdaModel.plan`; not with a shape.

    Raises:
        IllegalShapeError: if no vanilla model of the shape exists.
        InvalidPlanError: if something is to be cut that has no gates.
    """
    given = shape is not None
    if shape is None:
        legal = legal_head_shapes(layout)
        if keep_ratio is None:
            shape = open_shape(layout, scores, legal)
        else:
            shape = ratio_shape(layout, keep_ratio, legal, scores.group_size)
        if shape.hidden_size is not None:
            step = hidden_multiple(layout, scores.hidden_group)
            shape = fit_hidden(layout, shape, step=step, at_least=keep_ratio is None)
    shape = layout.complete(shape)
    check_legal(layout, shape)
    plan = rank(layout, scores, shape)
    if given:
        return plan
    return dataclasses.replace(plan, roundings=explained(layout, scores, shape, keep_ratio))


def check_plan(layout: Layout, plan: Plan) -> None:
    """
    Check that a plan is one for this model, and that a vanilla model of it exists.

    Raises:
        IncompatibleBaseError: if the plan is for a model of other sizes.
        IllegalShapeError: if there is no vanilla model of its shape, or a backbone loses a stage.
        InvalidPlanError: if it does not say which units stay at a module beside the ends of the layers, or says that
            other ones stay where a table holds those of several layers.
    """
    plan.check_base(layout.full)
    check_legal(layout, plan.shape)
    check_layers(layout, plan.layers)
    dense, slim = layout.dense.sizes(), plan.shape.sizes()
    for axis, names in layout.further.items():
        inside = {name: layout.within(name) or (-1, "") for name in names}
        stay = [name for name, (layer, _) in inside.items() if layer < 0 or layer in plan.layers]
        said = {each.module for each in plan.further if each.axis == axis}
        if slim[SIZES[axis]] < dense[SIZES[axis]] and (missing := [name for name in stay if name not in said]):
            raise InvalidPlanError(
                f"{SIZES[axis]} is {slim[SIZES[axis]]} at {missing[0]} too, and the plan does not say which of its "
                f"{dense[SIZES[axis]]} stay: make it with `model.plan`"
            )
    for axis, groups in (layout.facts.alike if layout.facts is not None else {}).items():
        for group in groups:
            kept = {name: _kept_at(layout, plan, axis, name) for name in group}
            if len({units for units in kept.values() if units is not None}) > 1:
                raise InvalidPlanError(
                    f"{axis} at {group[0]} and {group[-1]} must be the same, a table holds them: {kept[group[0]]} and "
                    f"{kept[group[-1]]}; make the plan with `model.plan`"
                )


def _kept_at(layout: Layout, plan: Plan, axis: str, name: str) -> tuple[int, ...] | None:
    """The units that stay at a module; None if its layer goes, or all stay."""
    position = layout.position(name)
    return plan.at(axis, name) if position is None else plan.kept(axis, position[0])
