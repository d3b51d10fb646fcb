"""`hawada verify` as a call."""

from __future__ import annotations

import os

from ..errors import HawAdaError
from ..shipping.checks import Verification
from ..shipping.verify import verify_slim
from ._slim import read_plan


def verify(
    slim: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    plan: str | os.PathLike[str] | None = None,
    fold: bool = True,
    compile: bool = False,
    onnx: bool = False,
) -> Verification:
    """
    Check that a slim folder is vanilla and computes what it should. Nothing in it is changed.

    It must load through its Auto class with exactly the weights of its class, from safetensors files, without fields,
    tensors or code of this package; have the sizes that its `hawada_report.json` says, if there is one; and give
    finite outputs.

    Args:
        slim: the folder.
        base: folder or id of the dense model: the slim one must be smaller.
        adapter: folder or id of the gates, with `base`: logits of the gated model are compared, too.
        plan: file of the plan that the export was made with; the report's, or that of the adapter, if left out.
        fold: whether the export folded the gates' soft values.
        compile: also run it under `torch.compile`.
        onnx: also export it to ONNX and run that. Needs `pip install hawada_peft[onnx]`.

    Returns:
        `Verification`: what was found; `ok` tells whether all is well. A folder that is wrong raises nothing.

    Raises:
        FileNotFoundError: if there is no such folder.
        HawAdaError: on options that do not fit together, a missing plan, or an adapter that does not fit.
    """
    chosen = None if plan is None or adapter is None else read_plan(plan)
    if plan is not None and chosen is None:
        raise HawAdaError("plan needs adapter and base, whose logits are then compared; give them as well")
    runtimes = [name for name, wanted in (("compile", compile), ("onnx", onnx)) if wanted]
    return verify_slim(slim, base=base, adapter=adapter, plan=chosen, fold=fold, runtimes=runtimes)
