"""
The latency table: measured milliseconds per size, and the estimates that follow from them.

Long because estimates, their correction by what was timed, and the file are one value's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleTableError
from ..files.atomic import write_text
from ..vanilla.shape import AXES, Shape
from .checks import disagreements, problems_of
from .interpolate import bilinear, linear, smooth
from .regime import Regime

FORMAT = 3
KERNEL_WIDTH, KERNEL_PRIOR = 0.15, 0.5
"""How far a realised shape's residual reaches, in parts of the dense sizes, and how much it is trusted."""

LEAST = 0.05
"""The part of the dense model's latency per layer that no layer is estimated below."""

POOR = 0.15
"""Beyond this 95th percentile of its errors a table is no model of a regime."""

RIDGE = 1e-3
"""Pulls the affine correction towards "none", in units of squared relative errors."""


@dataclass(frozen=True)
class Realised:
    """A shape that was built and timed as a whole: its milliseconds, on the scale of the table's `dense_ms`."""

    shape: Shape
    ms: float


@dataclass(frozen=True)
class LatencyTable:
    """
    Measured costs of a model's parts on one device under one regime.

    The latency of n layers with g KV groups of r query heads and f FFN channels is estimated as
    `scale * (fixed + n * (layer + attention(g, r) + ffn(f) + interaction(g, r, f))) + offset`, times a factor that
    carries what realised shapes nearby differed from it. `interaction` is `interaction_ms` times the parts of heads
    and of FFN channels that are missing: 0 where either is dense. Where timings are noisy these straight lines may
    lead below 0, so a layer counts at least `LEAST` of what one of the dense model takes.

    Args:
        regime (`Regime`): the conditions.
        device_name (`str`): what the device is.
        base_sizes (`dict`): model type, hidden size, head size and dense sizes.
        versions (`dict[str, str]`): of torch and transformers.
        fixed_ms (`float`): what does not depend on the layers.
        layer_ms (`float`): per layer, with the smallest attention and FFN that were timed.
        kv_groups (`tuple[int, ...]`): the grid of attention sizes: its KV groups.
        heads_per_group (`tuple[int, ...]`): and its query heads per group.
        attention_ms (`tuple[tuple[float, ...], ...]`): per layer beyond the smallest, (KV groups, heads per group).
        ffn_sizes (`tuple[int, ...]`): the FFN sizes that were timed.
        ffn_ms (`tuple[float, ...]`): per layer beyond the smallest of them.
        interaction_ms (`float`): what small attention and FFN together cost beyond the sum.
        multiple (`int`): FFN sizes that are not a multiple of it are slower than larger ones that are.
        dense_ms (`float`): the whole dense model; also in a table for a narrower residual stream, whose `model` states
            that `hidden_size` and the dense one as `dense_hidden_size`; likewise `head_dim`, for narrower heads.
        scale (`float`): of the affine correction.
        offset_ms (`float`): of the affine correction.
        realised (`tuple[Realised, ...]`): shapes that were timed as a whole.
        errors (`dict[str, float]`): relative errors of the estimate on the realised shapes, each left out of the fit
            in turn: `median`, `p95`.
        seconds (`float`): what measuring took.
        measured_at (`str`): when that was, by ISO 8601.
        unsettled (`str`): what did not settle, in words; empty if everything did.
        path (`Path`, *optional*): the file that it was read from.
    """

    regime: Regime
    device_name: str
    base_sizes: Mapping[str, int | str]
    versions: Mapping[str, str]
    fixed_ms: float
    layer_ms: float
    kv_groups: tuple[int, ...]
    heads_per_group: tuple[int, ...]
    attention_ms: tuple[tuple[float, ...], ...]
    ffn_sizes: tuple[int, ...]
    ffn_ms: tuple[float, ...]
    interaction_ms: float
    multiple: int
    dense_ms: float
    scale: float = 1.0
    offset_ms: float = 0.0
    realised: tuple[Realised, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    measured_at: str = ""
    unsettled: str = ""
    path: Path | None = field(default=None, compare=False)

    @cached_property
    def dense(self) -> Shape:
        """The dense sizes."""
        return Shape.from_dict({name: int(self.base_sizes[name]) for name in AXES})

    def estimate(self, shape: Shape) -> float:
        """
        The latency of a shape in milliseconds.

        Args:
            shape: the sizes; what it leaves out is dense.

        Raises:
            IncompatibleTableError: if it has another hidden size, or size of heads, than the table.
        """
        for name in ("hidden_size", "head_dim"):
            size = getattr(shape, name)
            if size not in (None, self.base_sizes[name]):
                raise IncompatibleTableError(
                    f"the latency table is for a {name} of {self.base_sizes[name]}, asked {size}; measure one with "
                    f"`measure_table(..., {name}={size})`"
                )
        sizes = shape.complete(self.dense)
        _, groups, ffn, layers = sizes.sizes().values()
        return float(self.estimate_sizes(groups, sizes.heads_per_group, ffn, layers))

    @property
    def poor(self) -> str:
        """Why estimates are no more than a first order to try shapes in, in words; empty where they are a model."""
        if self.errors.get("p95", 0.0) <= POOR:
            return ""
        median, p95 = self.errors["median"], self.errors["p95"]
        return f"a sum of costs is no model of {self.regime} here: estimates are off by {median:.1%}, p95 {p95:.1%}"

    def parts(self, shape: Shape) -> dict[str, float]:
        """
        Where the milliseconds of a shape go, in sum its estimate: the FFN is what would be saved by the smallest one
        that was timed, and so is the attention; what is left of the layers is in `"rest of the layers"`.

        Args:
            shape: the sizes; what it leaves out is dense.

        Raises:
            IncompatibleTableError: as for `estimate`.
        """
        sizes = shape.complete(self.dense)
        _, groups, ffn, layers = sizes.sizes().values()
        given = (_tensor(value) for value in (groups, sizes.heads_per_group, ffn))
        whole = float(self._layer(*given)) * layers
        least = (_tensor(value) for value in (groups, sizes.heads_per_group, min(self.ffn_sizes)))
        narrow = float(self._layer(*least)) * layers
        few = _tensor(min(self.kv_groups)), _tensor(min(self.heads_per_group)), _tensor(min(self.ffn_sizes))
        rest = float(self._layer(*few)) * layers
        raw = {
            "attention": narrow - rest,
            "FFN": whole - narrow,
            "rest of the layers": rest,
            "outside the layers": self.fixed_ms,
        }
        factor = self.estimate(shape) / sum(raw.values())
        return {name: factor * ms for name, ms in raw.items()}

    def estimate_sizes(self, kv_groups: Any, heads_per_group: Any, ffn: Any, layers: Any) -> torch.Tensor:
        """
        The latency of many shapes at once, differentiable.

        Args:
            kv_groups: tensors, arrays or numbers that broadcast, as all that follow.
            heads_per_group: query heads in each group.
            ffn: FFN channels.
            layers: layers.

        Returns:
            Milliseconds, float64, of the broadcast shape.
        """
        groups, per_group, ffn, layers = (_tensor(value) for value in (kv_groups, heads_per_group, ffn, layers))
        raw = self.fixed_ms + layers * self._layer(groups, per_group, ffn)
        return self._corrected(raw, self._coordinates(groups * per_group, groups, ffn, layers))

    def with_realised(self, realised: Sequence[Realised]) -> LatencyTable:
        """
        The table corrected by more shapes that were timed as a whole: the affine fit is made anew, by least squares on
        relative errors.
        """
        seen = {point.shape: point for point in (*self.realised, *realised)}
        points = tuple(seen.values())
        fitted = self._fit(points)
        misses = [
            abs(self._fit(points[:index] + points[index + 1 :]).estimate(point.shape) / point.ms - 1)
            for index, point in enumerate(points)
        ]
        errors = {"median": float(np.median(misses)), "p95": float(np.percentile(misses, 95))} if misses else {}
        return replace(fitted, errors=errors)

    def _fit(self, points: tuple[Realised, ...]) -> LatencyTable:
        plain = replace(self, scale=1.0, offset_ms=0.0, realised=())
        if not points:
            return plain
        measured = np.array([point.ms for point in points])
        raw = plain._estimates(points).numpy()
        # scale = 1 + u, offset = v * dense: both small, both pulled to 0.
        design = np.stack([raw / measured, self.dense_ms / measured], axis=1)
        target = 1 - raw / measured
        penalty = RIDGE * len(points) * np.eye(2)
        u, v = np.linalg.solve(design.T @ design + penalty, design.T @ target)
        return replace(plain, scale=float(1 + u), offset_ms=float(v * self.dense_ms), realised=points)

    def _layer(self, groups: torch.Tensor, per_group: torch.Tensor, ffn: torch.Tensor) -> torch.Tensor:
        """Milliseconds per layer, uncorrected, of the broadcast shape."""
        groups, per_group, ffn = torch.broadcast_tensors(groups, per_group, ffn)
        grid = torch.tensor(self.attention_ms, dtype=torch.float64, device=groups.device)
        column = torch.tensor(self.ffn_ms, dtype=torch.float64, device=groups.device)
        attention = bilinear(groups, per_group, self.kv_groups, self.heads_per_group, grid)
        channels = linear(ffn, self.ffn_sizes, column)
        heads, _, size, _ = self.dense.sizes().values()
        absent = (1 - groups * per_group / heads) * (1 - ffn / size)
        return self.layer_ms + attention + channels + self.interaction_ms * absent

    def _corrected(self, raw: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        share = where[..., -1]  # of the layers
        affine = torch.maximum(self.scale * raw + self.offset_ms, LEAST * self.dense_ms * share)
        points, residuals = self._residuals
        left = smooth(
            where, points.to(where.device), residuals.to(where.device), width=KERNEL_WIDTH, prior=KERNEL_PRIOR
        )
        return affine * torch.exp(left)

    @cached_property
    def _residuals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where shapes were realised, (n, 4), and the logarithm of measured over affine estimate, (n,)."""
        if not self.realised:
            return torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        measured = torch.tensor([point.ms for point in self.realised], dtype=torch.float64)
        heads, groups, ffn, layers = self._sizes(self.realised)
        estimates = replace(self, realised=())._estimates(self.realised)
        return self._coordinates(heads, groups, ffn, layers), torch.log(measured / estimates)

    def _sizes(self, points: Sequence[Realised]) -> torch.Tensor:
        """(4, points): query heads, KV groups, FFN channels, layers."""
        sizes = [list(point.shape.complete(self.dense).sizes().values()) for point in points]
        return torch.tensor(sizes, dtype=torch.float64).T

    def _estimates(self, points: Sequence[Realised]) -> torch.Tensor:
        heads, groups, ffn, layers = self._sizes(points)
        return self.estimate_sizes(groups, heads / groups, ffn, layers)

    def _coordinates(
        self, heads: torch.Tensor, groups: torch.Tensor, ffn: torch.Tensor, layers: torch.Tensor
    ) -> torch.Tensor:
        sizes = self.dense.sizes().values()
        parts = [value / size for value, size in zip((heads, groups, ffn, layers), sizes, strict=True)]
        return torch.stack(torch.broadcast_tensors(*parts), dim=-1)

    def check(self, *, regime: Regime, base_sizes: Mapping[str, int | str], device_name: str | None = None) -> None:
        """
        Check that the table was measured for this device, dtype, regime and model.

        Args:
            regime: what is asked for, on this machine.
            base_sizes: model type, hidden size, head size and dense sizes.
            device_name: what is timed on (`Clock.device_name`); the regime's device if left out.

        Raises:
            IncompatibleTableError: naming what differs.
        """
        mine = {"device name": self.device_name, **_plain_device(self.regime), **self.base_sizes}
        asked = {"device name": device_name or regime.device_name, **_plain_device(regime), **base_sizes}
        differing = [
            f"{name}: table {mine.get(name)}, asked {asked[name]}" for name in asked if mine.get(name) != asked[name]
        ]
        if differing:
            raise IncompatibleTableError(
                f"the latency table was measured for something else ({'; '.join(differing)}); measure one here"
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        data = asdict(self)
        del data["path"]
        data["realised"] = [{"shape": point.shape.to_dict(), "ms": point.ms} for point in self.realised]
        return {"format": FORMAT, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """
        The inverse of `to_dict`.

        Raises:
            IncompatibleTableError: if this is not a table, or one of an unknown format.
        """
        if data.get("format") != FORMAT:
            raise IncompatibleTableError(
                f"cannot read a latency table of format {data.get('format')!r}; this version reads {FORMAT}: "
                "measure again"
            )
        values = {name: value for name, value in data.items() if name != "format"}
        known = {name for name in cls.__dataclass_fields__ if name != "path"}
        if known != set(values):
            raise IncompatibleTableError(
                f"the latency table lacks {sorted(known - set(values))} and has the unknown "
                f"{sorted(set(values) - known)}: measure again"
            )
        try:
            for name in ("kv_groups", "heads_per_group", "ffn_sizes", "ffn_ms"):
                values[name] = tuple(values[name])
            values["attention_ms"] = tuple(tuple(row) for row in values["attention_ms"])
            values["regime"] = Regime.from_dict(values["regime"])
            values["realised"] = tuple(Realised(Shape.from_dict(p["shape"]), p["ms"]) for p in values["realised"])
            table = cls(**values)
            problems = list(problems_of(table)) or list(disagreements(table))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            raise IncompatibleTableError(f"the latency table is damaged: {'; '.join(problems)}. Measure again")
        return table

    def save(self, path: str | Path) -> None:
        """Write the table as a JSON file."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """
        Read a table that `save` has written.

        Raises:
            IncompatibleTableError: if the file holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise IncompatibleTableError(f"{path} is no latency table: {error}; measure again") from None
        if not isinstance(data, dict):
            raise IncompatibleTableError(
                f"{path} is no latency table: it holds a {type(data).__name__}; measure again"
            )
        return replace(cls.from_dict(data), path=Path(path))

    def __str__(self) -> str:
        quality = f", error {self.errors['median']:.1%} (p95 {self.errors['p95']:.1%})" if self.errors else ""
        found = f"; measured {self.measured_at.replace('T', ' ')[:16]} UTC" if self.measured_at else ""
        where = f", from {self.path}" if self.path else ""
        return (
            f"LatencyTable({self.regime} on {self.device_name}, dense {self.dense_ms:.3f} ms{quality}{found}{where})"
        )


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).to(torch.float64)


def _plain_device(regime: Regime) -> dict[str, Any]:
    """The regime without the number of a device: `cuda:1` is as good as `cuda` if the name is the same."""
    return {**regime.to_dict(), "device": torch.device(regime.device).type}
