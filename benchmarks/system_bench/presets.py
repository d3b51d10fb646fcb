"""How much is measured: a preset per kind of machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers import LlamaConfig

from hawada_peft.latency.effort import Effort

DECODE, PREFILL = "llama-3.2-1b:decode:1x1024:bfloat16:cuda_graph", "llama-3.2-1b:prefill:8x1024:bfloat16:eager"
VIT, VIT_GRAPH = "vit-b16:forward:64:float32:eager", "vit-b16:forward:64:bfloat16:cuda_graph"


@dataclass(frozen=True)
class Grid:
    """
    Llamas of several depths and widths: FFN four times the hidden size, four query heads per KV group.

    Args:
        layers (`tuple[int, ...]`): depths, at the hidden size `base[1]`.
        hidden (`tuple[int, ...]`): widths, at `base[0]` layers.
        base (`tuple[int, int]`): layers and hidden size of what is varied.
        head_dim (`int`), vocabulary (`int`): of all of them.
        dtype (`str`): of weights and activations.
        step (`str`): BATCHxSEQ of a training step.
        regime (`str`): MODE:BATCHxSEQ:DTYPE:BACKEND of the table and the search.
        speedup (`float`): what is searched for, here and where the package's own search is timed.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    base: tuple[int, int]
    head_dim: int
    vocabulary: int
    dtype: str
    step: str
    regime: str
    speedup: float = 1.5

    def points(self) -> list[tuple[int, int]]:
        """All (layers, hidden size)."""
        layers, hidden = self.base
        return list(dict.fromkeys([*((n, hidden) for n in self.layers), *((layers, h) for h in self.hidden)]))

    def config(self, layers: int, hidden: int) -> LlamaConfig:
        """The model of a point."""
        heads = hidden // self.head_dim
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )


@dataclass(frozen=True)
class Preset:
    """
    What a run measures, and how long.

    Args:
        budgets (`tuple[str, ...]`): the cases whose budgets are asked for (`latency_cases.parse_case`).
        speedups (`tuple[float, ...]`): what is asked for.
        ancestor (`str`): the case that is asked for the ancestor's part of the latency as well.
        table, timing (`Effort`): of the budgets' tables, and of the shapes of their searches.
        again (`int`): how often an answer is built and timed anew.
        steps (`tuple[tuple[str, str, str], ...]`): model, dtype and BATCHxSEQ of the training steps.
        rounds (`int`), warm_up (`int`): training steps of each adapter.
        exports (`tuple[tuple[str, str], ...]`): model and dtype.
        repeats (`int`): merges that count, after one that does not; one on the CPU beside a GPU, and in the scaling.
        windows (`int`), seq_len (`int`): calibration of the reconstruction.
        searches (`tuple[str, ...]`): the cases whose table and search are timed as the package does them.
        search_effort (`Effort`): of both of these.
        grid (`Grid`): of the scaling.
        grid_table (`Effort`): of its tables.
    """

    budgets: tuple[str, ...]
    ancestor: str
    table: Effort
    timing: Effort
    steps: tuple[tuple[str, str, str], ...]
    exports: tuple[tuple[str, str], ...]
    searches: tuple[str, ...]
    grid: Grid
    grid_table: Effort
    speedups: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)
    again: int = 1
    rounds: int = 7
    warm_up: int = 2
    repeats: int = 2
    windows: int = 64
    seq_len: int = 512
    search_effort: Effort = field(default_factory=lambda: Effort(cache=False))

    def quick(self) -> Preset:
        """The same with less of everything."""
        grid = replace(self.grid, layers=self.grid.layers[:2], hidden=self.grid.hidden[:2])
        return replace(self, speedups=self.speedups[1:3], rounds=3, warm_up=1, repeats=1, windows=16, grid=grid)


SHORT = Effort(warmup=1, min_rounds=5, max_rounds=40, max_seconds=0.7, cache=False)
CHECK = Effort(warmup=1, min_rounds=5, max_rounds=60, max_seconds=0.5, tolerance=0.004, cache=False)
INSTANT = Effort(warmup=1, lead_in=0, min_rounds=2, max_rounds=2, max_seconds=0.0, cache=False)

PRESETS = {
    "gpu": Preset(
        budgets=(DECODE, PREFILL, VIT, VIT_GRAPH),
        ancestor=VIT,
        table=replace(SHORT, attention_sizes=6, ffn_sizes=6, whole_shapes=4),
        timing=CHECK,
        steps=(("llama-3.2-1b", "bfloat16", "4x1024"), ("vit-b16", "bfloat16", "64x1")),
        exports=(("llama-3.2-1b", "bfloat16"), ("vit-b16", "float32")),
        searches=(DECODE,),
        grid=Grid(
            layers=(4, 8, 16),
            hidden=(1024, 2048, 4096),
            base=(8, 2048),
            head_dim=64,
            vocabulary=32000,
            dtype="bfloat16",
            step="4x1024",
            regime="prefill:2x512:bfloat16:eager",
        ),
        grid_table=replace(SHORT, attention_sizes=6, ffn_sizes=5, whole_shapes=3, depth=4),
    ),
    "cpu": Preset(
        budgets=("llama-small:prefill:1x128:float32:eager", "vit-b16:forward:1:float32:eager"),
        ancestor="vit-b16:forward:1:float32:eager",
        table=replace(SHORT, attention_sizes=8, ffn_sizes=6, whole_shapes=4),
        timing=CHECK,
        steps=(("llama-small", "float32", "2x128"), ("vit-b16", "float32", "2x1")),
        exports=(("llama-small", "float32"), ("vit-b16", "float32")),
        searches=("llama-small:prefill:1x128:float32:eager",),
        grid=Grid(
            layers=(2, 4, 8),
            hidden=(128, 256, 512),
            base=(4, 256),
            head_dim=32,
            vocabulary=4096,
            dtype="float32",
            step="2x128",
            regime="prefill:1x128:float32:eager",
        ),
        grid_table=replace(SHORT, attention_sizes=4, ffn_sizes=4, whole_shapes=2, depth=4),
        rounds=5,
        warm_up=1,
        windows=16,
        seq_len=128,
    ),
    "tiny": Preset(
        budgets=("vit-tiny:forward:1:float32:eager",),
        ancestor="vit-tiny:forward:1:float32:eager",
        table=replace(INSTANT, attention_sizes=2, ffn_sizes=2, whole_shapes=2, depth=2),
        timing=INSTANT,
        steps=(("vit-tiny", "float32", "2x1"),),
        exports=(("llama-tiny", "float32"),),
        searches=("vit-tiny:forward:1:float32:eager",),
        search_effort=replace(INSTANT, attention_sizes=2, ffn_sizes=2, whole_shapes=2, depth=2),
        grid=Grid(
            layers=(1, 2),
            hidden=(32,),
            base=(2, 32),
            head_dim=8,
            vocabulary=64,
            dtype="float32",
            step="1x8",
            regime="prefill:1x8:float32:eager",
            speedup=1.1,
        ),
        grid_table=replace(INSTANT, attention_sizes=2, ffn_sizes=2, whole_shapes=1, depth=2),
        speedups=(1.1, 1000.0),
        rounds=2,
        warm_up=0,
        repeats=1,
        windows=8,
        seq_len=8,
    ),
}
"""By the machine they are for; `tiny` is for tests."""
