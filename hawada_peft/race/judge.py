"""
What is known of plans before any training: their loss, the layers' influence, what stays at a shape.

Long because a judge of several towers is one of each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..basis.bases import Bases, Change, plan_turn
from ..basis.basis import is_tied
from ..errors import HawAdaError
from ..gates.reading import Scores, UnitScores
from ..planning.plan import Plan
from ..planning.ranking import rank
from ..processes import of_this_rank
from ..refit.activity import column_norms
from ..refit.fidelity import Expected
from ..refit.layerwise import Stream
from ..search.together import Numbers
from ..surgery.slimming import slim
from ..vanilla.batches import Batch, position_mask, without_labels
from ..vanilla.draws import draw_classes
from ..vanilla.family import locate_all
from ..vanilla.heads import Classes, Head, head_of
from ..vanilla.outputs import output_of
from ..vanilla.shape import HEADS, Shape


@dataclass(frozen=True)
class _Reference:
    """A batch, one outcome per prediction drawn by the dense model, its log-probability there, and what counts."""

    batch: Batch
    outcomes: torch.Tensor
    log_dense: torch.Tensor
    counts: torch.Tensor


class Judge:
    """
    Answers what generators of plans ask, from a dense model and calibration batches. Everything is computed once.

    Of a model with several towers (`locate_all`) `towers` holds a judge of each, by the same measure: its layers are
    that tower's, and its plans leave the others whole.

    Args:
        dense (`PreTrainedModel`): vanilla, with a family row; left as it is.
        batches (`Sequence`): keyword arguments of the forward pass, on the model's device; labels are not used.
        bases (`Bases`, *optional*): of the residual stream and inside of heads, if plans may keep directions of them.
        bf16 (`bool`): compute plans' losses under bfloat16 autocast, as a training with it does; that is quicker.

    Raises:
        HawAdaError: if there are no batches.
        UnsupportedModelError: if the model has no family row.
    """

    def __init__(
        self, dense: PreTrainedModel, batches: Sequence[Batch], bases: Bases | None = None, *, bf16: bool = False
    ) -> None:
        if not batches:
            raise HawAdaError("no calibration batches were given; pass at least one")
        self.dense, self.layouts, self.bases = dense, locate_all(dense), bases or Bases()
        self.layout = self.layouts[0]
        self.batches = [without_labels(batch) for batch in batches]
        self._losses: dict[Plan, float] = {}
        self._bf16 = bf16

    @property
    def layers(self) -> int:
        """Layers of the dense model."""
        return self.layout.dense.sizes()["num_hidden_layers"]

    @cached_property
    def towers(self) -> tuple[Judge, ...]:
        """The judges of each tower; of one tower this one."""
        several = len(self.layouts) > 1
        return tuple(_OfTower(self, number) for number in range(len(self.layouts))) if several else (self,)

    def loss(self, plan: Plan) -> float:
        """
        How far the plain slim model of a plan is from the dense one on the calibration batches, as the head has it:
        KL(dense, slim) in nats per prediction, or the mean squared difference of outputs that are no distribution.

        Of one class among several, of which there may be very many, outcomes y are drawn once by the dense model; the
        divergence is the mean of `log p(y) - log q(y)`, with p the dense and q the slim model's probability. Plans are
        judged by the same outcomes, so that their order is known better than the values.

        References:
            Schulman, "Approximating KL Divergence" (2020), the first estimator.
        """
        if plan not in self._losses:
            small = slim(self.dense, plan, turn=self.turn(plan), layout=self.layout).eval()
            drawn = isinstance(self.head, Classes)
            with torch.autocast(self.dense.device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._drawn(small) if drawn else self._expected.divergence(small, of_this_rank)[1]
            self._losses[plan] = loss
        return self._losses[plan]

    @cached_property
    def head(self) -> Head:
        """What the outputs of the model stand for."""
        return head_of(self.dense, output_of(self.dense, self.batches[0]))

    def turn(self, plan: Plan) -> Change | None:
        """The change of coordinates that a plan asks for, if it keeps directions of the stream, or inside of heads."""
        return plan_turn(self.dense, plan, self.bases)

    def knows(self, shape: Shape) -> bool:
        """Whether there is a basis for what a shape cuts."""
        wanted = self.layout.complete(shape)
        stream, heads = wanted.hidden_size is None, wanted.head_dim is None
        return (stream or self.bases.stream is not None) and (heads or self.bases.heads is not None)

    def unties(self, plan: Plan) -> bool:
        """Whether the output projection stops being the embedding, and needs memory of its own."""
        turn = self.turn(plan)
        return turn is not None and not turn.tied and is_tied(self.dense)

    def without(self, layers: Iterable[int]) -> Plan:
        """The plan that drops layers and nothing else."""
        gone = set(layers)
        return self.at(Shape(num_hidden_layers=self.layers - len(gone)), gone)

    def at(self, shape: Shape, dropped: Iterable[int]) -> Plan:
        """As `part`, with what of further towers has to be as small, where one number of the config says so."""
        return self.part(shape, dropped)

    def part(self, shape: Shape, dropped: Iterable[int]) -> Plan:
        """
        The plan of a shape without certain layers, that keeps the heads and channels that carry most, and the first
        directions of the stream's basis.

        What a head or channel carries is the energy that it adds to the residual stream: the sum of the squares of
        its activations times the squared norm of the columns that read it.

        Args:
            shape: the sizes; what is left out stays.
            dropped: the layers that go; as many as the shape says.

        References:
            An et al., "Fluctuation-based Adaptive Structured Pruning" (2024), where Wanda-sp is this score.
        """
        gone = set(dropped)
        kept = tuple(torch.tensor(float(layer not in gone), dtype=torch.float64) for layer in range(self.layers))
        wanted, dense, none = self.layout.complete(shape), self.layout.dense, (None,) * self.layers
        inner = replace(wanted, num_hidden_layers=None, hidden_size=None, head_dim=None)
        narrower = inner != replace(dense, num_hidden_layers=None)
        heads, channels, further = self._energies if narrower else (none, none, {})
        directions = -torch.arange(self.layout.hidden_size, dtype=torch.float64)  # they are in descending order
        scores = UnitScores(heads, channels, kept, hidden=directions, rotated=True, in_heads=True, further=further)
        return rank(self.layout, scores, wanted)

    @cached_property
    def influence(self) -> tuple[float, ...]:
        """
        Per layer 1 minus the cosine between the residual stream before and after it, averaged over positions.

        References:
            Men et al., "ShortGPT" (2024): Block Influence.
        """
        total = [0.0] * self.layers
        with self._walking() as stream:
            for layer in range(self.layers):
                for index, batch in enumerate(self.batches):
                    before, after = stream.hidden[index].float(), stream.call(layer, index)
                    apart = 1 - functional.cosine_similarity(before, after.float(), dim=-1)
                    mask = position_mask(batch, apart.shape)
                    total[layer] += float(apart.mean() if mask is None else apart[mask].mean())
                    stream.hidden[index] = after
        return tuple(value / len(self.batches) for value in total)

    @cached_property
    def _energies(self) -> tuple[Scores, Scores, dict[str, torch.Tensor | None]]:
        """Per layer (query heads,) and (channels,), and those at modules beside, float64, on the CPU."""
        heads = [self.layout.attention_out(layer) for layer in range(self.layers)]
        channels = [self.layout.ffn_out(layer) for layer in range(self.layers)]
        further = self.layout.further
        ends = {*heads, *channels, *chain(*further.values())} - {""}
        known = {name: self.dense.get_submodule(name) for name in sorted(ends)}
        names = [name for name, module in known.items() if "weight" in module._parameters]
        squares = dict.fromkeys(names, torch.zeros(()))
        batch: Batch = {}

        def see(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
            found = inputs[0].float().square()
            mask = position_mask(batch, found.shape[:-1])
            found = found.flatten(0, -2) if mask is None else found[mask]
            squares[name] = squares[name].to(found.device) + found.sum(0)

        with ExitStack() as hooks, torch.inference_mode():
            for name in names:
                hook = known[name].register_forward_pre_hook(lambda _module, inputs, name=name: see(name, inputs))
                hooks.callback(hook.remove)
            for batch in self.batches:
                output_of(self.dense, batch)
        energies = {name: squares[name].double().cpu() * column_norms(known[name]) for name in names}
        attention = {*heads, *further.get(HEADS, ())} & energies.keys()
        whole = {name: energies[name].reshape(-1, self.layout.head_dim).sum(1) for name in attention}
        beside = {name: (energies | whole).get(name) for name in chain(*further.values())}
        return tuple(map(whole.get, heads)), tuple(map(energies.get, channels)), beside

    def _drawn(self, small: PreTrainedModel) -> float:
        """The divergence of a slim model that predicts classes, by the outcomes drawn."""
        sums = torch.zeros(2, dtype=torch.float64)
        for each in self._references:
            lost = (each.log_dense - _log_odds(output_of(small, each.batch), each.outcomes)) * each.counts
            sums += torch.stack([lost.double().sum(), each.counts.double().sum()]).cpu()
        return float(sums[0] / sums[1])

    @cached_property
    def _expected(self) -> Expected:
        return Expected(self.dense, self.batches)

    @cached_property
    def _references(self) -> list[_Reference]:
        found = []
        with torch.inference_mode():
            for seed, batch in enumerate(self.batches):
                logits = output_of(self.dense, batch)
                flat = logits.flatten(0, -2)
                drawn = draw_classes(flat, torch.Generator().manual_seed(seed)).reshape(*logits.shape[:-1], 1)
                mask = position_mask(batch, logits.shape[:-1])
                counts = torch.ones(logits.shape[:-1], device=logits.device) if mask is None else mask.float()
                found.append(_Reference(batch, drawn, _log_odds(logits, drawn), counts))
        return found

    @contextmanager
    def _walking(self) -> Iterator[Stream]:
        training = self.dense.training
        self.dense.eval()
        try:
            with torch.no_grad():
                yield Stream.start(self.dense, self.layout, self.batches)
        finally:
            self.dense.train(training)


class _OfTower(Judge):
    """A judge of one of several towers."""

    def __init__(self, whole: Judge, number: int) -> None:
        self.whole, self.number = whole, number
        self.dense, self.batches, self.bases = whole.dense, whole.batches, Bases()
        self.layout = whole.layouts[number]
        self.layouts = (self.layout,)

    def loss(self, plan: Plan) -> float:
        """As of the whole model."""
        return self.whole.loss(plan)

    def at(self, shape: Shape, dropped: Iterable[int]) -> Plan:
        """See `Judge.at`."""
        dense = self.layout.dense.to_dict()
        cut = Shape(**{name: size for name, size in shape.to_dict().items() if size != dense.get(name)})
        said = Numbers.of(self.whole.layouts).said_of(self.number, cut)
        towers = self.whole.towers
        return Plan.of_towers(
            [self.part(shape, dropped), *(towers[later].part(sizes, ()) for later, sizes in said.items())]
        )


def _log_odds(logits: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """From logits (..., classes) and classes (..., 1) to log-probabilities (...), float32."""
    rows = zip((row.float() for row in logits), outcomes, strict=True)  # one at a time: they can be large
    return torch.stack([row.gather(-1, drawn).squeeze(-1) - row.logsumexp(-1) for row, drawn in rows])
