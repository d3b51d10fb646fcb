"""Texts and chats out of files, as the tokenizer of a model reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import LM_ROW, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hawada_peft.errors import HawAdaError
from hawada_peft.recipes.readers import load_examples

TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
WORDS = ["<unk>", "</s>", "user", "assistant", *"abcdefgh"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build(LM_ROW).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def read(path: Path, model: Path) -> list[str]:
    tokens = load_examples(path, str(model), length=3)["input_ids"]
    return [" ".join(WORDS[token] for token in row) for row in tokens.tolist()]


def test_a_markdown_file_is_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("a b c d e f g")
    assert read(tmp_path / "x.md", model) == ["a b c", "d e f"]


def test_lines_are_texts_with_an_end_or_chats_through_the_template(model: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"text": "c d"}, {"messages": chat}, {"text": "e"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "x.jsonl", model) == ["c d </s>", "user a assistant", "b e </s>"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 must be an object"),
        ('{"words": "a"}', r"line 2 has neither a text nor messages, but \['words'\]"),
        ('{"messages": [1]}', "line 2 is no chat"),
    ],
)
def test_other_lines_are_refused_by_their_number(model: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(HawAdaError, match=message):
        read(tmp_path / "x.jsonl", model)
