"""Budgets asked for and met, and the time that table and search take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from budget_search import FRACTIONS, StretchedQuality, answer, pass_seconds
from latency_cases import parse_case
from transformers import PreTrainedModel

from hawada_peft.errors import InfeasibleBudgetError
from hawada_peft.latency.budget import LatencyBudget
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.table import LatencyTable
from hawada_peft.search.space import SearchSpace, search_space
from hawada_peft.search.timed import Timer, measure_table
from hawada_peft.vanilla.family import locate

from .presets import Preset
from .rows import Row, Rows

ANCESTOR_FRACTION = 0.6
"""Of the dense latency: what the ancestor project asked for."""

ILLUSTRATION = {
    axis: [weight * (1 - part) ** 2 for part in FRACTIONS]
    for axis, weight in (("heads", 1.0), ("ffn", 2.0), ("layers", 3.0))
}
"""Losses that stand in for measured ones: each axis costs the square of the part that is cut, times its share of a
layer's weights (attention 1, FFN 2, a whole layer 3). Nothing was measured for them; the shapes that they lead to
illustrate."""


@dataclass(frozen=True)
class Curves:
    """Which losses the search goes by: a small teacher's, from a file of `budget_search.py`, or the illustration."""

    path: str = ""

    @cached_property
    def quality(self) -> StretchedQuality:
        return StretchedQuality(json.loads(Path(self.path).read_text(encoding="utf-8")) if self.path else ILLUSTRATION)

    def __str__(self) -> str:
        return f"a small teacher's curves ({Path(self.path).name})" if self.path else "an illustration"


@dataclass(frozen=True)
class Searched:
    """A model by its sizes alone, a regime, and how a table is measured and shapes are timed there."""

    base: PreTrainedModel
    regime: Regime
    effort: Effort
    timing: Effort

    def table(self) -> LatencyTable:
        return measure_table(self.base, self.regime, effort=self.effort)

    def space(self, table: LatencyTable) -> SearchSpace:
        return search_space(locate(self.base), self.regime, multiple=table.multiple)

    def answer(self, table: LatencyTable, budget: LatencyBudget, curves: Curves, again: int) -> Row:
        """
        The row of a budget: what was asked, what was found and what it takes.

        A budget that cannot be met is a result, too.
        """
        space = self.space(table)
        realise = Timer(self.base, self.regime, self.timing)
        row: dict[str, Any] = {"asked": str(budget), "losses": str(curves), "shapes": len(space)}
        row["speedup_asked"] = 1 / budget.limit_ms(1.0)
        row["pass_s"] = pass_seconds(space, table, curves.quality.predict(space))
        try:
            found = answer(space, table, curves.quality, budget, realise, realise, again)
        except InfeasibleBudgetError as error:
            return row | {"infeasible": str(error)}
        return row | {
            "limit_ms": found.limit_ms,
            "dense_ms": found.dense_ms,
            "ms": found.ms,
            "speedup": found.dense_ms / found.ms,
            "over_asked": found.ms / found.limit_ms,
            "speedup_in_search": found.result.speedup,
            "shape": found.result.best.shape.sizes(),
            "dense": space.dense.sizes(),
            "rounds": found.result.rounds,
            "search_s": found.seconds,
        }


def measure_budgets(rows: Rows, preset: Preset, device: str, curves: Curves) -> None:
    """A table for each case, then a search for each budget; every answer is built and timed again."""
    for text in preset.budgets:
        case = parse_case(text, device)
        searched = Searched(case.load(), case.regime, preset.table, preset.timing)

        def table_row(searched: Searched = searched) -> Row:
            table = searched.table()
            return {"table_s": table.seconds, "errors": dict(table.errors), "table": table.to_dict()}

        budgets = [LatencyBudget(speedup=speedup) for speedup in preset.speedups]
        if text == preset.ancestor:
            budgets.append(LatencyBudget(fraction=ANCESTOR_FRACTION))
        names = [f"{case}: {budget}" for budget in budgets]
        if all(rows.has("budgets", name) for name in names):
            continue
        made = rows.make("budgets", f"{case}: table", table_row)
        if made is None:
            continue
        table = LatencyTable.from_dict(made["table"])
        for name, budget in zip(names, budgets, strict=True):
            rows.make(
                "budgets",
                name,
                lambda searched=searched, table=table, budget=budget, case=case: (
                    {"case": str(case), "of_ancestor": budget.fraction is not None}
                    | searched.answer(table, budget, curves, preset.again)
                ),
            )


def timed_search(searched: Searched, budget: LatencyBudget, curves: Curves) -> Row:
    """The time of a table and of a search."""
    table = searched.table()
    return {"table_s": table.seconds} | searched.answer(table, budget, curves, again=1)


def measure_searches(rows: Rows, preset: Preset, device: str, curves: Curves) -> None:
    """Table and search with the package's own settings."""
    effort = preset.search_effort
    for text in preset.searches:
        case = parse_case(text, device)
        searched = Searched(case.load(), case.regime, effort, effort.confirming())
        budget = LatencyBudget(speedup=preset.grid.speedup)
        rows.make(
            "search",
            f"{case}: {budget}",
            lambda searched=searched, budget=budget, case=case: (
                {"case": str(case)} | timed_search(searched, budget, curves)
            ),
        )
