"""A basis as a file: beside a plan that is about its directions, or in the folder of a race."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import HawAdaError
from ..gates.stream_basis import WIDTHS
from .basis import Basis

FORMAT = "hawada basis 1"
SUFFIX = ".basis.safetensors"
"""Of the file beside a plan, in place of the plan's own."""

TENSORS = ("vectors", "scales", "marks")


def save_basis(basis: Basis, path: str | os.PathLike[str]) -> None:
    """
    Write a basis as a safetensors file, float32, whole or not at all.

    Args:
        basis: to be written.
        path: the file; its folder must exist.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    tensors = {name: getattr(basis, name).detach().float().cpu().contiguous() for name in TENSORS}
    try:
        save_file(tensors, beside, {"format": FORMAT, "centred": str(basis.centred).lower()})
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def load_basis(path: str | os.PathLike[str]) -> Basis:
    """
    The inverse of `save_basis`.

    Raises:
        FileNotFoundError: if there is no such file.
        HawAdaError: if it holds no basis, or a damaged one.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, found = file.metadata() or {}, {name: file.get_tensor(name) for name in TENSORS}
    except SafetensorError as error:
        raise HawAdaError(f"{path} holds no basis of a residual stream: {error}; make the plan anew") from None
    problems = []
    if facts.get("format") != FORMAT or facts.get("centred") not in ("true", "false"):
        problems.append(f"its format is {facts.get('format')!r}, this version reads {FORMAT!r}")
    vectors, scales, marks = (found[name] for name in TENSORS)
    square = vectors.ndim == 2 and vectors.shape[0] == vectors.shape[1]
    if not square or marks.ndim != 1 or tuple(scales.shape) != (len(WIDTHS), len(marks)):
        problems.append(f"the sizes of its tensors are {[tuple(found[name].shape) for name in TENSORS]}")
    elif not all(tensor.isfinite().all() for tensor in found.values()):
        problems.append("it holds NaN or infinity")
    if problems:
        raise HawAdaError(f"{path} holds no basis of a residual stream: {'; '.join(problems)}; make the plan anew")
    return Basis(vectors, scales, marks, facts["centred"] == "true")
