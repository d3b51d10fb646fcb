"""What is tried: the tuner's rows for PEFT's parametrised tests. Data only."""

from __future__ import annotations

from typing import Any

# model in test_custom_models.MockTransformerWrapper, config fields
CUSTOM: list[tuple[str, dict[str, Any]]] = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"]}),
    ("MLP", {"target_modules": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
    ("Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d2", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d", {"target_modules": ["conv3d", "lin0"]}),
]

# two adapters on one MLP: name, fields of the first, fields of the second
TWO_ADAPTERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("overlapping", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
]

# per test file: task type and (hub id, target modules). None: the tuner finds its own targets.
LLAMA = ["o_proj", "down_proj"]
DECODERS: list[tuple[str, list[str] | None]] = [
    ("peft-internal-testing/tiny-random-OPTForCausalLM", ["out_proj"]),  # fc2 sees batch * seq rows: no per-row gate
    ("peft-internal-testing/tiny-random-OPTForCausalLM", None),
    ("peft-internal-testing/tiny-random-GPT2LMHeadModel", ["c_attn"]),
    ("peft-internal-testing/tiny-random-GPT2LMHeadModel", None),
    ("peft-internal-testing/tiny-random-GPTJForCausalLM", ["q_proj", "v_proj"]),
    ("peft-internal-testing/tiny-random-GPTJForCausalLM", None),
    ("peft-internal-testing/tiny-random-GPTNeoXForCausalLM", ["query_key_value"]),
    ("peft-internal-testing/tiny-random-GPTNeoXForCausalLM", None),
    ("peft-internal-testing/tiny-random-BloomForCausalLM", ["query_key_value"]),
    ("peft-internal-testing/tiny-random-BloomForCausalLM", None),
    ("hf-internal-testing/tiny-random-Gemma3ForCausalLM", LLAMA),
    ("hf-internal-testing/tiny-random-Gemma3ForCausalLM", None),
    ("trl-internal-testing/tiny-random-LlamaForCausalLM", LLAMA),
    ("trl-internal-testing/tiny-random-LlamaForCausalLM", None),
    ("hf-internal-testing/tiny-random-MistralForCausalLM", LLAMA),
    ("hf-internal-testing/tiny-random-MistralForCausalLM", None),
    ("peft-internal-testing/tiny-dummy-qwen2", LLAMA),
    ("peft-internal-testing/tiny-dummy-qwen2", None),
]
ENCODER_DECODERS: list[tuple[str, list[str] | None]] = [
    ("peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated", ["q", "v"]),
    ("peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated", None),
    ("peft-internal-testing/tiny-random-BartForConditionalGeneration", ["q_proj", "v_proj"]),
    ("peft-internal-testing/tiny-random-BartForConditionalGeneration", None),
]
ENCODERS: list[tuple[str, list[str] | None]] = [
    ("peft-internal-testing/tiny-random-BertModel", ["query", "value"]),
    ("peft-internal-testing/tiny-random-BertModel", None),
    ("peft-internal-testing/tiny-random-RobertaModel", ["query", "value"]),
    ("peft-internal-testing/tiny-random-RobertaModel", None),
    ("peft-internal-testing/tiny-random-DebertaModel", ["in_proj"]),
    ("peft-internal-testing/tiny-random-DebertaModel", None),
    ("peft-internal-testing/tiny-random-DebertaV2Model", ["query_proj", "value_proj"]),
    ("peft-internal-testing/tiny-random-DebertaV2Model", None),
]
CLASSIFIERS: list[tuple[str, list[str] | None]] = [
    ("peft-internal-testing/tiny-random-BertForSequenceClassification", ["query", "value"]),
    ("peft-internal-testing/tiny-random-BertForSequenceClassification", None),
    ("peft-internal-testing/tiny-random-RobertaForSequenceClassification", ["query", "value"]),
    ("peft-internal-testing/tiny-random-RobertaForSequenceClassification", None),
]
LLAMA_CLASSIFIER = "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"
VIT = "hf-internal-testing/tiny-random-ViTForImageClassification"
MODELS: dict[str, tuple[str | None, list[tuple[str, list[str] | None]]]] = {
    "TestDecoderModels": ("CAUSAL_LM", DECODERS),
    "TestEncoderDecoderModels": ("SEQ_2_SEQ_LM", ENCODER_DECODERS),
    "TestPeftFeatureExtractionModel": ("FEATURE_EXTRACTION", ENCODERS),
    "TestSequenceClassificationModels": (
        "SEQ_CLS",
        [*CLASSIFIERS, (LLAMA_CLASSIFIER, LLAMA), (LLAMA_CLASSIFIER, None)],
    ),
    "TestTokenClassificationModels": ("TOKEN_CLS", CLASSIFIERS),
    "TestQuestionAnsweringModels": ("QUESTION_ANS", CLASSIFIERS),
    "TestViTModels": (None, [(VIT, ["query", "value", "q_proj", "v_proj"]), (VIT, None)]),
}
