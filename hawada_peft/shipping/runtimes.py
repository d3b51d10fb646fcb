"""Running a slim model in other runtimes: the lines of the passport whose evidence is `run`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..discovery.inputs import example_inputs
from ..errors import HawAdaError, VerificationError
from ..files.verify import compare
from ..vanilla.batches import Batch
from ..vanilla.mode import evaluating
from ..vanilla.outputs import floats_of, outputs_of
from .passport import PassportLine

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_compile(
    model: PreTrainedModel, inputs: Batch | None = None, *, backend: str | Callable[..., Any] = "inductor"
) -> PassportLine:
    """
    Compile a model with `torch.compile`, and compare what it computes with the model as it is.

    Args:
        model: the slim model.
        inputs: keyword arguments of the forward pass; drawn at random if left out.
        backend: of `torch.compile`.

    Returns:
        `PassportLine`: yes where the outputs agree to rounding; no where compiling fails or they do not.
    """
    inputs = example_inputs(model) if inputs is None else inputs
    expected = outputs_of(model, inputs)
    name = backend if isinstance(backend, str) else backend.__name__
    runtime = "torch.compile" if name == "inductor" else f"torch.compile, backend {name}"
    where = f"torch {torch.__version__}, {model.device.type}"
    compiled = torch.compile(_Outputs(model, list(inputs)), backend=backend)
    try:
        with evaluating(model), torch.no_grad():
            found = compiled(*inputs.values())
    except RuntimeError as error:  # torch's compilers raise subclasses of it
        return _failed(runtime, where, error)
    return _compared(runtime, where, found, expected)


def check_onnx(model: PreTrainedModel, inputs: Batch | None = None, *, keep: str | Path | None = None) -> PassportLine:
    """
    Export a model to ONNX, run it in onnxruntime, and compare. Needs `pip install hawada_peft[onnx]`.

    The first dimension of every input, and the second of token inputs, stay variable; a smaller batch is run as well.

    Args:
        model: the slim model, on the CPU.
        inputs: keyword arguments of the forward pass, each with two rows if it can (and more than
            four tokens); drawn at random if left out.
        keep: where to leave the ONNX file; nowhere if left out.

    Returns:
        `PassportLine`: yes where the outputs agree to rounding; no where the export fails or they do not.

    Raises:
        HawAdaError: if onnx, onnxruntime or onnxscript is not installed.
    """
    try:
        onnxruntime = [import_module(name) for name in ONNX_PACKAGES][-1]
    except ImportError as error:
        raise HawAdaError(
            f"{error}; checking ONNX needs {', '.join(ONNX_PACKAGES)}: pip install hawada_peft[onnx]"
        ) from None
    inputs = example_inputs(model) if inputs is None else inputs
    where = ", ".join(f"{name} {version(name)}" for name in ("torch", *ONNX_PACKAGES))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx" if keep is None else Path(keep)
        try:
            with evaluating(model):
                _export(model, inputs, file)
        except (RuntimeError, torch.onnx.OnnxExporterError) as error:
            return _failed("ONNX", where, error)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for batch in ({name: _part(tensor) for name, tensor in inputs.items()}, inputs):
            arrays = {name: tensor.numpy() for name, tensor in batch.items()}
            found = [torch.from_numpy(array) for array in session.run(None, arrays)]
            line = _compared("ONNX", where, found, outputs_of(model, batch))
            if line.answer == "no":
                return line
    return line


class _Outputs(nn.Module):
    """A model with tensors in and tensors out: all that it computes."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        caches = {"use_cache": False} if self.model.can_generate() else {}
        return tuple(floats_of(self.model(**dict(zip(self.names, tensors, strict=True)), **caches)).values())


def _export(model: PreTrainedModel, inputs: Batch, file: Path) -> None:
    dynamic = tuple(_dynamic(tensor) for tensor in inputs.values())
    program = torch.onnx.export(
        _Outputs(model, list(inputs)).eval(),
        tuple(inputs.values()),
        input_names=list(inputs),
        dynamic_shapes=(dynamic,),
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    program.save(file)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """One row, and of tokens all but the last three: other sizes than those of the export."""
    return tensor[:1, :-3] if tensor.ndim == 2 else tensor[:1]


def _dynamic(tensor: torch.Tensor) -> Mapping[int, torch.export.Dim]:
    """What stays variable; a size of one cannot: torch takes it for a constant."""
    dims = (0, 1) if tensor.ndim == 2 else (0,)
    return {dim: torch.export.Dim.DYNAMIC for dim in dims if tensor.shape[dim] > 1}


def _compared(
    runtime: str, where: str, found: Sequence[torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> PassportLine:
    dtype = next(iter(expected.values())).dtype
    try:
        gap, scale = compare(dict(zip(expected, found, strict=False)), expected, dtype)
    except VerificationError as error:
        return PassportLine(runtime, "no", "run", f"{where}: {error}")
    return PassportLine(runtime, "yes", "run", f"{where}: outputs differ by at most {gap:.2g} of {scale:.3g}")


def _failed(runtime: str, where: str, error: Exception) -> PassportLine:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return PassportLine(runtime, "no", "run", f"{where}: {type(error).__name__}: {reason[0][:200]}")
