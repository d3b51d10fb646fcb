"""Batches: what of them goes into a model, and data that no model can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM, LM_ROW, MIXED_ROW, ROWS, VISION_ROW, Row, build, gate, inputs_of, scattered_plan, state_of
from heads import HEADS
from peft import PeftModel, get_peft_model
from torch.utils.data import IterableDataset
from transformers import LlamaModel, TrainingArguments

from hawada_peft import (
    DistillTrainer,
    HawAdaConfig,
    HawAdaTrainer,
    LatencyBudget,
    collect_gates,
    find_plan,
    init_gates,
    recover,
)
from hawada_peft.errors import BadDataError
from hawada_peft.planning.importance import gate_importance
from hawada_peft.refit import reconstruct
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.surgery.slimming import slim
from hawada_peft.vanilla.batches import check_batch, main_input, position_mask, rows_of, without_labels

TOKENS = torch.randint(3, 128, (8, 10), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def with_nan(pixels: torch.Tensor) -> torch.Tensor:
    broken = pixels.clone()
    broken[0, 0, 0, 0] = torch.nan
    return broken


BAD: dict[str, tuple[Row, dict[str, Any], str]] = {
    "id beyond the vocabulary": (LM_ROW, {"input_ids": TOKENS + 100}, r"ids from \d+ to 2\d\d.*for 0 to 127"),
    "negative id": (MIXED_ROW, {"input_ids": TOKENS - 100}, r"ids from -\d+"),
    "ids that are no integers": (LM_ROW, {"input_ids": TOKENS.float()}, "must be integers"),
    "one text without a batch": (LM_ROW, {"input_ids": TOKENS[:, 0]}, r"\(batch, tokens\)"),
    "NaN in pixels": (VISION_ROW, {"pixel_values": with_nan(PIXELS)}, "'pixel_values' holds NaN"),
    "infinite embeddings": (LM_ROW, {"inputs_embeds": torch.full((8, 4, 64), torch.inf)}, "'inputs_embeds' holds NaN"),
    "mask of another length": (
        LM_ROW,
        {"input_ids": TOKENS, "attention_mask": torch.ones(8, 7, dtype=torch.long)},
        r"\(\d, 7\).*\(\d, 10\)",
    ),
    "nothing but padding": (
        MIXED_ROW,
        {"input_ids": TOKENS, "attention_mask": torch.zeros(8, 10, dtype=torch.long)},
        "zero everywhere",
    ),
    "another modality": (LM_ROW, {"pixel_values": PIXELS}, r"must hold 'input_ids'.*\(8, 3, 16, 16\)"),
    "texts for images": (VISION_ROW, {"input_ids": TOKENS}, "must hold 'pixel_values'"),
    "no examples": (LM_ROW, {"input_ids": TOKENS[:0]}, "holds no examples"),
}


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest) -> tuple[Row, dict[str, Any], str]:
    return BAD[request.param]


def columns(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    rows = len(next(iter(batch.values())))
    return [{name: value[index] for name, value in batch.items()} for index in range(rows)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    fixed |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05}
    return TrainingArguments(str(folder), **(fixed | options))


def good(row: Row) -> dict[str, torch.Tensor]:
    return {"pixel_values": PIXELS} if row is VISION_ROW else {"input_ids": TOKENS}


def test_good_data_passes(row: Row) -> None:
    model = gate(build(row))
    check_batch(model, inputs_of(model), labels=True)


def test_bad_data_is_refused(bad: tuple[Row, dict[str, Any], str]) -> None:
    row, batch, message = bad
    with pytest.raises(BadDataError, match=message):
        check_batch(build(row), batch)


def test_everything_is_said_at_once() -> None:
    with pytest.raises(BadDataError) as caught:
        check_batch(build(LM_ROW), {"input_ids": TOKENS + 100, "attention_mask": torch.ones(2, 2)})
    assert len(str(caught.value).splitlines()) == 2


def test_masks_of_minus_infinity_are_meant() -> None:
    check_batch(build(LM_ROW), {"input_ids": TOKENS, "attention_mask": torch.full((8, 1, 10, 10), -torch.inf)})


@pytest.mark.parametrize(
    ("labels", "message"), [(torch.ones(8, 1, dtype=torch.long), "no next one"), (torch.ones(3, 10), "for 8 examples")]
)
def test_labels_are_looked_at_where_they_are_used(labels: torch.Tensor, message: str) -> None:
    batch = {"input_ids": TOKENS[:, :1] if labels.shape[1] == 1 else TOKENS, "labels": labels}
    check_batch(build(LM_ROW), batch)
    with pytest.raises(BadDataError, match=message):
        gate_importance(gate(build(LM_ROW)), [batch])


USES: dict[str, Callable[[PeftModel, dict[str, Any]], Any]] = {
    "importance": lambda model, batch: gate_importance(model, [batch]),
    "start": lambda model, batch: init_gates(model, [batch]),
    "search": lambda model, batch: find_plan(
        model, LatencyBudget(speedup=1.5, mode="forward", seq_len=8 if "input_ids" in batch else None), [batch]
    ),
    "quality": lambda model, batch: MaskedQuality(model, [batch]),
    "merge": lambda model, batch: model.merge_and_unload(
        plan=scattered_plan(model, VISION_ROW.slim), calibration=[batch]
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["id beyond the vocabulary", "NaN in pixels"])
def test_calibration_refuses_it(name: str, use: str) -> None:
    row, batch, message = BAD[name]
    with pytest.raises(BadDataError, match=message):
        USES[use](gate(build(row)), batch)


def test_reconstruction_refuses_it_before_a_weight_has_changed(bad: tuple[Row, dict[str, Any], str]) -> None:
    row, batch, message = bad
    dense = build(row)
    plan = scattered_plan(dense, row.slim)
    small = slim(dense, plan)
    before = state_of(small)
    with pytest.raises(BadDataError, match=message):
        reconstruct(dense, small, plan, [good(row), batch])
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("name", ["id beyond the vocabulary", "NaN in pixels", "mask of another length"])
def test_trainers_refuse_it_before_the_first_step(name: str, where: str, tmp_path: Path) -> None:
    row, batch, message = BAD[name]
    data = {"train_dataset": columns(good(row)), "eval_dataset": columns(good(row)), where: columns(batch)}
    model = get_peft_model(build(row), HawAdaConfig())
    trainer = HawAdaTrainer(model, arguments(tmp_path), keep_ratio=0.5, **data)
    with pytest.raises(BadDataError, match=f"{where}: .*{message}"):
        trainer.train()
    assert all(bool((each.theta == each.start.theta).all()) for each in collect_gates(model).values())
    dense = build(row)
    with pytest.raises(BadDataError, match=f"{where}: .*{message}"):
        recover(dense, arguments(tmp_path), plan=scattered_plan(dense, row.slim), **data)


def test_empty_evaluation_data_is_refused(tmp_path: Path) -> None:
    model, data = get_peft_model(build(LM_ROW), HawAdaConfig()), columns(good(LM_ROW))
    trainer = HawAdaTrainer(model, arguments(tmp_path), keep_ratio=0.5, train_dataset=data, eval_dataset=[])
    with pytest.raises(BadDataError, match="eval_dataset holds no examples"):
        trainer.train()
    with pytest.raises(BadDataError, match="no examples"):
        trainer.evaluate([])


class Once(IterableDataset[dict[str, torch.Tensor]]):
    """A stream that can be read once."""

    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = iter(rows)
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for row in self.rows:
            self.read += 1
            yield row


def test_streams_lose_nothing(tmp_path: Path) -> None:
    dense = build(LM_ROW)
    data = Once(columns(good(LM_ROW)))
    recover(dense, arguments(tmp_path), plan=scattered_plan(dense, LM_ROW.slim), train_dataset=data)
    assert data.read == 8


# ----------------------------------------------------------------------------------------------- what a batch may hold


@pytest.mark.filterwarnings("ignore:the slim model keeps its plain weights")
def test_arguments_that_are_no_tensors_are_kept(tmp_path: Path) -> None:
    """Images of another size than the model's, whose positions are interpolated."""
    rows = columns({"pixel_values": torch.randn(8, 3, 32, 32)})

    def collate(parts: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([part["pixel_values"] for part in parts]),
            "interpolate_pos_encoding": True,
        }

    model = get_peft_model(build(VISION_ROW), HawAdaConfig())
    data: dict[str, Any] = {"train_dataset": rows, "data_collator": collate}
    trainer = HawAdaTrainer(model, arguments(tmp_path), keep_ratio=0.5, eval_dataset=rows, **data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    recover(model, arguments(tmp_path), calibration=[collate(rows[:4]), collate(rows[4:])], **data)


@pytest.mark.parametrize("last", [1, 3])
def test_logits_of_the_last_tokens_alone(last: int, tmp_path: Path) -> None:
    mask = torch.ones_like(TOKENS)
    mask[:4, :5] = 0
    rows = columns({"input_ids": TOKENS, "attention_mask": mask})

    def collate(parts: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]} | {"logits_to_keep": last}

    assert position_mask(collate(rows), torch.Size([8, last])).shape == (8, last)
    model = get_peft_model(build(LM_ROW), HawAdaConfig())
    data: dict[str, Any] = {"train_dataset": rows, "data_collator": collate}
    HawAdaTrainer(model, arguments(tmp_path), keep_ratio=0.5, **data).train()
    recover(model, arguments(tmp_path), calibration=[collate(rows)], **data)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "vocab_size" in row.fields])
