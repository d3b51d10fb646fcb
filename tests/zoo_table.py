"""
What is found of the types of the zoo, proved further, as the table in docs/families.md.

    python tests/zoo_table.py            # all types; `make test-zoo`
    python tests/zoo_table.py llama bert # some; the lines of the others stay

For each type: every width but the residual stream at about one half and a layer of each stack left out at once,
against the model with the same closed, in float64 and in float32; then saved, and loaded by its Auto class. Ends with
status 1 if one of these differs by more than rounding, or nothing was found.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from zoo import ZOO

from hawada_peft.discovery import Anatomy
from hawada_peft.discovery.anatomy import Axis, Stack
from hawada_peft.discovery.find import anatomy_of
from hawada_peft.discovery.study import Study, at_once, together
from hawada_peft.discovery.table import free_told
from hawada_peft.discovery.trial.config_tree import scopes_of
from hawada_peft.discovery.trial.proof import apart, cut_out
from hawada_peft.discovery.trial.specimen import run
from hawada_peft.vanilla.skeleton import auto_class_of

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- zoo -->\n", "<!-- end of zoo -->\n"
HEAD = (
    "| type | widths | layers that may go | where a layer's gate is linear | at once, float64 | float32 | reloaded |\n"
    "|---|---|---|---|---|---|---|\n"
)
EXACT = {"float64": 1e-6, "float32": 2e-3, "reloaded": 1e-6}
"""Of an output's largest value; float32 is compared with itself, in another order of sums."""


@dataclass(frozen=True)
class Proved:
    """What was found of a type, and the differences."""

    anatomy: Anatomy
    errors: dict[str, float]
    seconds: float

    def holds(self) -> bool:
        found = bool(self.anatomy.axes or any(stack.free for stack in self.anatomy.stacks))
        return found and all(self.errors[name] <= most for name, most in EXACT.items())


def prove(name: str) -> Proved:
    start = time.process_time()
    kind = ZOO[name]
    anatomy, study = anatomy_of(kind.model_class, kind.make_config())
    seconds = time.process_time() - start
    return Proved(anatomy, errors_of(study), seconds)


def errors_of(study: Study) -> dict[str, float]:
    """Everything at once, in two dtypes, and after a reload."""
    specimen = study.specimen
    cutting = at_once(specimen, *together(study))
    small = cut_out(specimen, cutting)
    found = run(small, specimen.inputs)
    errors = {"float64": apart(specimen.run(cutting.closed()), found)}
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = auto_class_of(small).from_pretrained(folder, dtype="auto").eval()
    for _, config in scopes_of(loaded.config):
        config._experts_implementation = "eager"
    errors["reloaded"] = apart(found, run(loaded, specimen.inputs))
    single = {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in specimen.inputs.items()
    }
    specimen.model.float()
    specimen.inputs = single
    errors["float32"] = apart(specimen.run(cutting.closed()), run(small.float(), single))
    return errors


def line(name: str, anatomy: Anatomy) -> str:
    """What was found of a type; the differences are not in it."""
    widths = ", ".join(map(width, anatomy.axes)) or "none"
    free = "; ".join(f"`{stack.field}`: {free_told(stack)}" for stack in anatomy.stacks) or "none"
    linear = "; ".join(dict.fromkeys(map(branches, anatomy.stacks))) or "none"
    return f"| {name} | {widths} | {free} | {linear} |"


def width(axis: Axis) -> str:
    fields = " + ".join(number.field for number in axis.numbers) or axis.name
    marks = ("†" if axis.written else "") + ("‡" if axis.tied or axis.alike else "") + ("§" if axis.follows else "")
    return f"`{fields}`{marks}"


def branches(stack: Stack) -> str:
    kinds = dict.fromkeys(" + ".join(names) or "blended" for names in stack.branches)
    return ", ".join(kinds)


def numbers(errors: dict[str, float]) -> str:
    return " ".join(f"{errors[name]:.0e} |" for name in EXACT)


def reasons(name: str, anatomy: Anatomy) -> str:
    told = "; ".join(f"`{each.field}`: {each.reason}".replace("|", "/") for each in anatomy.refusals)
    return f"- {name}: {told}" if told else ""


def write(known: dict[str, tuple[str, str]]) -> None:
    """Put lines and reasons into the page, in the zoo's order; those of other types stay as they are."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = {row.split(" |")[0].removeprefix("| "): row for row in old.splitlines() if row.startswith("| ")}
    why = {row.split(":")[0].removeprefix("- "): row for row in old.splitlines() if row.startswith("- ")}
    lines |= {name: row for name, (row, _) in known.items()}
    why |= {name: told for name, (_, told) in known.items()}
    rows = [lines[name] for name in ZOO if name in lines]
    stays = [why[name] for name in ZOO if why.get(name)]
    body = [HEAD.rstrip(), *rows, "", "### What has to stay, and why", "", *stays, ""]
    PAGE.write_text(before + BEGIN + "\n".join(body) + "\n" + END + after, encoding="utf-8")


def main(names: list[str]) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    broken = []
    for name in names or ZOO:
        found = prove(name)
        row = f"{line(name, found.anatomy)} {numbers(found.errors)}"
        write({name: (row, reasons(name, found.anatomy))})
        broken += [] if found.holds() else [name]
        print(f"{row} {found.seconds:.1f} s{'' if found.holds() else '  BROKEN'}", flush=True)
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
