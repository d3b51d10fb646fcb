"""Bases as a file: beside a plan that is about their directions, or in the folder of a race."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import HawAdaError
from ..gates.bases import WIDTHS
from ..planning.plan import Plan
from .bases import Bases
from .basis import Basis
from .heads.turn import HeadBasis

FORMAT = "hawada basis 1"
SUFFIX = ".basis.safetensors"
"""Of the file beside a plan, in place of the plan's own."""

STREAM = ("vectors", "scales", "marks")
IN_HEADS = tuple(each.name for each in fields(HeadBasis))


def save_basis(bases: Bases, path: str | os.PathLike[str]) -> None:
    """
    Write bases as a safetensors file, float32, whole or not at all.

    Args:
        bases: to be written; at least one.
        path: the file; its folder must exist.
    """
    target, centred = Path(path), bases.stream is not None and bases.stream.centred
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    found = {name: getattr(bases.stream, name) for name in STREAM} if bases.stream is not None else {}
    found |= bases.heads.tensors() if bases.heads is not None else {}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}
    try:
        save_file(tensors, beside, {"format": FORMAT, "centred": str(centred).lower()})
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def load_basis(path: str | os.PathLike[str]) -> Bases:
    """
    The inverse of `save_basis`.

    Raises:
        FileNotFoundError: if there is no such file.
        HawAdaError: if it holds no basis, or a damaged one.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise HawAdaError(f"{path} holds no basis: {error}; make the plan anew") from None
    problems = list(_problems(facts, found))
    if problems:
        raise HawAdaError(f"{path} holds no basis: {'; '.join(problems)}; make the plan anew")
    centred = facts["centred"] == "true"
    stream = Basis(**{name: found[name] for name in STREAM}, centred=centred) if STREAM[0] in found else None
    heads = HeadBasis(*(found[name] for name in IN_HEADS)) if IN_HEADS[0] in found else None
    return Bases(stream, heads)


def load_beside(path: Path, plan: Plan) -> Bases | None:
    """
    The bases beside a plan's file; None if it is not about directions, or they are not there (but in an adapter).

    Args:
        path: the plan's file.
        plan: what is in it.

    Raises:
        HawAdaError: if the file beside it holds none, or is damaged.
    """
    beside = path.with_suffix(SUFFIX)
    return load_basis(beside) if plan.in_bases and beside.exists() else None


def _problems(facts: Mapping[str, str], found: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if facts.get("format") != FORMAT or facts.get("centred") not in ("true", "false"):
        yield f"its format is {facts.get('format')!r}, this version reads {FORMAT!r}"
    if found.keys() not in ({*STREAM}, {*IN_HEADS}, {*STREAM, *IN_HEADS}):
        yield f"its tensors are {sorted(found)}"
        return
    sizes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if STREAM[0] in found:
        vectors, scales, marks = (found[name] for name in STREAM)
        square = vectors.ndim == 2 and vectors.shape[0] == vectors.shape[1]
        if not square or marks.ndim != 1 or tuple(scales.shape) != (len(WIDTHS), len(marks)):
            yield f"the sizes of its tensors are {sizes}"
    if IN_HEADS[0] in found:
        *maps, mean = (sizes[name] for name in IN_HEADS)
        first = maps[0]
        square = len(first) == 4 and first[2] == first[3] and all(each == first for each in maps)
        if not square or mean != (first[0], first[1] * first[2]):
            yield f"the sizes of its tensors are {sizes}"
    if not all(tensor.isfinite().all() for tensor in found.values()):
        yield "it holds NaN or infinity"
