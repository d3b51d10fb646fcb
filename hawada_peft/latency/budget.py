"""The latency budget: what a person asks for, in their own words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import InvalidBudgetError
from .checks import is_number
from .regime import Conditions

LATENCIES, SIZES = ("speedup", "latency_ms", "fraction"), ("max_parameters", "max_memory")


@dataclass(frozen=True, kw_only=True)
class LatencyBudget(Conditions):
    """
    What the slim model may cost, and under which conditions.

    At most one of the three latencies is given; without any, `max_parameters` or `max_memory` must be. All limits hold
    together.

    Args:
        speedup (`float`, *optional*): times faster than the dense model; at least 1.
        latency_ms (`float`, *optional*): milliseconds per call.
        fraction (`float`, *optional*): of the dense model's latency, in (0, 1].
        max_parameters (`int`, *optional*): parameters at most.
        max_memory (`float`, *optional*): bytes of weights and KV cache at most.
        mode: as in `Conditions`.
        batch_size: as in `Conditions`.
        seq_len: as in `Conditions`.
        prompt: as in `Conditions`.
        output: as in `Conditions`.
        static_cache: as in `Conditions`.
        image_size: as in `Conditions`.
        dtype: as in `Conditions`.
        backend: as in `Conditions`.
        device: as in `Conditions`.

    Raises:
        InvalidBudgetError: with every problem.

    Example:

        >>> LatencyBudget(speedup=1.5, batch_size=8, seq_len=1024).limit_ms(dense_ms=30.0)
        20.0
        >>> str(LatencyBudget(speedup=1.5, prompt=512, output=128))  # whole answers
        'speedup 1.5x'
    """

    speedup: float | None = field(default=None, metadata={"help": "Times faster than the dense model."})
    latency_ms: float | None = field(default=None, metadata={"help": "Milliseconds per call."})
    fraction: float | None = field(default=None, metadata={"help": "Of the dense model's latency."})
    max_parameters: int | None = field(default=None, metadata={"help": "Parameters at most."})
    max_memory: float | None = field(
        default=None,
        metadata={"help": "Of weights and KV cache at most, as 2GB or 500MB.", "unit": "bytes"},
    )

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InvalidBudgetError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        given = {name: getattr(self, name) for name in (*LATENCIES, *SIZES) if getattr(self, name) is not None}
        latencies = [name for name in LATENCIES if name in given]
        if len(latencies) > 1:
            yield f"give one of speedup, latency_ms and fraction, got {latencies}"
        if not given:
            yield "give one of speedup, latency_ms and fraction, or max_parameters, or max_memory"
        for name, value in given.items():
            if not is_number(value) or value <= 0:
                yield f"{name} must be a number above 0, got {value!r}"
            elif name == "speedup" and value < 1:
                yield f"speedup must be at least 1, got {value}; a slower model needs no budget"
            elif name == "fraction" and value > 1:
                yield f"fraction must be in (0, 1], got {value}; a slower model needs no budget"
        yield from super()._problems()

    def limit_ms(self, dense_ms: float) -> float:
        """
        The milliseconds that may be used; infinite if latency is not limited.

        Args:
            dense_ms: the dense model's latency.
        """
        if self.latency_ms is not None:
            return self.latency_ms
        if self.speedup is not None:
            return dense_ms / self.speedup
        return math.inf if self.fraction is None else dense_ms * self.fraction

    def __str__(self) -> str:
        limits = {
            "speedup": self.speedup and f"{self.speedup}x",
            "latency": self.latency_ms and f"{self.latency_ms} ms",
            "fraction": self.fraction and f"{self.fraction} of dense",
            "parameters": self.max_parameters and f"at most {self.max_parameters:,}",
            "memory": self.max_memory and f"at most {self.max_memory / 2**20:,.1f} MiB",
        }
        return ", ".join(f"{name} {value}" for name, value in limits.items() if value)
