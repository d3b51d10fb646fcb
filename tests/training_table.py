"""
One training and export for each modality, as the second table of docs/families.md.

    python tests/training_table.py                 # all of them; `make test-training`
    python tests/training_table.py images speech   # some; the lines of the others stay

For each: gates at random values are trained for five steps to give the outputs of the dense model again; the units
that they rank last are removed, in every tower; the model is cut in memory and out of its files, and loaded again.
Ends with status 1 if a loss does not fall, bytes differ, or a model differs from the masked one by more than rounding.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from conftest import difference, gate
from peft import PeftModel
from transformers import PreTrainedModel
from zoo import ZOO

from hawada_peft import slim_checkpoint
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.vanilla.batches import Batch
from hawada_peft.vanilla.outputs import floats_of, outputs_of
from hawada_peft.vanilla.skeleton import auto_class_of

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- training -->\n", "<!-- end of training -->\n"
HEAD = (
    "| modality | class | gated and cut | loss, 5 steps | parameters | masked, float64 | from files | reloaded |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
STEPS, RATE, EXACT = 5, 0.1, 1e-6


@dataclass(frozen=True)
class Modality:
    """A type of the zoo, its towers, and what is to stay."""

    kind: str
    towers: tuple[str, ...]
    keep: dict[str, float]


NARROW, THIN = {"heads": 0.5, "ffn": 0.5, "layers": 0.75}, {"ffn": 0.5, "layers": 0.75}
MODALITIES = {
    "text, decoder": Modality("llama", (), NARROW),
    "text, encoder": Modality("bert", (), THIN),
    "images": Modality("vit", (), NARROW),
    "speech": Modality("wav2vec2-bert", (), THIN),
    "text and images, decoder": Modality("llava", ("text_config", "vision_config"), {"ffn": 0.5}),
    "text and images, two encoders": Modality("siglip", ("text_config", "vision_config"), THIN),
    "encoder-decoder": Modality("t5", ("encoder", "decoder"), NARROW),
}


@dataclass(frozen=True)
class Trained:
    """What came of one."""

    losses: tuple[float, ...]
    parameters: tuple[int, int]
    masked: float
    same_bytes: bool
    reloaded: float
    cut: tuple[str, ...]

    def holds(self) -> bool:
        exact = max(self.masked, self.reloaded) <= EXACT
        return self.losses[-1] < self.losses[0] and self.same_bytes and exact


def built(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return ZOO[kind].model_class(ZOO[kind].make_config()).double().eval()


def train(model: PeftModel, dense: PreTrainedModel, inputs: Batch) -> tuple[float, ...]:
    """The losses of some steps: how far all outputs are from the dense model's, of these."""
    expected = {name: value.detach() for name, value in outputs_of(dense, inputs).items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS + 1):
        with torch.enable_grad():
            found = floats_of(model(**inputs))
            pairs = [(found[name], value) for name, value in expected.items()]
            loss = torch.stack([(one - other).square().mean() / other.square().mean() for one, other in pairs]).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuple(losses)


def slimmed(name: str) -> Trained:
    kind, towers, keep = MODALITIES[name].kind, MODALITIES[name].towers, MODALITIES[name].keep
    dense = built(kind)
    inputs = example_inputs(dense)
    model = gate(built(kind), towers=towers or None)
    losses = train(model, dense, inputs)
    model.eval()
    plan = model.plan(keep_ratio=keep)
    model.apply_plan(plan)
    masked = outputs_of(model, inputs)
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        dense.save_pretrained(folder / "base")
        model.save_pretrained(folder / "adapter")
        small = model.merge_and_unload(inputs=inputs)
        small.save_pretrained(folder / "expected")
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
        files = [(folder / each / "model.safetensors").read_bytes() for each in ("slim", "expected")]
        loaded = auto_class_of(small).from_pretrained(folder / "slim", dtype=torch.float64).eval()
    memory, disk = outputs_of(small, inputs), outputs_of(loaded, inputs)
    return Trained(
        losses=losses,
        parameters=(dense.num_parameters(), small.num_parameters()),
        masked=max(difference(memory[each], masked[each]) for each in masked),
        same_bytes=files[0] == files[1],
        reloaded=max(difference(disk[each], memory[each]) for each in masked),
        cut=tuple(cut(part.dense.sizes(), part.shape.sizes(), part.tower) for part in plan.parts),
    )


def cut(dense: dict[str, int], slim: dict[str, int], tower: str) -> str:
    words = {"num_attention_heads": "heads", "intermediate_size": "FFN", "num_hidden_layers": "layers"}
    told = ", ".join(f"{words[each]} {slim[each]}/{dense[each]}" for each in words if slim[each] < dense[each])
    return f"`{tower}`: {told}" if tower else told


def line(name: str, found: Trained) -> str:
    dense, slim = found.parameters
    return (
        f"| {name} | {ZOO[MODALITIES[name].kind].model} | {'; '.join(found.cut)} | {found.losses[0]:.2g} to "
        f"{found.losses[-1]:.2g} | {dense:,} to {slim:,} | {found.masked:.0e} | "
        f"{'same bytes' if found.same_bytes else 'OTHER BYTES'} | {found.reloaded:.0e} |"
    )


def write(known: dict[str, str]) -> None:
    """Put lines into the page; those of other modalities stay as they are."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {row.split(" |")[0].removeprefix("| "): row for row in old.splitlines() if row.startswith("| ")} | known
    body = HEAD + "".join(f"{rows[name]}\n" for name in MODALITIES if name in rows)
    PAGE.write_text(before + BEGIN + body + END + after, encoding="utf-8")


def main(names: list[str]) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    broken = []
    for name in names or MODALITIES:
        found = slimmed(name)
        write({name: line(name, found)})
        broken += [] if found.holds() else [name]
        print(line(name, found), flush=True)
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
