"""
The safetensors format, read and written piece by piece.

`safetensors.save_file` needs a whole file in memory, and `safe_open` maps files: page faults cost several times the
processor time of plain reads. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""The format's names of dtypes, in the reverse of the order in which safetensors lays tensors out."""

FLOATS = {DTYPES[dtype] for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
"""What weights that are not quantised are stored as."""


RUN = 2**18
"""Bytes of neighbouring rows from which on rows are read one run at a time, and those between them skipped."""


@dataclass(frozen=True)
class Stored:
    """
    A tensor in a file.

    Args:
        file (`Path`): where it is.
        dtype (`str`): as the format names it.
        shape (`tuple[int, ...]`): its sizes.
        start (`int`): the position of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors in a safetensors file that `safe_open` has accepted, by key."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        key: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def read_rows(stored: Stored, rows: torch.Tensor) -> torch.Tensor:
    """
    Some entries of a tensor along its first dimension.

    Args:
        stored: where it is; a tensor without dimensions has one row.
        rows: which, in rising order.

    Returns:
        (rows, ...), in the dtype of the file.
    """
    dtype = next(dtype for dtype, name in DTYPES.items() if name == stored.dtype)
    shape = stored.shape[1:]
    width = math.prod(shape) * dtype.itemsize
    if len(rows) == 0:
        return torch.empty((0, *shape), dtype=dtype)
    first, count = int(rows[0]), len(rows)
    starts = [0, *((rows.diff() != 1).nonzero()[:, 0] + 1).tolist()]
    gathered = len(starts) * RUN > count * width and len(starts) > 1
    if gathered:
        starts, count = [0], int(rows[-1]) + 1 - first
    result = torch.empty((count, *shape), dtype=dtype)
    view = _bytes(result)
    with stored.file.open("rb", buffering=0) as opened:
        for start, end in zip(starts, [*starts[1:], count], strict=True):
            opened.seek(stored.start + int(rows[start]) * width)
            done, until = start * width, end * width
            while done < until:
                read = opened.readinto(view[done:until])
                if not read:
                    raise OSError(f"{stored.file} ends within a tensor")
                done += read
    return result.index_select(0, rows - first) if gathered else result


def read_all(stored: Stored) -> torch.Tensor:
    """A whole tensor of at least one dimension."""
    return read_rows(stored, torch.arange(stored.shape[0]))


def write_shard(
    path: Path, like: Mapping[str, torch.Tensor], parts_of: Callable[[str], Iterable[torch.Tensor]]
) -> None:
    """
    Write a safetensors file, with the same bytes as `safetensors.torch.save_file(..., metadata={"format": "pt"})`.

    Args:
        path: the file.
        like: per name a tensor of the dtype and shape to write; may be on the meta device.
        parts_of: called once per name, in the order of the file: the tensor's parts along its first dimension, all
            together of its size.

    Raises:
        RuntimeError: if a tensor's parts are of another dtype or size than announced.
    """
    order = list(DTYPES)
    names = sorted(like, key=lambda name: (-order.index(like[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + like[name].nbytes
        header[name] = {
            "dtype": DTYPES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = 0
            for part in parts_of(name):
                if part.dtype != like[name].dtype:
                    raise RuntimeError(f"{name} should be {like[name].dtype}, is {part.dtype}")
                written += _write(file, part)
            if written != like[name].nbytes:
                raise RuntimeError(f"{name} should have {like[name].nbytes} bytes, has {written}")


def _write(file: FileIO, tensor: torch.Tensor) -> int:
    """Write the tensor's bytes; one call of the system writes 2 GiB at most."""
    view = _bytes(tensor.detach().contiguous())
    done = 0
    while done < len(view):
        done += file.write(view[done:])
    return done


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
