"""
The passport: which runtimes take a slim model, and how that is known.

Long because it lists the runtimes, a few lines each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import HawAdaError
from ..vanilla.family import Layout
from ..vanilla.skeleton import auto_class_of
from .runtime_rules import (
    ALIGNMENTS,
    BNB_COLUMNS,
    BNB_ROWS,
    FIRST_WITH_ROPE_PARAMETERS,
    GGUF_BLOCKS,
    RULES,
    TENSOR_PARALLEL_SIZES,
    VERSIONS_TRIED,
    VLLM_VOCAB_PADDING,
)

if TYPE_CHECKING:
    from .checks import Verification

ANSWERS = ("yes", "no", "unknown")
EVIDENCE = ("run", "computed", "rule", "not checked")


@dataclass(frozen=True)
class PassportLine:
    """
    One line of the passport.

    Args:
        runtime (`str`): what would run the model.
        answer (`str`): `"yes"`, `"no"` or `"unknown"`.
        evidence (`str`): `"run"`: this model was run in it; `"computed"`: from its sizes alone; `"rule"`: a rule about
            the runtime, which was not run with this model; `"not checked"`.
        detail (`str`): versions, conditions, differences.

    Raises:
        HawAdaError: on another answer or evidence, or an answer without evidence.
    """

    runtime: str
    answer: str
    evidence: str
    detail: str

    def __post_init__(self) -> None:
        if self.answer not in ANSWERS or self.evidence not in EVIDENCE:
            raise HawAdaError(
                f"a passport line needs an answer of {list(ANSWERS)} and evidence of {list(EVIDENCE)}, got "
                f"{self.answer!r} and {self.evidence!r}"
            )
        if (self.answer == "unknown") != (self.evidence == "not checked"):
            raise HawAdaError(
                f"the answer {self.answer!r} with the evidence {self.evidence!r}: 'unknown' and 'not checked' belong "
                "together"
            )

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def not_checked(runtime: str, detail: str) -> PassportLine:
    """The line of a runtime that nothing is known about."""
    return PassportLine(runtime, "unknown", "not checked", detail)


def passport_of(
    model: PreTrainedModel,
    layout: Layout,
    *,
    verification: Verification | None = None,
    compiled_on: str = "",
    checked: Sequence[PassportLine] = (),
) -> list[PassportLine]:
    """
    The lines of a slim model.

    Args:
        model: the slim model; only its class and config are used, so it may be on the meta device.
        layout: its family row and sizes.
        verification: what reloading its folder gave.
        compiled_on: where it (or a model of its sizes) was timed under `torch.compile`; empty if it was not.
        checked: lines of what was run, e.g. by `check_compile` and `check_onnx`; each replaces the line that would
            otherwise stand for its runtime.
    """
    lines = [_transformers_here(verification), _transformers_elsewhere(model, layout), _compile(compiled_on)]
    lines.append(not_checked("ONNX", "`hawada_peft.check_onnx` exports the model and runs it in onnxruntime"))
    if model.main_input_name == "input_ids":
        lines += _tensor_parallel(model, layout)
    lines += [*_gguf(model, layout), _bitsandbytes(model)]
    run = {line.runtime: line for line in checked}
    return [run.pop(line.runtime, line) for line in lines] + list(run.values())


def alignment(model: PreTrainedModel, layout: Layout) -> dict[str, dict[str, Any]]:
    """
    By which of 8, 64 and 128 the model's sizes can be divided.

    Args:
        model: the model; may be on the meta device.
        layout: its family row and sizes.

    Returns:
        `{"size": ..., "multiple_of": [...]}` by the name of the size.
    """
    sizes = layout.dense.sizes()
    named = {
        "hidden_size": layout.hidden_size,
        "query features": sizes["num_attention_heads"] * layout.head_dim,
        "key and value features": sizes["num_key_value_heads"] * layout.head_dim,
        "intermediate_size": sizes["intermediate_size"],
    }
    if model.main_input_name == "input_ids":
        named["vocab_size"] = model.config.get_text_config().vocab_size
    return {
        name: {"size": size, "multiple_of": [step for step in ALIGNMENTS if size % step == 0]}
        for name, size in named.items()
    }


def _transformers_here(verification: Verification | None) -> PassportLine:
    runtime = f"transformers {transformers.__version__}"
    if verification is None or verification.max_difference is None:
        return not_checked(runtime, "the folder was not reloaded when this was written; `verify_slim` does that")
    return PassportLine(
        runtime,
        "yes",
        "run",
        f"reloaded through `{verification.auto_class}` without custom code; outputs differ by at most "
        f"{verification.max_difference:.2g} of {verification.scale:.3g}",
    )


def _transformers_elsewhere(model: PreTrainedModel, layout: Layout) -> PassportLine:
    runtime = "other transformers versions"
    rules = RULES.get(layout.model_type)
    if rules is None:
        return not_checked(runtime, f"nothing is known of model_type {layout.model_type!r}")
    free = _free_heads(layout)
    oldest = rules.free_heads if free else rules.transformers
    tried: Sequence[str] = VERSIONS_TRIED
    if not _rope_for_v4(model):
        oldest = max(oldest, FIRST_WITH_ROPE_PARAMETERS, key=VERSIONS_TRIED.index)
        tried = VERSIONS_TRIED[VERSIONS_TRIED.index(FIRST_WITH_ROPE_PARAMETERS) :]
    place = VERSIONS_TRIED.index(oldest)
    also = [version for version in rules.also if version in tried]
    newer = [*also, *VERSIONS_TRIED[place:]]
    older = [version for version in VERSIONS_TRIED[:place] if version not in also]
    why = (
        f"{layout.dense.num_attention_heads} heads of {layout.head_dim} in {layout.hidden_size} features need a class "
        "that reads `head_dim`"
        if free and rules.free_heads != rules.transformers
        else f"slim models of model_type {layout.model_type!r}"
    )
    detail = f"{oldest} or later: {why}; tiny ones computed the same with {', '.join(newer)}"
    if older:
        detail += f", and did not load or computed something else with {', '.join(older)}"
    return PassportLine(runtime, "yes", "rule", detail)


def _rope_for_v4(model: PreTrainedModel) -> bool:
    """Whether transformers 4 finds the rotary parameters in the config, where it has any; see `add_v4_rope_keys`."""
    fields = model.config.to_dict()
    rope = fields.get("rope_parameters")
    return not isinstance(rope, dict) or "rope_theta" not in rope or "rope_theta" in fields


def _compile(compiled_on: str) -> PassportLine:
    if compiled_on:
        return PassportLine("torch.compile", "yes", "run", f"a model of these sizes was timed so on {compiled_on}")
    return not_checked("torch.compile", "`hawada_peft.check_compile` compiles the model and compares")


def _tensor_parallel(model: PreTrainedModel, layout: Layout) -> list[PassportLine]:
    """
    Whether every part can be divided over GPUs in vLLM: query heads, KV heads (or copies of them), FFN channels, and
    the vocabulary with its padding.
    """
    sizes = layout.dense.sizes()
    heads, groups, ffn = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["intermediate_size"]
    vocab = -(-model.config.get_text_config().vocab_size // VLLM_VOCAB_PADDING) * VLLM_VOCAB_PADDING
    lines = []
    for size in TENSOR_PARALLEL_SIZES:
        problems = [
            f"{count} {what} cannot be divided by {size}"
            for what, count in (("query heads", heads), ("FFN channels", ffn), (f"tokens ({vocab} padded)", vocab))
            if count % size
        ]
        if groups % size and size % groups:
            problems.append(f"{groups} KV heads can be neither divided nor copied for {size}")
        copied = f"; each KV head is on {size // groups} GPUs" if not problems and size > groups else ""
        lines.append(
            PassportLine(
                f"vLLM, tensor parallel {size}",
                "no" if problems else "yes",
                "rule",
                "; ".join(problems) if problems else f"by divisibility of the sizes alone; vLLM was not run{copied}",
            )
        )
    return lines


def _gguf(model: PreTrainedModel, layout: Layout) -> list[PassportLine]:
    rules = RULES.get(layout.model_type)
    free = _free_heads(layout)
    taken = None if rules is None else rules.gguf_free_heads if free else rules.gguf
    if taken and auto_class_of(model) is not AutoModelForCausalLM:
        return [not_checked("GGUF (llama.cpp)", "only causal language models were tried")]
    kind = f"model_type {layout.model_type!r}" + (f" with heads of {layout.head_dim}" if free else "")
    if taken is None:
        return [not_checked("GGUF (llama.cpp)", f"nothing is known of {kind}")]
    if not taken:
        why = f"llama.cpp does not load {kind}" if rules and rules.gguf else f"its converter does not know {kind}"
        return [PassportLine("GGUF (llama.cpp)", "no", "rule", why)]
    lines = [PassportLine("GGUF (llama.cpp)", "yes", "rule", f"tiny slim models of {kind} computed the same there")]
    rows = {tensor.shape[-1] for tensor in model.state_dict().values() if tensor.ndim == 2}
    for kinds, block in GGUF_BLOCKS.items():
        odd = sorted(row for row in rows if row % block)
        lines.append(
            PassportLine(
                f"GGUF, all tensors in {kinds}",
                "no" if odd else "yes",
                "computed",
                f"rows of {', '.join(map(str, odd))} are no multiple of {block}: those tensors get another type"
                if odd
                else f"all rows are multiples of {block}",
            )
        )
    return lines


def _bitsandbytes(model: PreTrainedModel) -> PassportLine:
    """Linear layers by their sizes; the output embeddings, which transformers does not quantise, aside."""
    head = model.get_output_embeddings()
    odd = {
        f"{linear.out_features}x{linear.in_features}"
        for linear in model.modules()
        if isinstance(linear, nn.Linear)
        and linear is not head
        and (linear.in_features % BNB_ROWS or linear.out_features % BNB_COLUMNS)
    }
    runtime = "bitsandbytes, 4 bit on a CPU"
    if not odd:
        detail = f"rows are multiples of {BNB_ROWS}, their numbers of {BNB_COLUMNS}; it was not run"
        return PassportLine(runtime, "yes", "rule", detail)
    detail = (
        f"linear layers of {', '.join(sorted(odd))}: rows must be multiples of {BNB_ROWS} and their number of "
        f"{BNB_COLUMNS}; others failed in evaluation, or computed something else in training, with bitsandbytes "
        "0.50.2. Leave them out by `llm_int8_skip_modules`"
    )
    return PassportLine(runtime, "no", "rule", detail)


def _free_heads(layout: Layout) -> bool:
    return layout.dense.sizes()["num_attention_heads"] * layout.head_dim != layout.hidden_size
