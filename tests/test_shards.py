"""The safetensors writer against safetensors itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hawada_peft.files.shards import DTYPES, write_shard


def of_every_kind() -> dict[str, torch.Tensor]:
    """Every dtype, twice, in shapes and names that try alignment, sorting and escaping."""
    tensors = {}
    for index, dtype in enumerate(DTYPES):
        tensors[f"z{index % 3}.weight.{dtype}"] = torch.randint(0, 2, (3, 5)).to(dtype)
        tensors[f"a{index % 4}.{dtype}"] = torch.randint(0, 2, (index,)).to(dtype)
    return tensors | {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 4), 'naïve "\\ 层': torch.ones(1, 2, 3)}


def written(path: Path, tensors: dict[str, torch.Tensor], rows: int = 100) -> bytes:
    def parts(name: str) -> Iterator[torch.Tensor]:
        yield from tensors[name].split(rows) if tensors[name].ndim else [tensors[name]]

    write_shard(path, {name: tensor.to("meta") for name, tensor in tensors.items()}, parts)
    return path.read_bytes()


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_bytes_are_those_of_safetensors(tmp_path: Path, rows: int) -> None:
    tensors = of_every_kind()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert written(tmp_path / "mine", tensors, rows) == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("count", range(1, 9))
def test_header_is_padded_alike(tmp_path: Path, count: int) -> None:
    tensors = {"x" * count: torch.ones(2)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert written(tmp_path / "mine", tensors) == (tmp_path / "theirs").read_bytes()


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    written(tmp_path / "mine", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "mine")["x"], tensor)


@pytest.mark.parametrize(
    ("part", "facts"),
    [(torch.ones(3), "should have 8 bytes, has 12"), (torch.ones(1).double(), "should be .*float32")],
)
def test_parts_unlike_what_was_announced_are_refused(tmp_path: Path, part: torch.Tensor, facts: str) -> None:
    with pytest.raises(RuntimeError, match=facts):
        write_shard(tmp_path / "mine", {"x": torch.ones(2)}, lambda name: [part])
