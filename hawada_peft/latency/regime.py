"""
The regime: under which conditions a latency is measured, and on what. The command line reads its options off the
fields, so torch is imported where a regime is looked at.

Long because every field is described, checked and told to people.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRegimeError
from .checks import is_whole

if TYPE_CHECKING:
    import torch

GENERATE = "generate"
MODES = ("prefill", "decode", "forward", GENERATE)
BACKENDS = ("eager", "compile", "cuda_graph")
LEAST = {"batch_size": 1, "seq_len": 1, "prompt": 1, "output": 2, "static_cache": 1, "image_size": 1}
"""What each number is at least."""

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Conditions:
    """
    Under which conditions a latency is asked for. What is left out is taken from a model.

    Args:
        mode (`str`, *optional*): `"forward"`, one pass over the whole input with all outputs, for vision models,
            encoders and scoring; `"prefill"`, what `generate` does before the first new token: fill a KV cache, logits
            of the last position; `"decode"`, one further token with `seq_len` tokens in the KV cache; `"generate"`, a
            whole answer: the prefill of `prompt` tokens and the `output - 1` steps of decode that follow it. Left out,
            it is `"generate"` where `prompt` and `output` are given, else `"prefill"` for models that generate and
            `"forward"` for others.
        batch_size (`int`): rows.
        seq_len (`int`, *optional*): tokens per row, of a decoder that reads an encoder half as many; left out for
            images and where `prompt` and `output` are given.
        prompt (`int`, *optional*): tokens of the prompt, per row.
        output (`int`, *optional*): tokens of the answer, per row; at least 2, the first of which the prefill gives.
        static_cache (`int`, *optional*): tokens per row that a KV cache of fixed size holds: every step of decode
            attends to all of them. Left out, the cache grows with what is in it under `"eager"`, and is of just the
            size that is needed elsewhere.
        image_size (`int`, *optional*): pixels along each side; the config's size if left out, and always where a model
            takes texts as well.
        dtype (`str`, *optional*): of weights and activations; the model's if left out.
        backend (`str`): `"eager"`, `"compile"` (`torch.compile`) or `"cuda_graph"` (captured and replayed: no launch
            overhead).
        device (`str`, *optional*): `"cpu"`, `"cuda"`, `"cuda:1"`; the model's if left out.

    Raises:
        InvalidRegimeError: with every problem.
    """

    mode: str | None = field(default=None, metadata={"choices": MODES, "help": "By the kind of model if left out."})
    batch_size: int = field(default=1, metadata={"help": "Rows per call."})
    seq_len: int | None = field(default=None, metadata={"help": "Tokens per row; models of text need it."})
    prompt: int | None = field(
        default=None, metadata={"help": "Tokens of the prompt, for whole answers.", "option": "--prompt-tokens"}
    )
    output: int | None = field(
        default=None, metadata={"help": "Tokens of the answer, for whole answers.", "option": "--output-tokens"}
    )
    static_cache: int | None = field(default=None, metadata={"help": "Tokens that a KV cache of fixed size holds."})
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels along each side; the config's if left out."}
    )
    dtype: str | None = field(default=None, metadata={"choices": DTYPES, "help": "The model's if left out."})
    backend: str = field(default="eager", metadata={"choices": BACKENDS, "help": "How it is run."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ..."})

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InvalidRegimeError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        for each in fields(Conditions):
            value, allowed = getattr(self, each.name), each.metadata.get("choices")
            if allowed and value not in allowed and (value is not None or each.default is not None):
                yield f"{each.name} must be one of {list(allowed)}, got {value!r}"
        wrong = False
        for name, least in LEAST.items():
            value = getattr(self, name)
            if (value is not None or name == "batch_size") and not is_whole(value, least):
                wrong = True
                yield f"{name} must be a whole number of at least {least}, got {value!r}"
        if self.mode in ("prefill", "decode") and self.seq_len is None:
            yield f"mode {self.mode!r} needs seq_len: the tokens per row"
        yield from self._problems_of_answers()
        if self.static_cache is not None and not wrong:
            if self.mode == "forward":
                yield "static_cache is for modes with a KV cache, got mode='forward'"
            elif self.length is not None and self.static_cache < self.length + (self.mode == "decode"):
                needed = self.length + (self.mode == "decode")
                yield f"static_cache must hold the {needed} tokens of a row, got {self.static_cache}"
        kind = None if self.device is None else _kind_of_device(self.device)
        if kind == "":
            yield f"device must be one that torch knows, as 'cpu', 'cuda' or 'cuda:1', got {self.device!r}"
        elif self.backend == "cuda_graph" and kind not in (None, "cuda"):
            yield f"backend 'cuda_graph' needs a CUDA device, got device={self.device!r}; use 'eager' there"

    def _problems_of_answers(self) -> Iterator[str]:
        counts = {"prompt": self.prompt, "output": self.output}
        given = {name: value for name, value in counts.items() if value is not None}
        if (given or self.mode == GENERATE) and len(given) < len(counts):
            yield f"whole answers need prompt and output, the tokens of each, got {given or 'neither'}"
        elif given and self.mode not in (None, GENERATE):
            yield f"prompt and output are for mode {GENERATE!r}, got mode={self.mode!r}: leave one of them out"
        elif given and self.seq_len is not None:
            yield f"give either seq_len or prompt and output, got seq_len={self.seq_len} and {given}"

    @property
    def length(self) -> int | None:
        """Tokens per row, those of an answer included; None for images."""
        if self.prompt is None or self.output is None:
            return self.seq_len
        return self.prompt + self.output

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
        return Regime(
            mode=self.mode or (GENERATE if self.prompt else "prefill" if generates else "forward"),
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            prompt=self.prompt,
            output=self.output,
            static_cache=self.static_cache,
            image_size=self.image_size,
            dtype=self.dtype or str(dtype).removeprefix("torch."),
            backend=self.backend,
            device=self.device or str(device),
        )


@dataclass(frozen=True)
class Regime(Conditions):
    """
    Conditions that are complete: a latency is measured under them. The defaults are one forward pass of float32 on the
    CPU.

    Args:
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
        InvalidRegimeError: with every problem.
    """

    mode: str = "forward"
    dtype: str = "float32"
    device: str = "cpu"

    def _problems(self) -> Iterator[str]:
        yield from (f"{name} must be given" for name in ("mode", "dtype", "device") if getattr(self, name) is None)
        yield from super()._problems()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        import torch  # here and below: a command line that is only read does without

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def device_name(self) -> str:
        """What the device is, e.g. `"NVIDIA H200"`; for a CPU with the number of threads that torch uses."""
        import torch

        device = torch.device(self.device)
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        if device.type == "cpu":
            return f"{_cpu_name()}, {torch.get_num_threads()} threads"
        return device.type

    @property
    def cached_tokens(self) -> int:
        """Tokens per row that the KV cache has room for."""
        if self.mode == "forward":
            return 0
        return self.static_cache or (self.length or 0) + (self.mode == "decode")

    def parts(self) -> tuple[tuple[int, Regime], ...]:
        """
        The calls that are timed, each with how often it counts: of a whole answer its prefill, and its steps of decode
        as so many of the one with as many tokens in the KV cache as they have on average. That is exact as far as a
        step's latency is linear in these tokens. Any other regime is one call.
        """
        if self.mode != GENERATE or self.prompt is None or self.output is None:
            return ((1, self),)
        plain = replace(self, mode="prefill", seq_len=self.prompt, prompt=None, output=None)
        steps, cache = self.output - 1, self.static_cache
        if cache is None and self.backend != "eager":
            cache = self.length
        # Step k of 1 to `steps` finds prompt + k - 1 tokens.
        filled = self.prompt + (steps - 1) // 2
        return (1, plain), (steps, replace(plain, mode="decode", seq_len=filled, static_cache=cache))

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
        if self.prompt is not None:
            size = f"x({self.prompt}+{self.output})"
        cache = f", static cache of {self.static_cache}" if self.static_cache is not None else ""
        return f"{self.mode} {self.batch_size}{size}{cache}, {self.dtype}, {self.backend}, {self.device}"


def _kind_of_device(device: object) -> str:
    """`"cpu"`, `"cuda"`, ...; empty if torch knows no such device."""
    if device in ("cpu", "cuda"):
        return str(device)
    import torch

    try:
        return torch.device(device).type if isinstance(device, str) else ""
    except RuntimeError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
