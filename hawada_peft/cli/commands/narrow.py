"""`hawada narrow`."""

from __future__ import annotations

from typing import Annotated

import typer

from ...progress import Progress
from ..data import DATA, check_data
from ..options import DEVICE, Model, Said

EXAMPLES = (
    "hawada narrow ./vit ./photos ./narrow --head-dim 32",
    "hawada narrow facebook/dinov2-base images.safetensors ./narrow --head-dim 48 --examples 256 --device cuda",
)


def run(
    base: Model,
    progress: Progress | None,
    data: Annotated[str, typer.Argument(help=DATA, show_default=False)],
    output: Annotated[str, typer.Argument(help="Folder for the model, new or empty.", show_default=False)],
    head_dim: Annotated[int, typer.Option(min=1, help="Features that each attention head keeps.", show_default=False)],
    examples: Annotated[int | None, typer.Option(min=1, help="Calibration examples at most; 64 if left out.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per example of a text; 256 if left out.")] = None,
    device: Annotated[str, typer.Option(help="Where the examples go through the model: cpu, cuda, ...")] = DEVICE,
) -> Said:
    """
    Make all attention heads narrower, without training.

    Each keeps the directions that matter most on some examples. For attention without rotary positions, as of ViT,
    DINOv2 or BEiT; other models are refused, with the reason. What comes out is a model of the same class, to be
    planned, trained and slimmed like any other.
    """
    from ...basis.heads.narrow import narrow_heads
    from ...shipping.facts import ExportFacts, calibration_facts
    from ...shipping.save import save_slim
    from ...vanilla.family import locate
    from ...vanilla.loading import checked_device, load_model, processor_of
    from ..shared import read_batches

    device = checked_device(device)
    batches = read_batches(data, base, seq_len=seq_len, examples=examples)
    model = load_model(base, device)
    narrow = narrow_heads(model, batches, head_dim, progress=progress)
    facts = ExportFacts(base=base, calibration=calibration_facts(batches))
    save_slim(narrow, output, processor=processor_of(base), card=facts)
    before, after = model.num_parameters(), narrow.num_parameters()
    heads, size = locate(model).dense.sizes()["num_attention_heads"], locate(model).head_dim
    text = (
        f"{output}: {heads} heads of {head_dim} features in each layer, of {size}; {after:,} of {before:,} parameters"
    )
    found = {"folder": output, "head_dim": head_dim, "dense_head_dim": size, "parameters": after, "dense": before}
    further = (
        f"hawada evaluate {output} --base {base} --data {data}",
        f"hawada plan {output} {data} --speedup 1.5",
    )
    return Said(text, found, next=further)


def check(base: str, data: str, output: str) -> None:
    """Refuse what is not there."""
    from ...files.folder import check_free
    from ...sources import check_source

    check_data(data)
    check_source(base)
    check_free(output)
