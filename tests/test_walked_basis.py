"""The basis of a model larger than memory: that of the loaded model, without gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, LM_ROW, ROWS, VISION_ROW, Row, build, difference, logits_of
from test_low_memory import batches_of
from transformers import PreTrainedModel

from hawada_peft import slim_checkpoint
from hawada_peft.basis.basis import Basis
from hawada_peft.basis.find import directions_of
from hawada_peft.basis.marks import is_centred, stream_norms, weight_marks
from hawada_peft.basis.moments import collect_moments
from hawada_peft.basis.scales import fit_scales
from hawada_peft.errors import HawAdaError, UnsupportedModelError
from hawada_peft.vanilla.family import locate
from hawada_peft.walked import checkpoint_basis, walk_checkpoint

Batches = list[dict[str, torch.Tensor]]
WALKED = {"llama": LM_ROW, "vit": VISION_ROW} | {name: (ROWS | KINDS)[name] for name in ("dinov2", "llama-bare")}


def loaded_basis(model: PreTrainedModel, batches: Batches) -> Basis:
    """`find_basis`, but for the gradients."""
    layout, centred = locate(model), is_centred(model, locate(model))
    moments = replace(collect_moments(model, layout, batches), gradient=None)
    vectors = directions_of(moments, layout, centred)
    norms: Any = stream_norms(model, layout)
    scales = fit_scales(model, layout, batches, vectors, centred=centred)
    return Basis(vectors, scales, weight_marks([norm.weight for norm in norms]), centred)


@pytest.mark.parametrize(("name", "padded"), [*((name, False) for name in WALKED), ("llama", True)])
def test_the_basis_is_that_of_the_loaded_model(name: str, padded: bool, tmp_path: Path) -> None:
    row: Row = WALKED[name]
    model, batches = build(row), batches_of(LM_ROW if "vocab_size" in row.fields else VISION_ROW, padded=padded)
    model.save_pretrained(tmp_path / "base")
    found = checkpoint_basis(tmp_path / "base", batches, spill=tmp_path)
    expected = loaded_basis(model, batches)
    assert found.centred == expected.centred == (name in ("vit", "dinov2"))
    assert torch.equal(found.marks, expected.marks)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(64), rtol=0, atol=1e-5)
    for count in (8, 24, 48):
        one, other = found.vectors[:, :count], expected.vectors[:, :count]
        torch.testing.assert_close(one @ one.T, other @ other.T, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-3, atol=1e-4)
    assert (found.scales[:-1] != 1).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_narrower_model_comes_from_the_files_alone(tmp_path: Path) -> None:
    model, batches = build(LM_ROW), batches_of(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    basis = checkpoint_basis(tmp_path / "base", batches)
    plan = walk_checkpoint(tmp_path / "base", batches, basis=basis).plan(replace(LM_ROW.slim, hidden_size=56))
    assert plan.rotated
    assert plan.hidden == tuple(range(56))
    assert plan.shape == replace(LM_ROW.slim, hidden_size=56)
    options: Any = {"plan": plan, "basis": basis, "calibration": batches}
    walked = slim_checkpoint(tmp_path / "base", None, tmp_path / "walked", low_memory=True, **options)
    assert walked.reconstruction
    assert walked.reconstruction.applied
    slim_checkpoint(tmp_path / "base", None, tmp_path / "loaded", **options)
    one, other = (type(model).from_pretrained(tmp_path / name) for name in ("walked", "loaded"))
    assert one.config.hidden_size == 56
    assert difference(logits_of(one), logits_of(other)) < 1e-3


def test_what_gives_no_basis_is_refused(tmp_path: Path) -> None:
    build(LM_ROW).save_pretrained(tmp_path / "base")
    few = [{"input_ids": torch.arange(3, 15)[None]}]
    with pytest.raises(HawAdaError, match="12 positions"):
        checkpoint_basis(tmp_path / "base", few)
    with pytest.raises(HawAdaError, match="at least one"):
        checkpoint_basis(tmp_path / "base", [])
    build(KINDS["gemma2"]).save_pretrained(tmp_path / "normed")
    with pytest.raises(UnsupportedModelError, match="residual stream"):
        checkpoint_basis(tmp_path / "normed", batches_of(LM_ROW))
