"""
The safetensors format, written tensor by tensor: `safetensors.save_file` needs a whole file in memory.

Format: https://huggingface.co/docs/safetensors. Reading is left to `safetensors.safe_open`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
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
    """The tensor's bytes, without a copy of them in memory. One call writes 2 GiB at most."""
    view = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < len(view):
        done += file.write(view[done:])
    return done
