"""The demo's data: what scikit-learn and Python itself carry, so that nothing is fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

Examples = list[dict[str, torch.Tensor]]
"""One dictionary of tensors per example, without a batch axis: a dataset as `Trainer` takes it."""

WINDOW = 64
"""Tokens in a window of text."""

VOCABULARY = 512
"""Tokens of the byte-level BPE: 256 bytes, one end of text, the rest learned; few, so that a short training does."""


@dataclass(frozen=True)
class Data:
    """Examples to train on, examples that are never trained on, and the tokenizer if there is one."""

    train: Examples
    held_out: Examples
    processor: Any = None


def stack(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of examples: each tensor gets a batch axis in front."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def load_digits() -> Data:
    """Scikit-learn's 1,797 scans of handwritten digits, 8x8 with values 0 to 16, scaled to [-1, 1]; 397 held out."""
    from sklearn.datasets import load_digits as load  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    scans, labels = load(return_X_y=True)
    pixels = torch.tensor(scans, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    examples = [
        {"pixel_values": image, "labels": torch.tensor(int(label))}
        for image, label in zip(pixels, labels, strict=True)
    ]
    train, held_out = train_test_split(examples, test_size=397, random_state=0, stratify=labels)
    return Data(train, held_out)


def load_topics() -> Data:
    """
    The language reference that ships with Python, as windows of tokens; some topics are held out as a whole.

    The tokenizer is trained on the same topics as the model, and on no others.
    """
    from pydoc_data.topics import topics

    held_out = held_out_topics(topics)
    train_texts = [text for name, text in sorted(topics.items()) if name not in held_out]
    tokenizer = train_tokenizer(train_texts)
    return Data(
        train=windows(tokenizer, train_texts),
        held_out=windows(tokenizer, [topics[name] for name in held_out]),
        processor=tokenizer,
    )


def held_out_topics(topics: Mapping[str, str]) -> list[str]:
    """
    Every fifth of those topics that share no long line with another.

    Many do: "compound" holds "if", "for" and "while" word for word, and a model trained on it has seen them.
    """
    lines = {name: {line.strip() for line in text.splitlines() if len(line) > 40} for name, text in topics.items()}
    holders = Counter(line for found in lines.values() for line in found)
    alone = [name for name in sorted(topics) if all(holders[line] == 1 for line in lines[name])]
    return alone[::5]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Examples:
    """The texts in a row, each with an end-of-text token, cut into windows of `WINDOW` tokens; the rest is dropped."""
    tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).reshape(-1, WINDOW)
    return [{"input_ids": row, "labels": row} for row in rows]
