"""What reentrant gradient checkpointing needs of a model whose first layers are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def embeddings_with_gradients(model: nn.Module) -> Iterator[None]:
    """
    Embeddings whose outputs require gradients, as reentrant gradient checkpointing asks of what goes into a layer: it
    passes nothing back through layers whose input does not, and all below the first trained weight is frozen.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        yield
        return
    hook = base.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
