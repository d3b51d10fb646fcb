"""One table of tiny models, and what the tests do with them."""

from __future__ import annotations

import gc
import os
import random
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from hawada_peft import HawAdaConfig, Plan, Shape, collect_gates, save_slim
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.latency import Clock, ToyClock
from hawada_peft.shipping import Verification
from hawada_peft.vanilla.family import FAMILIES, TARGET_MODULES, locate
from hawada_peft.vanilla.outputs import output_of


@dataclass(frozen=True)
class Row:
    """
    A tiny model: its class, its config's fields, and a slim shape that is legal for it.

    `like` names a row that has every trait of this one: only with `--all-families` what is tried on every row is tried
    on this one as well. Without it, this row takes the whole way to a slim folder once, in `test_rows`.
    """

    model: str
    config: str
    fields: dict[str, Any]
    slim: Shape
    like: str = ""


TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "intermediate_size": 96}
LM = TOKENS | SIZES | {"num_key_value_heads": 4, "head_dim": 8}
VISION = SIZES | {"image_size": 16, "patch_size": 8, "num_labels": 3}
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
GRANITE = {"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "logits_scaling": 1.5}
GROUPED, PLAIN = Shape(4, 2, 40, 2), Shape(4, 4, 40, 2)

ROWS: dict[str, Row] = {
    "llama": Row("LlamaForCausalLM", "LlamaConfig", LM, GROUPED),
    "mistral": Row("MistralForCausalLM", "MistralConfig", LM | {"sliding_window": 6}, GROUPED, like="qwen2"),
    "qwen2": Row("Qwen2ForCausalLM", "Qwen2Config", LM | SLIDING, GROUPED),
    "qwen3": Row("Qwen3ForCausalLM", "Qwen3Config", LM | SLIDING, Shape(3, 3, 40, 2)),
    "granite": Row("GraniteForCausalLM", "GraniteConfig", LM | GRANITE, GROUPED),
    "smollm3": Row(
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        LM | {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1, 1]},
        Shape(4, 4, 40, 2),
    ),
    "vit": Row("ViTForImageClassification", "ViTConfig", VISION, PLAIN),
    "deit": Row("DeiTForImageClassification", "DeiTConfig", VISION, Shape(5, 5, 41, 2), like="vit"),
    "dinov2": Row("Dinov2ForImageClassification", "Dinov2Config", VISION | {"mlp_ratio": 2}, Shape(4, 4, 64, 2)),
    "llama-bare": Row("LlamaModel", "LlamaConfig", LM, GROUPED),
    "vit-bare": Row("ViTModel", "ViTConfig", VISION, PLAIN, like="vit"),
    "llama-mha": Row("LlamaForCausalLM", "LlamaConfig", LM | {"num_key_value_heads": 8}, PLAIN, like="llama"),
}
PLAIN_LM = {name: value for name, value in LM.items() if name != "head_dim"}
KINDS: dict[str, Row] = {
    "bert": Row("BertForSequenceClassification", "BertConfig", TOKENS | SIZES | {"num_labels": 3}, Shape(8, 8, 40, 2)),
    "gemma2": Row(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        LM | {"sliding_window": 6, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
        GROUPED,
    ),
    "olmo2": Row("Olmo2ForCausalLM", "Olmo2Config", PLAIN_LM, GROUPED),
}
"""Layers of other kinds: norms of sums, norms behind the blocks, norms over all heads."""
STANDS_FOR = {
    "llama": "a decoder with rotary positions, groups of heads and a derived number of features per head",
    "llama-bare": "no head: the output is hidden states",
    "qwen2": "biases of queries, keys and values; layers of several types; a sliding window",
    "qwen3": "norms of queries and keys; a number of kept groups that is no power of two",
    "granite": "multipliers of embedding, residual stream and logits",
    "smollm3": "tied embeddings; layers without rotary positions",
    "vit": "vision; layer norms with biases; a class token; a classifier",
    "dinov2": "scales of layers; an FFN size that is a ratio of another",
    "bert": "an encoder; norms of sums; a classifier of texts",
    "gemma2": "norms before and behind the blocks; capped logits",
    "olmo2": "norms behind the blocks alone; norms over all heads",
}
"""
What is tried on every row is tried on these, and on all with `--all-families`.

Experts, sinks, fused projections, speech, several towers, and encoders with decoders have test modules of their own.
"""


def first_of(names: Iterable[Any], *first: Any) -> list[Any]:
    """Parameters, of which those that the first ones stand for are left out by default."""
    return [pytest.param(name, marks=[] if name in first else [pytest.mark.further]) for name in names]


def families(rows: Mapping[str, Row]) -> list[Any]:
    """Parameters: the names of rows, of which those without a trait of their own are left out by default."""
    return [pytest.param(name, marks=[pytest.mark.further] if row.like else []) for name, row in rows.items()]


LM_ROW, VISION_ROW = ROWS["llama"], ROWS["vit"]
BARE_ROW, MIXED_ROW = ROWS["llama-bare"], ROWS["qwen2"]  # without a head; layers of several types
LONGEST = (
    "test_raced", "test_found_rows", "test_discovery", "test_trainer_runs", "test_compiled", "test_docs",
    "test_towers", "test_stream", "test_several_processes", "test_demo", "test_sharded", "test_cli", "test_directions",
    "test_low_memory", "test_search_export", "test_written_rows", "test_examples", "test_comparison",
    "test_race_candidates", "test_rows", "test_reliable_training", "test_interop", "test_heads", "test_saved",
    "test_basis", "test_cli_commands",
)  # fmt: skip
"""The files that take ten seconds and more: begun last, one of them would leave the other processes without work."""
EVERYTHING = ("heads", "ffn", "blocks", "layers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-families", action="store_true", help="also run what another family stands for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; without what another family stands for, unless it is asked for."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if config.getoption("--all-families", False):
        return
    left_out = [item for item in items if item.get_closest_marker("further")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("further")]


def pytest_configure(config: pytest.Config) -> None:
    """PEFT 0.21 reads a property that transformers 5.23 deprecates, in every `get_peft_model`."""
    message = r"`is_gradient_checkpointing` is deprecated"
    config.addinivalue_line("filterwarnings", f"ignore:{message}:FutureWarning")
    config.addinivalue_line(
        "markers", "further: what another case stands for, most often a family; run with --all-families"
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """
    What is imported by now is not looked through again: the end of every training collects garbage, which takes longer
    than a training of a few steps where all modules, and the tests themselves, are part of the heap.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def rows_of_families() -> Iterator[None]:
    """Lets a test register families: the rows are put back afterwards."""
    before = dict(FAMILIES), dict(TARGET_MODULES)
    yield
    for current, saved in zip((FAMILIES, TARGET_MODULES), before, strict=True):
        current.clear()
        current.update(saved)


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
    return port


def build(row: Row, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A model with no weight at a special value (no zero bias, no norm of ones), in evaluation mode."""
    torch.manual_seed(1)
    config = getattr(transformers, row.config)(**(row.fields | fields))
    model = getattr(transformers, row.model)(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def gate(model: PreTrainedModel, *, shuffle: bool = True, **options: Any) -> PeftModel:
    """The model with an adapter whose gates are at random values, unless `shuffle` is off."""
    model = get_peft_model(model, HawAdaConfig(**options)).eval()
    return shuffle_gates(model) if shuffle else model


def shuffle_gates(model: PeftModel, adapter_name: str | None = None, seed: int = 2) -> PeftModel:
    """Random values, roughly between 0.1 and 0.9, for all gates (of a name)."""
    generator = torch.Generator().manual_seed(seed)
    for found in collect_gates(model, adapter_name).values():
        found.theta.data.copy_(torch.randn(found.theta.shape, generator=generator))
    return model


def scattered_plan(model: torch.nn.Module, shape: Shape, seed: int = 3) -> Plan:
    """A plan of a shape with indices drawn at random: other ones in every layer, layers not adjacent."""
    draw = random.Random(seed)
    dense = locate(model.get_base_model() if isinstance(model, PeftModel) else model).dense
    shape = shape.complete(dense)
    per_group, kept = dense.heads_per_group, shape.heads_per_group
    layers = tuple(range(dense.num_hidden_layers))
    if shape.num_hidden_layers < len(layers):
        layers = layers[1::2][: shape.num_hidden_layers]
    heads, channels = [], []
    for _ in layers:
        groups = sorted(draw.sample(range(dense.num_key_value_heads), shape.num_key_value_heads))
        heads.append(tuple(g * per_group + h for g in groups for h in sorted(draw.sample(range(per_group), kept))))
        channels.append(tuple(sorted(draw.sample(range(dense.intermediate_size), shape.intermediate_size))))
    return Plan(dense, layers, tuple(heads), tuple(channels))


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Two fixed examples of what the model takes."""
    return example_inputs(model.get_base_model() if isinstance(model, PeftModel) else model)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits, or hidden states of a bare model, for `inputs_of`, in evaluation mode."""
    return output_of(model, inputs_of(model)).clone()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest magnitude expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@dataclass(frozen=True)
class Export:
    """A row's whole way from dense model to slim folder. Shared by tests, which leave it as it is."""

    row: Row
    plan: Plan
    dense: torch.Tensor
    """The dense model's logits."""
    masked: torch.Tensor
    """The logits under the plan."""
    adapter: Path
    gates: dict[str, torch.Tensor]
    slim: PreTrainedModel
    folder: Path
    verification: Verification


@pytest.fixture(scope="session", params=families(ROWS | KINDS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The export of every row: heads, FFN channels and layers removed, soft values folded."""
    row, folder = (ROWS | KINDS)[request.param], tmp_path_factory.mktemp("exported")
    base = build(row)
    dense = logits_of(base)
    model = gate(base, gates=everything(row))
    plan = scattered_plan(model, row.slim)
    model.apply_plan(plan)
    model.save_pretrained(folder / "adapter")
    masked = logits_of(model)
    gates = {name: found.theta.detach().clone() for name, found in collect_gates(model).items()}
    slimmed = model.merge_and_unload()
    verification = save_slim(slimmed, folder / "slim", reference=masked, inputs=inputs_of(slimmed))
    return Export(row, plan, dense, masked, folder / "adapter", gates, slimmed, folder / "slim", verification)


@pytest.fixture(params=families(ROWS))
def row(request: pytest.FixtureRequest) -> Row:
    """Every row of the table."""
    return ROWS[request.param]


def everything(row: Row) -> tuple[str, ...]:
    """All kinds of gates that a row's model takes, but those on its residual stream."""
    return tuple(kind for kind in EVERYTHING if row is not KINDS["bert"] or kind not in ("heads", "blocks"))


@pytest.fixture
def toy_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where no `Effort` can be given, as on the command line: every clock is a toy's, and no table is the user's."""
    toy = ToyClock()
    for name in ("now", "wait", "runner", "device_name"):
        monkeypatch.setattr(Clock, name, _of_the_toy(getattr(Clock, name), getattr(toy, name)))
    monkeypatch.setenv("HAWADA_CACHE", str(tmp_path_factory.getbasetemp() / "toy-cache"))


def _of_the_toy(real: Any, toys: Any) -> Any:
    """A method of the real clock alone."""
    return lambda self, *given: toys(*given) if type(self) is Clock else real(self, *given)
