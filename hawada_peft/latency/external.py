"""A clock outside of this process: whatever runs the model where it is deployed says how long a call takes."""

from __future__ import annotations

import json
import math
import shlex
import string
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from ..discovery.inspected import sizes_of
from ..errors import ExternalClockError, HawAdaError
from .checks import is_number, is_whole
from .clock import Clock
from .regime import Regime
from .runner import Runner, check_call

Measure = Callable[[PreTrainedModel, Regime], float]
"""The seconds of one call of a model under a regime."""

FOLDER = "folder"
"""What a command line is told of the model: where it was saved."""

SHOWN_LINES = 8
"""So many of the last lines of a command's stderr are in the error."""


class ExternalClock(Clock):
    """
    What a call takes is said by a callable or by a program, as vLLM or an ONNX session: nothing is timed here.

    It is asked `repeats` times per shape and regime, one model at a time, and never again about a model of the same
    class and config; their median counts. It does its own warm-up and its own repeats, and sees whole answers
    (`mode="generate"`) as such. The models have random weights, in the regime's dtype on its device, which is where
    they are built, and need not be where they are run: leave it at `"cpu"` for an engine that wants the GPU alone.

    Args:
        measure (`Callable` or `str`): `measure(model, regime)` returns the seconds of a call. A command line is given
            as text, in which `{folder}` stands for a folder that the model was saved to (`save_pretrained`, without a
            tokenizer; it is deleted afterwards) and any field of `Regime` for its value, as `{batch_size}`, `{prompt}`
            or `{output}`. It is run without a shell, and the last line that it prints on stdout is the seconds.
        name (`str`, *optional*): what is timed on: tables of one are refused on another. The command line or the
            function's name if left out.
        repeats (`int`): how often each shape is measured. With 1 its spread is not known, and it counts as settled.
        timeout (`float`, *optional*): seconds after which a command is stopped.

    Raises:
        HawAdaError: if a command line has no `{folder}`, a field that is none, or open quotes; if a callable has no
            name of its own and `name` is left out; on impossible numbers.

    Example:

        >>> clock = ExternalClock("python time_in_vllm.py {folder} --batch {batch_size} --input {prompt}")
        >>> clock.device_name(Regime())
        'python time_in_vllm.py {folder} --batch {batch_size} --input {prompt}'
    """

    elsewhere = True

    def __init__(
        self, measure: Measure | str, *, name: str | None = None, repeats: int = 1, timeout: float | None = None
    ) -> None:
        super().__init__()
        if not is_whole(repeats, 1):
            raise HawAdaError(f"repeats must be a whole number of at least 1, got {repeats!r}")
        if timeout is not None and (isinstance(measure, str) is False or not is_number(timeout) or timeout <= 0):
            raise HawAdaError(f"timeout must be seconds above 0, for a command line, got {timeout!r}")
        self._measure: Measure = CommandLine(measure, timeout) if isinstance(measure, str) else measure
        self._name = name or _name_of(measure)
        self._repeats = repeats
        self._known: dict[str, np.ndarray] = {}

    def runner(self, model: Any, regime: Regime) -> Runner:
        """
        There is none.

        Raises:
            HawAdaError: always.
        """
        raise HawAdaError(f"{self._name} measures by itself: ask `ExternalClock.measured`")

    def measured(self, model: PreTrainedModel, regime: Regime) -> np.ndarray:
        """
        Milliseconds of a call of a model, (repeats,).

        Raises:
            InvalidRegimeError: if the model cannot run that way.
            ExternalClockError: if the command fails, or what it says is no number of seconds above 0.
        """
        check_call(model, regime)
        key = _key(model, regime)
        if key not in self._known:
            seconds = [self._ask(model, regime) for _ in range(self._repeats)]
            self._known[key] = 1e3 * np.array(seconds)
        return self._known[key]

    def samples(self, models: Sequence[nn.Module], regime: Regime, timed: Callable[[], np.ndarray]) -> np.ndarray:
        """What was measured of each model, as `measured`; nothing is called here."""
        return np.stack([self.measured(cast(PreTrainedModel, model), regime) for model in models])

    def _ask(self, model: PreTrainedModel, regime: Regime) -> float:
        found = self._measure(model, regime)
        if isinstance(found, bool) or not isinstance(found, Real) or not 0 < float(found) < math.inf:
            raise ExternalClockError(f"{self._name} must return seconds above 0, as a number; got {found!r}")
        return float(found)

    def device_name(self, regime: Regime) -> str:
        """The clock's name: it alone knows on what it runs the models."""
        return self._name


