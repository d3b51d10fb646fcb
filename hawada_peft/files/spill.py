"""Tensors kept in files instead of memory."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Spill:
    """
    Copies tensors into memory-mapped files, whose pages the system drops and reads again as it needs memory.

    A file has no name any more once it is mapped: its room on the disk is free when its tensor is gone, and nothing is
    left whatever becomes of the process.

    Args:
        folder (`Path`): on the disk that is to hold them; one in memory (`tmpfs`) would win nothing.
    """

    folder: Path

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        A copy of a tensor, on the CPU, in a file.

        Raises:
            OSError: if the disk is full.
        """
        tensor = tensor.cpu().contiguous()
        if not tensor.numel():
            return tensor
        handle, name = tempfile.mkstemp(dir=self.folder)
        try:
            with open(handle, "wb") as file:
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            return torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        finally:
            os.unlink(name)
