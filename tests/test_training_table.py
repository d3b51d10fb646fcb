"""The table of trainings in docs/families.md: every modality has its line, and what makes it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from training_table import BEGIN, END, MODALITIES, PAGE, line, slimmed
from zoo import ZOO


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWADA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_every_modality_has_its_line() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    told = [row.split(" | ")[:2] for row in table.splitlines()[2:]]
    assert told == [[f"| {name}", ZOO[each.kind].model] for name, each in MODALITIES.items()], (
        "run `make test-training`"
    )


@pytest.mark.parametrize("name", ["images", "text and images, two encoders"])
def test_a_training_holds(name: str) -> None:
    found = slimmed(name)
    assert found.holds(), line(name, found)
    assert len(found.cut) == max(1, len(MODALITIES[name].towers))