@dataclass(frozen=True)
class CommandLine:
    """
    Measures by a program: the model is saved to a temporary folder, and the program prints the seconds of a call.

    Args:
        template (`str`): as in `ExternalClock`.
        timeout (`float`, *optional*): seconds after which it is stopped.

    Raises:
        HawAdaError: if the template has no `{folder}`, a field that is none, or open quotes.
    """

    template: str
    timeout: float | None = None

    def __post_init__(self) -> None:
        allowed = [FOLDER, *Regime.__dataclass_fields__]
        try:
            words = shlex.split(self.template)
            pieces = [piece for word in words for piece in string.Formatter().parse(word)]
        except ValueError as error:
            raise HawAdaError(f"the command line {self.template!r} cannot be read: {error}") from None
        fields = [
            field + (f":{spec}" if spec else "") + (f"!{conversion}" if conversion else "")
            for _, field, spec, conversion in pieces
            if field is not None
        ]
        unknown = [field for field in fields if field not in allowed]
        if unknown or FOLDER not in fields:
            problem = f"the unknown {unknown}" if unknown else "no {folder}"
            raise HawAdaError(
                f"the command line {self.template!r} has {problem}; it needs {{folder}}, where the model is, and may "
                f"have {allowed[1:]} in braces; write {{{{ and }}}} for braces themselves"
            )

    def __call__(self, model: PreTrainedModel, regime: Regime) -> float:
        """
        The seconds that the program prints.

        Raises:
            ExternalClockError: if it cannot be run, fails, takes too long, or prints no number in its last line.
        """
        with tempfile.TemporaryDirectory(prefix="hawada-") as folder:
            model.save_pretrained(folder)
            words = self.words(folder, regime)
            shown = shlex.join(words)
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=self.timeout, check=False)
            except OSError as error:
                raise ExternalClockError(f"{shown} cannot be run: {error}") from None
            except subprocess.TimeoutExpired:
                raise ExternalClockError(f"{shown} was stopped after {self.timeout} s") from None
        if done.returncode != 0:
            said = "\n".join(done.stderr.strip().splitlines()[-SHOWN_LINES:])
            raise ExternalClockError(f"{shown} ended with code {done.returncode}: {said or 'nothing on stderr'}")
        lines = done.stdout.strip().splitlines()
        try:
            return float(lines[-1])
        except (IndexError, ValueError):
            last = repr(lines[-1]) if lines else "nothing"
            raise ExternalClockError(f"{shown} must print seconds in the last line of stdout, got {last}") from None

    def words(self, folder: str, regime: Regime) -> list[str]:
        """The command line for a model's folder."""
        values: Mapping[str, Any] = {FOLDER: folder} | regime.to_dict()
        return [word.format_map(values) for word in shlex.split(self.template)]


def _name_of(measure: Measure | str) -> str:
    if isinstance(measure, str):
        return measure
    name = getattr(measure, "__qualname__", None)
    if not callable(measure) or name is None or "<lambda>" in name:
        what = "a function with a name, or any callable with name=..., or a command line"
        raise HawAdaError(f"an external clock needs {what}: its tables are kept by that name; got {measure!r}")
    return f"{measure.__module__}.{name}"


def _key(model: PreTrainedModel, regime: Regime) -> str:
    """What latency depends on: the class, the sizes, the conditions; not the weights."""
    sizes = sizes_of(model.config.to_dict())
    told = [type(model).__name__, sizes, model.config.num_labels, regime.to_dict()]
    return json.dumps(told, sort_keys=True, default=str)