def test_embeddings_in_the_place_of_tokens(name: str, tmp_path: Path) -> None:
    model = get_peft_model(build(ROWS[name]), HawAdaConfig())
    embedded = {"inputs_embeds": torch.randn(8, 6, 64, generator=torch.Generator().manual_seed(1))}
    trainer = HawAdaTrainer(model, arguments(tmp_path), keep_ratio=0.5, train_dataset=columns(embedded))
    trainer.train()
    MaskedQuality(model, [embedded])
    recover(model, arguments(tmp_path), calibration=[embedded], train_dataset=columns(embedded))


@pytest.mark.parametrize("name", ["llama-text", "llama-reward", "llama-bare"])
def test_labels_of_none_are_none(name: str) -> None:
    row = HEADS[name].row
    plain, named = (
        gate_importance(gate(build(row)), [{"input_ids": TOKENS} | more]) for more in ({}, {"labels": None})
    )
    torch.testing.assert_close(plain, named)


def test_labels_mean_nothing_to_a_model_without_a_head() -> None:
    model = gate(build(HEADS["llama-bare"].row))
    plain, named = (gate_importance(model, [{"input_ids": TOKENS} | more]) for more in ({}, {"labels": TOKENS}))
    torch.testing.assert_close(plain, named)


def test_parts_of_a_batch() -> None:
    batch = {"input_ids": TOKENS, "labels": TOKENS, "cache_position": torch.arange(10), "use_cache": False}
    part = rows_of(without_labels(batch), slice(2, 4), 8)
    assert part.keys() == {"input_ids", "cache_position", "use_cache"}
    assert torch.equal(part["input_ids"], TOKENS[2:4])
    assert len(part["cache_position"]) == 10
    assert main_input(build(LM_ROW), {"a": torch.zeros(1, 2), "input_ids": TOKENS}) is TOKENS
    with pytest.raises(BadDataError, match="no tensor"):
        main_input(build(LM_ROW), {"use_cache": False})


# ------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["llama", "vit"])
def test_reentrant_checkpointing_trains_what_plain_training_does(row: Row, tmp_path: Path) -> None:
    ends = []
    for reentrant in (None, True, False):
        model = get_peft_model(build(row), HawAdaConfig())
        options: dict[str, Any] = {"activation_checkpointing": reentrant is not None}
        options |= {} if reentrant is None else {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        args = arguments(tmp_path, **options)
        HawAdaTrainer(model, args, keep_ratio=0.5, train_dataset=columns(good(row))).train()
        ends.append({name: each.theta.detach().clone() for name, each in collect_gates(model).items()})
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-5)


def test_a_teacher_of_another_size_is_refused_by_its_hidden_states(tmp_path: Path) -> None:
    dense = build(HEADS["llama-bare"].row)
    other = LlamaModel(type(dense.config)(**(LM | {"hidden_size": 32, "head_dim": 8})))
    with pytest.raises(ValueError, match=r"32 outputs.*64"):
        DistillTrainer(other, arguments(tmp_path), teacher=dense, train_dataset=columns(good(LM_ROW)))
