"""BERT and the encoders that norm the sum of each block and its input. Their head size is derived: heads stay."""

from dataclasses import replace

from ..family import Family, register_family

BERT = Family(
    layers="encoder.layer", attention_out="attention.output.dense", ffn_out="output.dense", head_dim_field=""
)
for _model_type in ("bert", "camembert", "deberta-v2", "electra", "roberta", "xlm-roberta"):
    register_family(_model_type, BERT)
register_family("mpnet", replace(BERT, attention_out="attention.attn.o"))
register_family(
    "distilbert",
    replace(
        BERT,
        layers="transformer.layer",
        attention_out="attention.out_lin",
        ffn_out="ffn.lin2",
        ffn_field="hidden_dim",
    ),
)

# Speech.
WAV2VEC2 = replace(
    BERT, layers="encoder.layers", attention_out="attention.out_proj", ffn_out="feed_forward.output_dense"
)
for _model_type in ("hubert", "wav2vec2"):
    register_family(_model_type, WAV2VEC2)
