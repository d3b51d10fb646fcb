"""How embeddings are compared, and what text they are of."""

from __future__ import annotations

import random

import encoder
import pytest
import torch
from torch.nn import functional


def test_agreement_of_the_same_and_of_other_embeddings() -> None:
    torch.manual_seed(0)
    dense, other = (functional.normalize(torch.randn(40, 16), dim=-1) for _ in range(2))
    assert encoder.agreement(dense, dense) == pytest.approx(
        dict.fromkeys(encoder.agreement(dense, dense), 1.0), abs=1e-5
    )
    found = encoder.agreement(dense, other)
    assert found["cosine_least"] < found["cosine_5_percent"] < found["cosine"] < 0.5
    assert abs(found["rank_correlation"]) < 0.3
    assert found["same_nearest"] < 0.5


def test_passages_are_sentences_in_a_row() -> None:
    documents = [[f"{name}{place}." for place in range(5)] for name in "abc"]
    found = encoder.passages(documents, 100, 3, random.Random(0))
    assert len(found) == len(set(found)) == 15
    assert all(passage in " ".join(documents["abc".index(passage[0])]) for passage in found)
    assert set(encoder.passages(documents, 100, 1, random.Random(0))) == {part for each in documents for part in each}
