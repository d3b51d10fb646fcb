"""The ancestor's recipe: sampled gates on a frozen model, distilled under a penalty on a proxy of latency."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from hawada_peft.vanilla.family import Layout, locate
from hawada_peft.vanilla.shape import HEADS

from .criteria import best, best_heads, left, unlabelled
from .peer import Batch, Peer, Prepared, Work
from .surgery import Block, Keep, attention, ffn, keep_units

STEPS = 64
FIRST_LOGIT, TAU, RATE = 3.0, 1.5, 5e-2
TEMPERATURE, MSE, SPARSITY, DUAL_RATE = 2.0, 0.1, 1e-4, 0.05
FFN_GROUP = 16


class _Gate:
    """Gates on the input of an output projection, one per `width` features; a fresh sample per forward pass."""

    def __init__(self, block: Block, width: int, price: float, per_token: float, generator: torch.Generator) -> None:
        linear = block.output
        self.width, self.generator = width, generator
        self.logits = nn.Parameter(
            torch.full((linear.in_features // width,), FIRST_LOGIT, device=linear.weight.device)
        )
        self.price, self.per_token = price, per_token
        self.closed, self.tokens = False, 0
        linear.register_forward_pre_hook(self._hook)

    def probabilities(self) -> torch.Tensor:
        """Of staying: (units,)."""
        return torch.sigmoid(self.logits / TAU)

    def cost(self) -> torch.Tensor:
        """Multiply-adds per token that are expected to stay."""
        return self.probabilities().sum() * (self.price + self.per_token * self.tokens)

    def _hook(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not self.closed:
            return None
        self.tokens = inputs[0].shape[-2]
        uniform = torch.rand(self.logits.shape, generator=self.generator, device=self.logits.device).clamp(
            1e-6, 1 - 1e-6
        )
        soft = torch.sigmoid((self.logits + torch.logit(uniform)) / TAU)
        sample = (soft > 0.5).float() - soft.detach() + soft
        return (inputs[0] * sample.repeat_interleave(self.width).to(inputs[0].dtype), *inputs[1:])


def _gates(model: PreTrainedModel, layout: Layout, generator: torch.Generator) -> list[tuple[_Gate, _Gate]]:
    """For each layer: of query heads, and of FFN groups."""
    gates = []
    sizes, width = layout.dense.sizes(), layout.head_dim
    heads, channels = sizes["num_attention_heads"], sizes["intermediate_size"]
    group = math.gcd(channels, FFN_GROUP)
    for layer in range(sizes["num_hidden_layers"]):
        first, second = attention(model, layout, layer), ffn(model, layout, layer)
        own = [first.output, *(first.linear(name) for name, axis in first.rows.items() if axis == HEADS)]
        price = sum(linear.weight.numel() for linear in own) / heads
        gates.append(
            (
                _Gate(first, width, price, 2 * width, generator),
                _Gate(second, group, second.parameters() * group / channels, 0, generator),
            )
        )
    return gates


def prepare(work: Work) -> Prepared:
    """Train the gates."""
    model = work.load().requires_grad_(False)
    layout = locate(model)
    gates = _gates(model, layout, torch.Generator(model.device).manual_seed(work.seed))
    every = [gate for pair in gates for gate in pair]
    optimizer = torch.optim.Adam([gate.logits for gate in every], lr=RATE)
    steps, dual = min(STEPS, work.steps), 0.0
    for _ in range(steps):
        batch = unlabelled(next(work.stream))
        wanted = _logits(model, batch, every, closed=False).detach()
        found = _logits(model, batch, every, closed=True)
        loss = _distillation(found, wanted) + MSE * functional.mse_loss(found, wanted)
        dense = sum(gate.logits.numel() * (gate.price + gate.per_token * gate.tokens) for gate in every)
        cost = torch.stack([gate.cost() for gate in every]).sum()
        excess = cost * work.speedup / dense - 1
        sparsity = torch.cat([gate.probabilities() for gate in every]).sum()
        optimizer.zero_grad()
        (loss + dual * excess.relu() + SPARSITY * sparsity).backward()
        optimizer.step()
        dual = max(0.0, dual + DUAL_RATE * float(excess.detach()))
    heads = torch.stack([gate.logits.detach().cpu() for gate, _ in gates])
    groups = torch.stack([gate.logits.detach().cpu() for _, gate in gates])
    width = gates[0][1].width
    order = torch.argsort(torch.cat([heads.flatten(), groups.flatten()]), descending=True, stable=True)

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        found = locate(dense)
        per_group, kv_groups = found.dense.heads_per_group, found.dense.sizes()["num_key_value_heads"]
        stays = torch.zeros(len(order), dtype=torch.bool)
        stays[order[: left(len(order), amount)]] = True
        heads_left = stays[: heads.numel()].reshape(heads.shape).sum(1).tolist()
        groups_left = stays[heads.numel() :].reshape(groups.shape).sum(1).tolist()
        keeps = {}
        for layer, (head_scores, group_scores) in enumerate(zip(heads, groups, strict=True)):
            if per_group > 1:
                chosen = best_heads(found, head_scores, max(1, round(heads_left[layer] / kv_groups)))
            else:
                chosen = best(head_scores, max(1, heads_left[layer]))
            kept = best(group_scores, max(1, groups_left[layer]))
            keeps[layer] = Keep(chosen, [group * width + channel for group in kept for channel in range(width)])
        keep_units(dense, keeps)
        return dense

    return Prepared(cut, steps)


def _logits(model: PreTrainedModel, batch: Batch, gates: list[_Gate], *, closed: bool) -> torch.Tensor:
    for gate in gates:
        gate.closed = closed
    with (
        torch.set_grad_enabled(closed),
        torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"),
    ):
        return model(**batch).logits.float()


def _distillation(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found) at a temperature, times its square, mean over tokens."""
    found, wanted = (functional.log_softmax(logits.flatten(0, -2) / TEMPERATURE, -1) for logits in (found, wanted))
    return functional.kl_div(found, wanted, log_target=True, reduction="batchmean") * TEMPERATURE**2


ANCESTOR = Peer(
    name="ancestor (HawAda, 2026-01)",
    source="miosipof/hawada: core/gates.py, core/distill.py, core/train.py, core/proxy_cost.py, and the defaults of "
    "its scripts (gates start at logit 3, tau 1.5, Adam 0.05 on logits, temperature 2, MSE 0.1, dual ascent 0.05)",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted=f"At most {STEPS} steps. Only gates are trained: weights get the recovery that all contestants get. The "
    "KL is the mean over all tokens (upstream: the last one). Head gates act on what is exported, the input of the "
    "output projection (upstream: on the queries). The proxy counts multiply-adds relative to the target and is "
    "differentiable in the heads (upstream: milliseconds, heads detached); no latency probes, floors or projections. "
    "The cut thresholds the gates of all layers together, so that any budget can be met, instead of the expected "
    f"count of each layer; with KV groups, equally many query heads stay in each. FFN groups of {FFN_GROUP} channels "
    "(upstream: 16 for ViT, 128 of 8192 for Llama).",
)
