"""The table: what it estimates, what it refuses, and how it is measured, on a machine that obeys a law."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hawada_peft import Shape
from hawada_peft.errors import IncompatibleTableError, UncachedTableWarning
from hawada_peft.latency.build import build_table, choose_pairs, random_shapes
from hawada_peft.latency.cache import cached_table, table_key
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.fit import mixed_table
from hawada_peft.latency.interpolate import bilinear, linear, smooth
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.table import LatencyTable, Realised
from hawada_peft.latency.toy import ToyClock
from hawada_peft.vanilla.legality import head_shapes

DENSE = Shape(16, 4, 1024, 8)
BASE_SIZES = {"model_type": "toy", "hidden_size": 64, "head_dim": 4, **DENSE.sizes()}
REGIME = Regime(mode="prefill", seq_len=8)


def law(shape: Shape) -> float:
    """Milliseconds of a machine on which FFN sizes are slow that are not a multiple of 16."""
    heads, groups, ffn, layers = shape.sizes().values()
    channels = 0.002 * ffn * (1.5 if ffn % 16 else 1.0)
    missing = (1 - heads / 16) * (1 - ffn / 1024)
    width = (shape.hidden_size or 64) / 64
    return 0.7 + layers * (0.1 + width * (0.05 * heads + 0.03 * groups + channels + 0.1 * missing))


class Built(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape


EFFORT = Effort(warmup=0, min_rounds=2, clock=ToyClock(lambda model, regime: law(model.shape)))


def make(dense: Shape = DENSE, base_sizes: Mapping[str, int | str] = BASE_SIZES, **options: Any) -> LatencyTable:
    heads = head_shapes(dense)
    return build_table(
        Built, dense=dense, heads=heads, base_sizes=base_sizes, regime=REGIME, **({"effort": EFFORT} | options)
    )


@pytest.fixture
def table() -> LatencyTable:
    return make()


def test_linear_interpolation_meets_its_knots_and_goes_on() -> None:
    values = torch.tensor([1.0, 3.0, 4.0])
    x = torch.tensor([0.0, 1.0, 2.0, 4.0, 6.0], requires_grad=True)
    y = linear(x, (1, 2, 4), values)
    assert y.tolist() == [-1.0, 1.0, 3.0, 4.0, 5.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 0.5, 0.5, 0.5]


def test_bilinear_interpolation_meets_its_knots() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 8.0]])
    x, y = torch.tensor([1.0, 2.0, 1.5]), torch.tensor([3.0, 5.0, 4.0])
    assert bilinear(x, y, (1, 2), (3, 5), values).tolist() == [1.0, 8.0, 3.5]
    assert bilinear(x, y, (1,), (3,), values[:1, :1]).tolist() == [1.0, 1.0, 1.0]


def test_residuals_fall_to_nothing_far_from_any_point() -> None:
    points, residuals = torch.zeros(1, 2), torch.ones(1)
    near, far = smooth(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), points, residuals, width=1.0, prior=1.0)
    assert near == pytest.approx(0.5)
    assert far == pytest.approx(0.0, abs=1e-9)
    assert smooth(torch.ones(3, 2), points[:0], residuals[:0], width=1.0, prior=1.0).tolist() == [0, 0, 0]


def test_a_table_reproduces_the_law_of_its_machine(table: LatencyTable) -> None:
    shapes = random_shapes(DENSE, head_shapes(DENSE), table.multiple, 40, seed=7)
    errors = [abs(table.estimate(shape) / law(shape) - 1) for shape in shapes]
    assert max(errors) < 0.01
    assert table.dense_ms == pytest.approx(law(DENSE), rel=0.01)
    assert table.fixed_ms == pytest.approx(0.7, rel=0.1)
    assert table.errors["median"] < 0.01


def test_a_table_of_a_narrower_stream_is_on_the_scale_of_the_dense_model() -> None:
    widest = replace(DENSE, hidden_size=32)
    table = make(base_sizes=BASE_SIZES | {"hidden_size": 32, "dense_hidden_size": 64}, widest=widest)
    shapes = random_shapes(widest, head_shapes(DENSE), table.multiple, 40, seed=7)
    assert {shape.hidden_size for shape in shapes} == {32}
    assert max(abs(table.estimate(shape) / law(shape) - 1) for shape in shapes) < 0.01
    assert table.dense_ms == pytest.approx(law(DENSE), rel=0.01)
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    with pytest.raises(IncompatibleTableError, match=r"hidden_size of 32, asked 48.*hidden_size=48"):
        table.estimate(Shape(hidden_size=48))


def test_tables_of_several_calls_are_added(table: LatencyTable) -> None:
    """Their laws, their multiples and the sizes that were timed differ; what is estimated is the weighted sum."""

    def other(shape: Shape) -> float:
        heads, groups, ffn, layers = shape.sizes().values()
        return 0.2 + layers * (0.3 + 0.01 * heads * groups + 0.0004 * max(ffn, 512))

    clock = ToyClock(lambda model, regime: other(model.shape))
    steps = make(effort=replace(EFFORT, clock=clock, whole_shapes=8))
    assert (steps.multiple, table.multiple) != (16, 16)
    mixed = mixed_table(REGIME, [(1, table), (20, steps)])
    assert mixed.dense_ms == pytest.approx(law(DENSE) + 20 * other(DENSE), rel=0.01)
    assert mixed.multiple == 16
    assert DENSE in {point.shape for point in mixed.realised}
    shapes = random_shapes(DENSE, head_shapes(DENSE), 16, 40, seed=7)
    assert max(abs(mixed.estimate(s) / (law(s) + 20 * other(s)) - 1) for s in shapes) < 0.02
    twice = mixed_table(REGIME, [(1, table), (1, table)])
    assert twice.realised == tuple(Realised(point.shape, 2 * point.ms) for point in table.realised)
    assert twice.estimate(shapes[0]) == pytest.approx(2 * table.estimate(shapes[0]), rel=1e-3)
    assert LatencyTable.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed


def test_a_table_says_when_it_is_no_model(table: LatencyTable) -> None:
    assert not table.poor
    rng = np.random.default_rng(0)
    shaken = [Realised(point.shape, float(rng.uniform(0.5, 2)) * point.ms) for point in table.realised]
    assert "no model of prefill 1x8" in table.with_realised(shaken).poor


def test_the_multiple_is_found(table: LatencyTable) -> None:
    assert table.multiple == 16
    assert all(size % 16 == 0 for size in table.ffn_sizes)


def test_what_is_left_out_of_a_shape_is_dense(table: LatencyTable) -> None:
    assert table.estimate(Shape()) == table.estimate(DENSE)


def test_parts_are_where_the_milliseconds_go(table: LatencyTable) -> None:
    half = Shape(intermediate_size=table.dense.sizes()["intermediate_size"] // 2)
    dense = table.parts(table.dense)
    fewer = table.parts(half)
    for parts, shape in ((dense, table.dense), (fewer, half)):
        assert sum(parts.values()) == pytest.approx(table.estimate(shape))
        assert min(parts.values()) >= 0
    assert fewer["FFN"] < 0.7 * dense["FFN"]
    assert fewer["attention"] == pytest.approx(dense["attention"], rel=0.2)


def test_estimates_are_vectorised(table: LatencyTable) -> None:
    shapes = random_shapes(DENSE, head_shapes(DENSE), 8, 10, seed=1)
    columns = np.array(
        [[s.num_key_value_heads, s.heads_per_group, s.intermediate_size, s.num_hidden_layers] for s in shapes]
    )
    many = table.estimate_sizes(*columns.T)
    np.testing.assert_allclose(many, [table.estimate(shape) for shape in shapes])


def test_shapes_that_were_realised_correct_the_table(table: LatencyTable) -> None:
    slower = [Realised(point.shape, 1.2 * point.ms) for point in table.realised]
    corrected = table.with_realised(slower)
    shape = Shape(8, 4, 512, 4)
    assert corrected.estimate(shape) == pytest.approx(1.2 * table.estimate(shape), rel=0.02)
    assert len(corrected.realised) == len(table.realised)


def test_noise_never_leads_below_zero(table: LatencyTable) -> None:
    # Costs as they come out when the shallow models were timed while the machine was busy.
    noisy = replace(table, fixed_ms=-2 * table.dense_ms, realised=()).with_realised(table.realised[:2])
    assert noisy.scale * (noisy.fixed_ms + noisy.layer_ms) + noisy.offset_ms < 0
    estimates = noisy.estimate_sizes(1, 1, 8, np.arange(1, 9))
    assert (estimates > 0).all()
    assert (estimates.diff() > 0).all()
    assert all(np.isfinite(error) for error in noisy.errors.values())


def test_a_table_survives_json(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert loaded == table
    assert loaded.estimate(Shape(8, 2, 512, 4)) == table.estimate(Shape(8, 2, 512, 4))
    assert "LatencyTable(prefill 1x8" in str(loaded)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no latency table"), ("[1]", "holds a list"), ('{"format": 9}', "format 9"), ('{"format": 3}', "lacks")],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(IncompatibleTableError, match=message):
        LatencyTable.load(path)


def test_a_table_for_something_else_is_refused(table: LatencyTable) -> None:
    table.check(regime=REGIME, base_sizes=BASE_SIZES, device_name=table.device_name)
    for regime, sizes, message in (
        (replace(REGIME, dtype="bfloat16"), BASE_SIZES, "dtype: table float32, asked bfloat16"),
        (replace(REGIME, batch_size=4), BASE_SIZES, "batch_size: table 1, asked 4"),
        (REGIME, BASE_SIZES | {"hidden_size": 128}, "hidden_size: table 64, asked 128"),
    ):
        with pytest.raises(IncompatibleTableError, match=message):
            table.check(regime=regime, base_sizes=sizes, device_name=table.device_name)
    elsewhere = replace(table, device_name="another device")
    with pytest.raises(IncompatibleTableError, match="device name: table another device"):
        elsewhere.check(regime=REGIME, base_sizes=BASE_SIZES)


# -------------------------------------------------------------------------------------------------------------- cache


def kept(
    table: LatencyTable | None,
    effort: Effort,
    regime: Regime = REGIME,
    base_sizes: Mapping[str, int | str] = BASE_SIZES,
) -> LatencyTable:
    """The table of a key: `table` if one is measured, which must not be if that is None."""

    def make() -> LatencyTable:
        assert table is not None, "measured again"
        return table

    return cached_table(make, table_key(regime, base_sizes, head_shapes(DENSE), effort), effort)


def test_tables_are_kept_by_what_they_depend_on(
    table: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effort = replace(EFFORT, cache=tmp_path)
    first = kept(table, effort)
    assert kept(None, effort) == first
    assert kept(None, replace(effort, candidates=7)) == first  # no part of a table
    for other in ({"regime": replace(REGIME, dtype="bfloat16")}, {"base_sizes": BASE_SIZES | {"hidden_size": 32}}):
        with pytest.raises(AssertionError, match="measured again"):
            kept(None, effort, **other)
    for further in (replace(effort, min_rounds=3), replace(effort, fresh=True), replace(effort, clock=Clock())):
        with pytest.raises(AssertionError, match="measured again"):
            kept(None, further)
    monkeypatch.setenv("HAWADA_CACHE", str(tmp_path / "elsewhere"))
    kept(table, EFFORT)
    (file,) = (tmp_path / "elsewhere").iterdir()
    assert LatencyTable.load(file) == table


def test_nothing_is_kept_without_a_cache(table: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWADA_CACHE", str(tmp_path / "cache"))
    kept(table, replace(EFFORT, cache=False))
    assert not (tmp_path / "cache").exists()


def test_what_did_not_settle_is_not_kept(table: LatencyTable, tmp_path: Path) -> None:
    effort = replace(EFFORT, cache=tmp_path)
    assert kept(replace(table, unsettled="3 of 4 timers"), effort).unsettled
    assert list(tmp_path.iterdir()) == []
    assert kept(table, effort) == table


@pytest.mark.parametrize("damage", ["cut", "empty", "binary", "another model's", "unsettled", "not a number"])
def test_a_damaged_table_is_measured_again(
    table: LatencyTable, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    effort = replace(EFFORT, cache=tmp_path)
    kept(table, effort)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    file.write_bytes(
        {
            "cut": text[:-100].encode(),
            "empty": b"",
            "binary": b"\xff\xfe\x00",
            "another model's": text.replace('"hidden_size": 64', '"hidden_size": 32').encode(),
            "unsettled": text.replace('"unsettled": ""', '"unsettled": "1 of 2"').encode(),
            "not a number": text.replace('"layer_ms": ', '"layer_ms": NaN, "was": ').encode(),
        }[damage]
    )
    assert kept(table, effort) == table
    assert ("measured again" in caplog.text) == (damage != "unsettled")
    assert kept(None, effort) == table


@pytest.mark.parametrize("obstacle", ["a file in its place", "no room"])
def test_a_cache_that_cannot_be_written_costs_nothing_but_a_warning(
    table: LatencyTable, tmp_path: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    if obstacle == "no room":

        def full(_file: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:
        folder.write_text("")
    with pytest.warns(UncachedTableWarning, match=r"cannot be kept for later.*Effort\(cache=") as caught:
        assert kept(table, replace(EFFORT, cache=folder)) == table
    assert [warning.filename for warning in caught] == [__file__]
    assert list(tmp_path.rglob("*")) == [folder]


BROKEN: dict[str, Any] = {
    "layer_ms": [float("nan"), None, "1", True, 1e9, -1.0],
    "fixed_ms": [float("inf"), {}],
    "dense_ms": [0.0, -1.0, float("nan")],
    "scale": [0.0, -1.0, 100.0],
    "attention_ms": [[], [[0.0]], [[-5.0] * 4] * 4, "no"],
    "ffn_ms": [[0.0], None],
    "ffn_sizes": [[], [3, 2, 1], [1.5]],
    "kv_groups": [[1, 1], "1234"],
    "multiple": [0, 1.5],
    "realised": [[{"shape": {}, "ms": 0.0}], [{"ms": 1.0}], [None]],
    "errors": [{"median": float("nan")}, []],
    "base_sizes": [{}, None],
    "regime": [{"mode": "sideways"}, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BROKEN.items() for value in values])
def test_no_table_of_impossible_numbers_is_read(table: LatencyTable, name: str, value: Any) -> None:
    data = json.loads(json.dumps(table.to_dict())) | {name: value}
    with pytest.raises(IncompatibleTableError, match="damaged"):
        LatencyTable.from_dict(data)


def test_a_grid_of_heads_is_thinned_with_its_ends_kept() -> None:
    heads = head_shapes(Shape(64, 64, 8, 1))
    chosen = choose_pairs(heads, 20)
    assert len(chosen) <= 20
    assert {heads[0], heads[-1]} <= set(chosen)


def test_random_shapes_differ_and_are_never_dense() -> None:
    shapes = random_shapes(DENSE, head_shapes(DENSE), 64, 20, seed=0)
    assert len(set(shapes)) == 20
    assert DENSE not in shapes
    assert all(shape.sizes()["intermediate_size"] % 64 == 0 for shape in shapes)


def test_one_layer_is_enough_for_a_table() -> None:
    single = Shape(2, 2, 64, 1)
    table = make(single, BASE_SIZES | single.sizes(), effort=replace(EFFORT, whole_shapes=4))
    assert table.estimate(Shape(1, 1, 32, 1)) == pytest.approx(law(Shape(1, 1, 32, 1)), rel=0.05)
