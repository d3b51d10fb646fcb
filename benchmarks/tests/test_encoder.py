"""How embeddings are compared, and what text they are of."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import encoder
import numpy as np
import pytest
import torch
from encoder_text import Drawn, Frame, Sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import PreTrainedTokenizerFast


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


SENTENCES = [[f"The {name} of {place} goes home to rest a while." for place in range(5)] for name in ("cat", "dog")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for each in SENTENCES for text in each for word in text.lower().strip(".").split()})
    vocabulary = {
        word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "##e", "th", *words])
    }
    vocabulary.pop("the")
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def drawn(text: Sentences, count: int, **options: Any) -> Drawn:
    given = {"most": 1, "crops": 0.0, "length": 64, "batch": 4} | options
    return text.draw(count, np.random.default_rng(0), **given)


def test_examples_are_sentences_in_a_row_of_one_document(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Sentences(SENTENCES, tokenizer)
    singles = {part.lower() for each in SENTENCES for part in each}
    expected = {tuple(tokenizer(part)["input_ids"]) for part in singles}
    assert {tuple(each["input_ids"].tolist()) for each in drawn(text, 10)} == expected
    together = {
        tuple(tokenizer(" ".join(each[i : i + n]))["input_ids"])
        for each in SENTENCES
        for n in (1, 2, 3)
        for i in range(5)
    }
    many = drawn(text, 60, most=3)
    assert {tuple(each["input_ids"].tolist()) for each in many} <= together
    assert 10 < many.distinct == len({tuple(each["input_ids"].tolist()) for each in many}) <= 24
    assert many.first(10).tokens < many.tokens


def test_crops_begin_and_end_at_words_and_are_not_too_long(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Sentences(SENTENCES, tokenizer)
    found = drawn(text, 200, most=3, crops=1.0, length=20)
    assert found.distinct > drawn(text, 200, most=3, length=20).distinct
    continued = tokenizer.convert_tokens_to_ids("##e")
    for each in found:
        ids = each["input_ids"].tolist()
        assert (ids[0], ids[-1]) == (2, 3)
        assert len(ids) <= 20
        assert ids[1] != continued


def test_batches_hold_what_is_alike_and_the_mask_says_what_is_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    found = drawn(Sentences(SENTENCES, tokenizer), 40, most=3)
    lengths = (found.end - found.begin).reshape(-1, 4)
    assert (lengths.max(1) - lengths.min(1)).mean() < 0.5 * (lengths.max() - lengths.min())
    batch = Frame.of(tokenizer).batch([found[place] for place in range(4)])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["attention_mask"].sum(1).tolist() == [length + 2 for length in lengths[0]]
    assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 0).all())


def test_the_rate_is_a_whole_cosine_over_steps_or_seconds() -> None:
    for seconds in (math.inf, 1e-9):
        group, state = {"lr": 1.0, "initial_lr": 2.0}, SimpleNamespace(global_step=0, max_steps=40)
        control, cosine = SimpleNamespace(should_training_stop=False), encoder.Cosine(seconds)
        optimizer, rates = SimpleNamespace(param_groups=[group]), []
        cosine.on_train_begin(None, state, control)
        while not control.should_training_stop:
            cosine.on_step_begin(None, state, control, optimizer=optimizer)
            rates.append(group["lr"])
            state.global_step += 1
            cosine.on_step_end(None, state, control)
        assert len(rates) == cosine.steps == (40 if seconds == math.inf else 1)
        assert rates[-1] < 0.01
        assert max(rates) <= 2
