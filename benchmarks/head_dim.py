"""
Smaller heads against fewer heads, at the same inner size of attention, of a ViT: before any training, or after some.

Without rotary positions a head's queries and keys are known up to an invertible map, and its values and the projection
that reads them too. Queries and keys: the truncated SVD of their product in the metric of the data; a key's mean adds
the same to all scores of a query, which the softmax does not see. Values: that of what the head adds to the stream. At
the full size both are exact. Heads are chosen by Fisher information; both are refitted by least squares if that helps.

    python benchmarks/head_dim.py --teacher TEACHER --data TRAIN.npz --evaluation EVAL.npz --batch-size 64 \\
        --calibration 256 [--recover 300 --device cuda --seeds 0 1 2]

References: MoDeGPT (Lin et al., 2024), for SVD in the metric of the data.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel
from work import Batch, Bench, add_work_arguments

from hawada_peft import HawAdaConfig, Shape, init_gates
from hawada_peft.processes import of_this_rank
from hawada_peft.refit.reconstruction import refit_model
from hawada_peft.vanilla.family import locate

PAIRS = ((32, 6), (27, 5), (21, 4), (16, 3), (11, 2))
"""Head sizes of all heads, and numbers of whole heads of nearly the same inner size."""


def root(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of second moments, and its inverse."""
    values, vectors = torch.linalg.eigh(moments)
    roots = values.clamp(min=1e-10 * float(values[-1])).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _keep_output(rows: list[torch.Tensor], _module: Any, _args: Any, output: torch.Tensor) -> None:
    rows.append(output.detach().flatten(0, 1))


def _keep_input(rows: list[torch.Tensor], _module: Any, args: tuple[torch.Tensor, ...]) -> None:
    rows.append(args[0].detach().flatten(0, 1))


class Heads:
    """Second moments of what a ViT's heads compute on calibration batches, and the same ViT with smaller heads."""

    def __init__(self, model: PreTrainedModel, batches: list[Batch]) -> None:
        self.model, self.layout = model, locate(model)
        self.names = [name.rpartition(".")[0] for name in map(self.layout.attention_out, range(len(self.layers)))]
        rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        hooks = []
        for index, name in enumerate(self.names):
            attention = model.get_submodule(name)
            for each in ("q_proj", "k_proj"):
                module = attention.get_submodule(each)
                hooks.append(module.register_forward_hook(partial(_keep_output, rows[f"{index}.{each}"])))
            out = model.get_submodule(self.layout.attention_out(index))
            hooks.append(out.register_forward_pre_hook(partial(_keep_input, rows[f"{index}.out"])))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for hook in hooks:
            hook.remove()
        self.rows = {key: torch.cat(found).double() for key, found in rows.items()}

    @property
    def layers(self) -> range:
        return range(self.layout.dense.sizes()["num_hidden_layers"])

    def cut(self, size: int) -> PreTrainedModel:
        """The ViT with heads of a size."""
        model, old = self.model, self.layout.head_dim
        config = copy.deepcopy(model.config)
        config.head_dim = size
        small = type(model)(config).to(model.device).eval()
        state = copy.deepcopy(model.state_dict())
        count = self.layout.dense.sizes()["num_attention_heads"]
        for index, name in enumerate(self.names):
            out = self.layout.attention_out(index)
            made: dict[str, list[torch.Tensor]] = defaultdict(list)
            for head in range(count):
                part = slice(head * old, (head + 1) * old)
                q, k, a = (self.rows[f"{index}.{each}"][:, part] for each in ("q_proj", "k_proj", "out"))
                (rq, iq), (rk, ik) = root(q.T @ q / len(q)), root(torch.cov(k.T))
                u, s, v = torch.linalg.svd(rq @ rk)
                scale = (size / old) ** 0.5  # the class divides by the root of the head's size
                maps = {
                    "q_proj": scale * iq @ (u[:, :size] * s[:size].sqrt()),
                    "k_proj": ik @ (v[:size].T * s[:size].sqrt()),
                }
                ra, ia = root(a.T @ a / len(a))
                block = state[f"{out}.weight"][:, part].double()
                u, s, v = torch.linalg.svd(ra @ block.T, full_matrices=False)
                maps["v_proj"] = ia @ u[:, :size]
                for each, matrix in maps.items():
                    made[f"{name}.{each}.weight"].append(matrix.T @ state[f"{name}.{each}.weight"][part].double())
                    made[f"{name}.{each}.bias"].append(matrix.T @ state[f"{name}.{each}.bias"][part].double())
                made[f"{out}.weight"].append((s[:size, None] * v[:size]).T)
            for key, parts in made.items():
                state[key] = torch.cat(parts, 1 if key == f"{out}.weight" else 0).float()
        small.load_state_dict(state)
        return small


def fewer(bench: Bench, batches: list[Batch], heads: int) -> PreTrainedModel:
    """The ViT with the heads that count most, refitted."""
    gated = get_peft_model(bench.load(), HawAdaConfig(gates=("heads",)))
    init_gates(gated, batches)
    plan = gated.plan(Shape(num_attention_heads=heads, num_key_value_heads=heads))
    gated.apply_plan(plan)
    small = gated.merge_and_unload()
    refit_model(bench.model, small, plan, batches, reduce=of_this_rank)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--eval-examples", type=int)
    parser.add_argument("--recover", type=int, default=0, help="steps of distillation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    bench = Bench(
        options.teacher,
        options.data,
        options.evaluation,
        device=options.device,
        batch_size=options.batch_size,
        eval_examples=options.eval_examples,
    )
    for seed in options.seeds:
        batches = bench.examples(options.calibration, seed)
        heads = Heads(bench.model, batches)
        for size, count in PAIRS:
            for name, small in ((f"6 heads of {size}", heads.cut(size)), (f"{count} heads of 32", None)):
                if small is None and count == 6:
                    continue
                model = fewer(bench, batches, count) if small is None else small
                row = {"seed": seed, "heads": name, "parameters": model.num_parameters()}
                row["before"] = bench.quality(model)
                if options.recover:
                    bench.distil(model, options.recover, None, seed)
                    row["after"] = bench.quality(model)
                print(row, flush=True)


if __name__ == "__main__":
    main()
