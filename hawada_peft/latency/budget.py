"""The latency budget: what a person asks for, in their own words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import InvalidBudgetError, InvalidRegimeError
from .regime import DTYPES, Regime


@dataclass(frozen=True)
class LatencyBudget:
    """
    What the slim model may cost.

    At most one of the three latencies is given; without any, `max_parameters` or `max_memory` must be. All limits hold
    together.

    Args:
        speedup (`float`, *optional*): times faster than the dense model; at least 1.
        latency_ms (`float`, *optional*): milliseconds per call.
        fraction (`float`, *optional*): of the dense model's latency, in (0, 1].
        batch_size (`int`): rows per call; this and the next are the conditions, see `Regime`.
        seq_len (`int`, *optional*): tokens per row.
        image_size (`int`, *optional*): pixels along each side.
        mode (`str`, *optional*): left out, it is `"prefill"` for models that generate and `"forward"` for others.
        dtype (`str`, *optional*): the model's if left out.
        backend (`str`): `"eager"`, `"compile"` or `"cuda_graph"`.
        device (`str`, *optional*): the model's if left out.
        max_parameters (`int`, *optional*): parameters at most.
        max_memory (`float`, *optional*): bytes of weights and KV cache at most.

    Raises:
        InvalidBudgetError: with every problem.

    Example:

        >>> LatencyBudget(speedup=1.5, batch_size=8, seq_len=1024).limit_ms(dense_ms=30.0)
        20.0
    """

    speedup: float | None = None
    latency_ms: float | None = None
    fraction: float | None = None
    batch_size: int = 1
    seq_len: int | None = None
    image_size: int | None = None
    mode: str | None = None
    dtype: str | None = None
    backend: str = "eager"
    device: str | None = None
    max_parameters: int | None = None
    max_memory: float | None = None

    def __post_init__(self) -> None:
        problems = []
        numbers = ("speedup", "latency_ms", "fraction", "max_parameters", "max_memory")
        given = {name: getattr(self, name) for name in numbers if getattr(self, name) is not None}
        latencies = [name for name in numbers[:3] if name in given]
        if len(latencies) > 1:
            problems.append(f"give one of speedup, latency_ms and fraction, got {latencies}")
        if not given:
            problems.append("give one of speedup, latency_ms and fraction, or max_parameters, or max_memory")
        for name, value in given.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value <= 0
            ):
                problems.append(f"{name} must be a number above 0, got {value!r}")
            elif name == "speedup" and value < 1:
                problems.append(f"speedup must be at least 1, got {value}; a slower model needs no budget")
            elif name == "fraction" and value > 1:
                problems.append(f"fraction must be in (0, 1], got {value}; a slower model needs no budget")
        try:
            self._regime(mode=self.mode or "forward", dtype=self.dtype, device="cuda")
        except InvalidRegimeError as error:
            problems.append(str(error))
        if problems:
            raise InvalidBudgetError("\n".join(problems))

    def _regime(self, *, mode: str, dtype: str | None, device: str) -> Regime:
        return Regime(
            mode=mode,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            image_size=self.image_size,
            dtype=dtype or "float32",
            backend=self.backend,
            device=self.device or device,
        )

    def regime(self, *, generates: bool, dtype: torch.dtype, device: torch.device | str) -> Regime:
        """
        The regime, with what was left out taken from a model.

        Args:
            generates: whether the model generates tokens.
            dtype: the model's.
            device: the model's.

        Raises:
            InvalidRegimeError: if they do not fit together.
        """
        names = {value: name for name, value in DTYPES.items()}
        mode = self.mode or ("prefill" if generates else "forward")
        return self._regime(mode=mode, dtype=self.dtype or names.get(dtype, str(dtype)), device=str(device))

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
