"""The regime: under which conditions a latency is measured, and on what."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidRegimeError

MODES = ("prefill", "decode", "forward")
BACKENDS = ("eager", "compile", "cuda_graph")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Regime:
    """
    Under which conditions a latency is measured.

    Args:
        mode (`str`): `"forward"`, one pass over the whole input with all outputs, for vision models, encoders and
            scoring; `"prefill"`, what `generate` does before the first new token: fill a KV cache, logits of the last
            position; `"decode"`, one further token with `seq_len` tokens in the KV cache.
        batch_size (`int`): rows.
        seq_len (`int`, *optional*): tokens per row; left out for images.
        image_size (`int`, *optional*): pixels along each side; the config's size if left out.
        dtype (`str`): of weights and activations.
        backend (`str`): `"eager"`, `"compile"` (`torch.compile`) or `"cuda_graph"` (captured and replayed: no launch
            overhead).
        device (`str`): `"cpu"`, `"cuda"`, `"cuda:1"`.

    Raises:
        InvalidRegimeError: with every problem.
    """

    mode: str = "forward"
    batch_size: int = 1
    seq_len: int | None = None
    image_size: int | None = None
    dtype: str = "float32"
    backend: str = "eager"
    device: str = "cpu"

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be one of {list(allowed)}, got {value!r}"
            for name, value, allowed in (
                ("mode", self.mode, MODES),
                ("dtype", self.dtype, tuple(DTYPES)),
                ("backend", self.backend, BACKENDS),
            )
            if value not in allowed
        ]
        problems += [
            f"{name} must be a whole number of at least 1, got {value!r}"
            for name, value in (
                ("batch_size", self.batch_size),
                ("seq_len", 1 if self.seq_len is None else self.seq_len),
                ("image_size", 1 if self.image_size is None else self.image_size),
            )
            if not isinstance(value, int) or isinstance(value, bool) or value < 1
        ]
        if self.mode in ("prefill", "decode") and self.seq_len is None:
            problems.append(f"mode {self.mode!r} needs seq_len: the tokens per row")
        if self.backend == "cuda_graph" and torch.device(self.device).type != "cuda":
            problems.append(f"backend 'cuda_graph' needs a CUDA device, got device={self.device!r}; use 'eager' there")
        if problems:
            raise InvalidRegimeError("\n".join(problems))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]

    @property
    def device_name(self) -> str:
        """What the device is, e.g. `"NVIDIA H200"`; for a CPU with the number of threads that torch uses."""
        device = torch.device(self.device)
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        if device.type == "cpu":
            return f"{_cpu_name()}, {torch.get_num_threads()} threads"
        return device.type

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Regime:
        """
        The inverse of `to_dict`.

        Raises:
            InvalidRegimeError: on names that are not fields.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(allowed))
        if unknown:
            raise InvalidRegimeError(f"unknown fields {unknown} in a regime; known are {allowed}")
        return cls(**data)

    def __str__(self) -> str:
        size = f"x{self.seq_len}" if self.seq_len is not None else ""
        return f"{self.mode} {self.batch_size}{size}, {self.dtype}, {self.backend}, {self.device}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
