"""What is found of a dozen types: axes, layers, gates' places, reasons; and that it is the model's."""

from __future__ import annotations

import pytest
from zoo import ZOO

from hawada_peft import inspect
from hawada_peft.discovery import Anatomy
from hawada_peft.errors import UnsupportedModelError


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("HAWADA_CACHE", str(tmp_path_factory.mktemp("cache")))


def found(name: str) -> Anatomy:
    return inspect(ZOO[name].make_config())


EXPECTED = {
    "llama": {"num_key_value_heads": "heads", "num_attention_heads": "heads", "hidden_size": "hidden"},
    "bert": {"hidden_size": "hidden", "num_attention_heads": "heads", "intermediate_size": "ffn"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_axes_are_found(name: str) -> None:
    anatomy = found(name)
    assert EXPECTED[name].items() <= {axis.name: axis.kind for axis in anatomy.axes}.items()
    for axis in anatomy.axes:
        assert axis.sizes[-1] == axis.units
        assert axis.places
        assert axis.rows


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="looked for a transformers model"):
        inspect(3)  # type: ignore[arg-type]
