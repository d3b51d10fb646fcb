"""Classes drawn by logits."""

from __future__ import annotations

import pytest
import torch

from hawada_peft.errors import HawAdaError
from hawada_peft.vanilla.draws import draw_classes

DRAWS = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 16, 17])
def test_classes_come_as_often_as_they_are_probable(classes: int) -> None:
    logits = 2 * torch.randn(classes)
    counts = torch.bincount(draw_classes(logits.expand(DRAWS, -1), seeded()), minlength=classes)
    expected = DRAWS * logits.double().softmax(-1)
    assert len(counts) == classes
    assert ((counts - expected).square() < 25 * (expected + 1)).all()  # five standard deviations


def test_every_position_by_its_own_logits() -> None:
    wanted = torch.randint(50, (200,))
    logits = torch.zeros(200, 50).scatter(1, wanted[:, None], 100.0)
    assert torch.equal(draw_classes(logits, seeded()), wanted)


def test_an_impossible_class_never_comes() -> None:
    logits = torch.zeros(10).index_fill(0, torch.tensor([0, 3, 4, 5, 9]), -torch.inf)
    drawn = draw_classes(logits.expand(DRAWS, -1), seeded())
    assert drawn.unique().tolist() == [1, 2, 6, 7, 8]


def test_positions_are_drawn_independently() -> None:
    drawn = draw_classes(torch.zeros(DRAWS, 2, 4).flatten(0, 1), seeded()).reshape(DRAWS, 2)
    counts = torch.bincount(4 * drawn[:, 0] + drawn[:, 1], minlength=16)
    assert ((counts - DRAWS / 16).square() < 25 * DRAWS / 16).all()


def test_is_repeatable_and_leaves_the_callers_random_state() -> None:
    logits, state = torch.randn(50, 30), torch.get_rng_state()
    first = draw_classes(logits, seeded())
    assert torch.equal(first, draw_classes(logits, seeded()))
    assert not torch.equal(first, draw_classes(logits, seeded(1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_is_drawn_from_its_values() -> None:
    logits = torch.randn(50, 30).bfloat16()
    assert torch.equal(draw_classes(logits, seeded()), draw_classes(logits.float(), seeded()))


@pytest.mark.parametrize("values", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
def test_broken_logits_are_refused(values: list[float]) -> None:
    with pytest.raises(HawAdaError, match="NaN or infinity"):
        draw_classes(torch.tensor([[0.0, 0.0], values]), seeded())
