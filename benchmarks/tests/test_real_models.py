"""Text out of packages, parted by document."""

from __future__ import annotations

import real_models


def test_what_is_held_out_is_in_no_other_document() -> None:
    modules = [(f"package/{index}.py", [f"text {index}", f"shared {index % 7}"]) for index in range(200)]
    train, held = real_models.parted(modules)
    assert len(train) > 4 * len(held) > 0
    pieces = [set("\n\n".join(part).split("\n\n")) for part in (train, held)]
    assert not pieces[0] & pieces[1]
    assert pieces[0] | pieces[1] == {text for _, texts in modules for text in texts}
    assert real_models.parted(modules) == (train, held)


def test_docstrings_of_an_installed_package() -> None:
    found = dict(real_models.documents("peft.tuners.lora"))
    assert found
    assert all(len(text) >= real_models.SHORTEST for texts in found.values() for text in texts)
    assert not list(real_models.documents("no_such_package"))
