"""YAML that people write: what is read, and what is refused in bounded time with one short message."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawada_peft.errors import HawAdaError
from hawada_peft.recipes import Recipe
from hawada_peft.recipes.document import MOST_BYTES, parsed, read_mapping

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "aliases that multiply": (LAUGHS, "aliases are not taken"),
    "an alias of itself": ("a: &a [*a]", "aliases are not taken"),
    "merged": ("a: &a {b: 1}\nc: {<<: *a}", "aliases are not taken"),
    "twice": ("model: a\nmodel: b", "'model' is there twice"),
    "twice, deep": ("training: {learning_rate: 1, learning_rate: 2}", "'learning_rate' is there twice"),
    "no word": ("1: 2", "names must be words"),
    "a list as a name": ("[1, 2]: 3", "names must be words"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "deep at most"),
    "a huge number": ("seed: " + "9" * 5000, "a number of 5000 characters"),
    "a huge float": ("seed: 0." + "9" * 5000, "a number of 5002 characters"),
    "too large": ("model: " + "x" * MOST_BYTES, "are read"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no date": ("a: 2024-99-99", "is no YAML that is taken"),
    "a list": ("[1]", "must hold a mapping"),
    "nothing": ("", "must hold a mapping"),
    "no YAML": ("a: [", "is no YAML that is taken"),
    "control characters": ("a: \x00", "is no YAML that is taken"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_is_refused(tmp_path: Path, case: str) -> None:
    text, message = REFUSED[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(HawAdaError, match=message) as error:
        read_mapping(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(HawAdaError, match="UTF-8"):
        read_mapping(tmp_path / "recipe.yaml")


def test_long_words_are_not_told_in_full(tmp_path: Path) -> None:
    word = "x" * 100_000
    (tmp_path / "recipe.yaml").write_text(
        f"model: m\noutput: o\ndata: {word}\n{word}: 1\ndtype: {word}\nkeep_ratio: {word}"
    )
    with pytest.raises(HawAdaError) as error:
        Recipe.read(tmp_path / "recipe.yaml")
    assert len(str(error.value)) < 2000


def test_numbers_are_those_of_yaml_1_2() -> None:
    assert parsed("{a: 1e-4, b: -2E+3, c: 1.5, d: 7, e: e4, f: yes}", "here") == {
        "a": 1e-4,
        "b": -2000.0,
        "c": 1.5,
        "d": 7,
        "e": "e4",
        "f": True,
    }
