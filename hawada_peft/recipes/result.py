"""What came of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..planning.cut import cuts


@dataclass(frozen=True)
class RecipeResult:
    """
    What came of a recipe.

    Args:
        folder (`str`): the verified slim model.
        dense (`dict`): the sizes before.
        slim (`dict`): the sizes after.
        dense_parameters (`int`): before.
        slim_parameters (`int`): after.
        losses (`dict`): held-out distillation losses: `gates` (under the plan, before the merge), `recovery_start`
            (after merge and refitting) and `recovery_end`.
        reconstruction (`dict`, *optional*): `metric`, `before`, `after`, `applied`: on calibration batches that
            nothing was fitted to.
        quality (`list[dict]`): fields of `QualityChange`, on the held-out examples.
        latency (`dict`, *optional*): milliseconds of both, measured side by side; `regime` and `device`.
    """

    folder: str
    dense: dict[str, Any]
    slim: dict[str, Any]
    dense_parameters: int
    slim_parameters: int
    losses: dict[str, float]
    reconstruction: dict[str, Any] | None
    quality: list[dict[str, Any]]
    latency: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecipeResult:
        """The inverse of `to_dict`."""
        return cls(**data)

    def __str__(self) -> str:
        dense = self.dense | {"parameters": self.dense_parameters}
        slim = self.dense | self.slim | {"parameters": self.slim_parameters}
        rows = [(cut.name, f"{cut.dense:,}", f"{cut.slim:,}") for cut in cuts(dense, slim)]
        if self.latency is not None:
            rows.append(("latency, ms", f"{self.latency['dense_ms']:.3f}", f"{self.latency['slim_ms']:.3f}"))
        rows += [(each["name"], f"{each['dense']:.2f}", f"{each['slim']:.2f}") for each in self.quality]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:{width}} {dense:>15} {slim:>15}" for name, dense, slim in [("", "dense", "slim"), *rows]]
        if self.latency is not None:
            speedup, regime, device = (self.latency[name] for name in ("speedup", "regime", "device"))
            lines.append(f"{speedup:.2f}x, measured side by side: {regime}, {device}")
        if self.reconstruction is not None:
            applied = "applied" if self.reconstruction["applied"] else "not applied"
            lines.append(
                "refitted: {metric} {before:.4g} -> {after:.4g} on held-out calibration batches, ".format(
                    **self.reconstruction
                )
                + applied
            )
        titles = {
            "gates": "held-out loss under the plan",
            "recovery_start": "before the recovery",
            "recovery_end": "after it",
        }
        lines += [f"{title}: {self.losses[name]:.4g}" for name, title in titles.items() if name in self.losses]
        lines.append(f"saved and verified: {self.folder}")
        return "\n".join(lines)
