"""Text for sentence encoders: the sentences of documents, and examples that are drawn of them without end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from reconstruction import read_tokens
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SHORTEST, LONGEST = 30, 400
"""Characters of a sentence."""

LEAST = 8
"""Tokens of a crop."""

TOGETHER = 64
"""So many batches are sorted by length together."""

Example = dict[str, torch.Tensor]


def sentences_of(path: str, tokenizer: str, tokens: int) -> Iterator[list[str]]:
    """The sentences of each document at the head of a file of tokens, whose documents are framed by ids 0 and 1."""
    decode, stream = AutoTokenizer.from_pretrained(tokenizer), np.asarray(read_tokens(path)).reshape(-1)[:tokens]
    for document in np.split(stream, np.flatnonzero(stream <= 1)):
        text = " ".join(str(decode.decode(document, skip_special_tokens=True)).split())
        parts = [part.strip() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text)]
        yield [part for part in parts if SHORTEST <= len(part) <= LONGEST]


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around the tokens of a text, and fills batches up with."""

    before: list[int]
    after: list[int]
    pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        whole, inner = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
        place = next(start for start in range(len(whole)) if whole[start : start + len(inner)] == inner)
        return cls(whole[:place], whole[place + len(inner) :], int(tokenizer.pad_token_id or 0))

    def batch(self, examples: Sequence[Example]) -> Example:
        """Examples of one length, a multiple of eight: (examples, tokens) each."""
        longest = -(-max(len(each["input_ids"]) for each in examples) // 8) * 8
        ids = torch.full((len(examples), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length], mask[row, :length] = example["input_ids"], 1
        return {"input_ids": ids, "attention_mask": mask}


class Sentences:
    """
    The tokens of documents' sentences in a row.

    Args:
        documents: sentences of each.
        tokenizer: a fast one, which knows where words begin.
    """

    def __init__(self, documents: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> None:
        documents = [document for document in documents if document]
        coded = tokenizer(list(chain.from_iterable(documents)), add_special_tokens=False)
        rows = coded["input_ids"]
        self.frame = Frame.of(tokenizer)
        self.ids = np.fromiter(chain.from_iterable(rows), np.int64)
        self.bounds = np.cumsum([0, *map(len, rows)])
        """Where sentences begin, and the end of the last: (sentences + 1,)."""
        sizes = [len(document) for document in documents]
        self.ends = np.repeat(np.cumsum(sizes), sizes)
        """Of each sentence the first one of the next document."""
        words = np.fromiter(chain.from_iterable(coded.word_ids(row) for row in range(len(rows))), np.int64)
        begins = np.diff(words, prepend=-1) != 0
        begins[self.bounds[:-1]] = True
        self.words = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
        """Where the word of each token begins."""

    def draw(self, count: int, rng: np.random.Generator, *, most: int, crops: float, length: int, batch: int) -> Drawn:
        """
        Examples: every sentence is the first of one before any is twice.

        Args:
            count: how many.
            rng: by which they are drawn.
            most: sentences in a row at most, of one document.
            crops: the part of them that is cut at two words drawn at random.
            length: tokens of an example at most, with those around it.
            batch: examples whose lengths should be alike.
        """
        total = len(self.ends)
        rounds = [rng.permutation(total) for _ in range(-(-count // total))]
        first = np.concatenate(rounds)[:count]
        last = np.minimum(first + rng.integers(1, most + 1, count), self.ends[first])
        begin, end = self.bounds[first], self.bounds[last]
        cuts = np.sort(self.words[rng.integers(begin, end, (2, count))], axis=0)
        cut = (rng.random(count) < crops) & (cuts[1] - cuts[0] >= LEAST)
        begin, end = np.where(cut, cuts[0], begin), np.where(cut, cuts[1], end)
        end = np.minimum(end, begin + length - len(self.frame.before) - len(self.frame.after))
        return Drawn(self, *_alike(begin, end, batch, rng))


class Drawn(Dataset[Example]):
    """Slices of `Sentences`, from `begin` to `end`."""

    def __init__(self, text: Sentences, begin: np.ndarray, end: np.ndarray) -> None:
        self.text, self.begin, self.end = text, begin, end

    @property
    def distinct(self) -> int:
        """How many are different."""
        return len(np.unique(self.begin * (len(self.text.ids) + 1) + self.end))

    @property
    def tokens(self) -> int:
        """In all, without those around them."""
        return int((self.end - self.begin).sum())

    def first(self, count: int) -> Drawn:
        """So many of them, from the start."""
        return Drawn(self.text, self.begin[:count], self.end[:count])

    def all(self) -> list[Example]:
        """One after the other."""
        return [self[index] for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, index: int) -> Example:
        frame, inner = self.text.frame, self.text.ids[self.begin[index] : self.end[index]].tolist()
        return {"input_ids": torch.tensor([*frame.before, *inner, *frame.after])}


def _alike(begin: np.ndarray, end: np.ndarray, batch: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Examples in another order, in which those of a batch are about equally long."""
    order = []
    for start in range(0, len(begin), TOGETHER * batch):
        chunk = np.arange(start, min(start + TOGETHER * batch, len(begin)))
        chunk = chunk[np.argsort(end[chunk] - begin[chunk], kind="stable")]
        parts = [chunk[place : place + batch] for place in range(0, len(chunk), batch)]
        whole, rest = [each for each in parts if len(each) == batch], [each for each in parts if len(each) < batch]
        order += [whole[place] for place in rng.permutation(len(whole))] + rest
    places = np.concatenate(order)
    return begin[places], end[places]
