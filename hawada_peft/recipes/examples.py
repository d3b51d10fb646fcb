"""A recipe's data: examples to train on, and examples that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from ..errors import HawAdaError
from ..vanilla.loading import load_skeleton
from .readers import load_examples, tokens_of
from .settings import DataSource

Example = dict[str, torch.Tensor]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SOUNDS = (".wav",)


class Rows(Dataset[Example]):
    """
    Examples that are in memory.

    Args:
        tensors: (examples, ...) by the names of forward arguments.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class Pictures(Dataset[Example]):
    """
    Images of a folder, read when they are asked for.

    Args:
        folder: with images in it, or in folders of it.
        model: where the image processor is.

    Raises:
        HawAdaError: if there are no images.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
        if not self.paths:
            raise HawAdaError(f"{folder} holds no images ({', '.join(IMAGES)})")
        self.processor: Any = AutoImageProcessor.from_pretrained(model)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        # Here: only recipes with a folder of images need the library.
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return {"pixel_values": self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]}


class Sounds(Dataset[Example]):
    """
    Audio files of a folder, read when they are asked for, cut or padded to one length as the model's feature extractor
    does it.

    Args:
        folder: with `.wav` files in it, or in folders of it.
        model: where the feature extractor is.
        seconds: of each, at most and at least.

    Raises:
        HawAdaError: if there is no audio; on reading a file, if its sampling rate is not the extractor's.
    """

    def __init__(self, folder: Path, model: str, seconds: float = 5.0) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SOUNDS)
        if not self.paths:
            raise HawAdaError(f"{folder} holds no audio ({', '.join(SOUNDS)})")
        self.extractor: Any = AutoFeatureExtractor.from_pretrained(model)
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        # Here: only a folder of audio needs the library.
        from scipy.io import wavfile  # type: ignore[import-untyped]

        rate, samples = wavfile.read(self.paths[index])
        if rate != self.extractor.sampling_rate:
            raise HawAdaError(
                f"{self.paths[index]} has {rate} samples a second, the model takes {self.extractor.sampling_rate}: "
                "resample it first"
            )
        if np.issubdtype(samples.dtype, np.integer):
            samples = samples / np.iinfo(samples.dtype).max
        mono = samples if samples.ndim == 1 else samples.mean(-1)
        length = round(self.seconds * rate)
        mono = np.pad(mono[:length], (0, max(0, length - len(mono))))
        made = self.extractor(mono.astype(np.float32), sampling_rate=rate, return_tensors="pt")
        return {name: tensor[0] for name, tensor in made.items()}


def load_data(source: DataSource, model: str, seed: int) -> tuple[Dataset[Example], Dataset[Example]]:
    """
    The examples of a recipe.

    Args:
        source: where they are.
        model: where the tokenizer or image processor is.
        seed: of the order.

    Returns:
        Those to train on, and those held out.

    Raises:
        HawAdaError: if there are too few, or of a kind that cannot be read.
    """
    examples = load_examples_of(source, model)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    order = order[: source.max_examples]
    if len(order) <= source.held_out:
        raise HawAdaError(
            f"there are {len(order)} examples, and {source.held_out} are to be held out: give more data, or a smaller "
            "data.held_out"
        )
    return Subset(examples, order[source.held_out :]), Subset(examples, order[: source.held_out])


def load_examples_of(source: DataSource, model: str) -> Any:
    """
    All examples, in their order.

    Args:
        source: where they are.
        model: where the tokenizer or processor is.

    Raises:
        HawAdaError: if they are of a kind that cannot be read, or are not for this model.
    """
    if source.dataset is not None:
        return _load_dataset(source, model)
    parts = [_read(Path(path), source, model) for path in source.paths()]
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def batches_from(examples: Dataset[Example], count: int, size: int) -> list[Example]:
    """The first examples, stacked into batches."""
    rows = [examples[index] for index in range(min(count, len(cast(Sized, examples))))]
    parts: Iterable[Sequence[Example]] = (rows[start : start + size] for start in range(0, len(rows), size))
    return [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


def _read(path: Path, source: DataSource, model: str) -> Dataset[Example]:
    if path.is_dir():
        sounds = load_skeleton(model).main_input_name in ("input_values", "input_features")
        return Sounds(path, model) if sounds else Pictures(path, model)
    return Rows(load_examples(path, model, length=source.seq_len))


def _load_dataset(source: DataSource, model: str) -> Any:
    # Here: only recipes that name a dataset need the library.
    from datasets import load_dataset

    data = load_dataset(source.dataset, source.config, split=source.split)
    vision = load_skeleton(model).main_input_name == "pixel_values"
    texts = "messages" if "messages" in data.column_names else "text"
    column = source.column or ("image" if vision else texts)
    if column not in data.column_names:
        raise HawAdaError(f"the dataset has no column {column!r}, but {data.column_names}: name one as data.column")
    if vision:
        processor: Any = AutoImageProcessor.from_pretrained(model)

        def pixels(rows: dict[str, Any]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in rows[column]]
            return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

        return data.with_transform(pixels)
    tokenizer = AutoTokenizer.from_pretrained(model)
    length = source.seq_len

    def windows(rows: dict[str, Any]) -> dict[str, Any]:
        found = (tokens_of({column: row}, tokenizer, source.dataset, column) for row in rows[column])
        tokens = [token for each in found for token in each]
        return {"input_ids": [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]}

    cut = data.map(windows, batched=True, remove_columns=data.column_names, desc="cutting windows")
    return cut.with_format("torch")
