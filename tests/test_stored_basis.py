"""A basis as a file, and the turn that a plan asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, Row, build
from safetensors.torch import save_file
from test_basis import basis_plan, random_basis

from hawada_peft import Plan, Shape
from hawada_peft.basis.bases import Bases, plan_turn
from hawada_peft.basis.stored import load_basis, save_basis
from hawada_peft.errors import HawAdaError, InvalidPlanError
from hawada_peft.vanilla.family import locate


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])
def test_a_file_gives_the_basis_back(row: Row, tmp_path: Path) -> None:
    basis = random_basis(build(row))
    save_basis(Bases(basis), tmp_path / "plan.basis.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.basis.safetensors"]
    found, heads = (bases := load_basis(tmp_path / "plan.basis.safetensors")).stream, bases.heads
    assert found is not None
    assert heads is None
    assert found.centred == basis.centred
    for name in ("vectors", "scales", "marks"):
        assert torch.equal(getattr(found, name), getattr(basis, name).float())


def test_what_is_no_basis_is_refused(tmp_path: Path) -> None:
    basis, path = random_basis(build(LM_ROW)), tmp_path / "basis"
    path.write_text("nothing")
    with pytest.raises(HawAdaError, match="holds no basis"):
        load_basis(path)
    save_file({"vectors": torch.zeros(2, 2)}, path)
    with pytest.raises(HawAdaError, match="holds no basis"):
        load_basis(path)
    save_basis(Bases(replace(basis, vectors=basis.vectors[:, :5])), path)
    with pytest.raises(HawAdaError, match="sizes of its tensors"):
        load_basis(path)
    save_basis(Bases(replace(basis, vectors=basis.vectors * float("nan"))), path)
    with pytest.raises(HawAdaError, match="NaN or infinity"):
        load_basis(path)
    with pytest.raises(FileNotFoundError):
        load_basis(tmp_path / "none")


def test_only_plans_of_directions_turn_the_stream() -> None:
    model = build(LM_ROW)
    basis = random_basis(model)
    assert plan_turn(model, Plan.keep_all(locate(model).dense), Bases(basis)) is None
    plan = basis_plan(model, Shape(), 44)
    turn = plan_turn(model, plan, Bases(basis))
    assert turn is not None
    assert turn.stream is not None
    assert turn.stream.size == 44
    with pytest.raises(InvalidPlanError, match="there is no basis"):
        plan_turn(model, plan, Bases())
