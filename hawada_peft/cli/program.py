"""The program: what each command takes, and which call it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__, commands
from ..progress import Progress
from .errors import EXIT_CODES
from .options import command, listed

WHOLE_WAY = (
    "hawada measure ./teacher --batch-size 8 --seq-len 256      what sizes cost here",
    "hawada plan ./teacher text.txt --speedup 1.5 --seq-len 256 the best shape so fast",
    "hawada train recipe.yaml                                   gates, merge, recover",
    "hawada slim ./teacher ./adapter ./slim                     or only the last step",
    "hawada verify ./slim && hawada report ./slim               is it sound; a page on it",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\n\n".join(
        [
            listed("The whole way:", WHOLE_WAY),
            listed("Exit codes:", [f"{code:3}  {meaning}" for code, meaning in EXIT_CODES.items()]),
        ]
    ),
)

Model = Annotated[str, typer.Argument(help="Folder or id of the dense model.")]
Slim = Annotated[Path, typer.Argument(help="Folder of the slim model.")]
Fold = Annotated[bool, typer.Option(help="Fold the gates' soft values into the weights.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hawada_peft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hardware-aware slimming of Hugging Face models."""


@command(app, "hawada demo --quick", "hawada demo --output /tmp/demo --json")
def demo(
    progress: Progress | None,
    output: Annotated[Path, typer.Option(help="Folder for teachers, adapters and slim models.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training: under a minute on two cores.")] = False,
) -> Any:
    """
    Train two small teachers, slim them, and print what came out.

    On data that installed packages carry; needs `pip install hawada_peft[examples]`.
    """
    return commands.demo(output, quick=quick, progress=progress)


@command(
    app,
    "hawada measure ./teacher --batch-size 8 --seq-len 256",
    "hawada measure meta-llama/Llama-3.2-1B --seq-len 1024 --dtype bfloat16 --device cuda",
    "hawada measure ./vit --batch-size 64 --json > table.json",
)
def measure(model: Model, progress: Progress | None, **regime: Any) -> Any:
    """Measure a latency table of a model's shapes on this machine. No weights are loaded."""
    return commands.measure(model, progress=progress, **regime)


@command(
    app,
    "hawada plan ./teacher text.txt --speedup 1.5 --batch-size 8 --seq-len 256",
    "hawada plan ./vit images.safetensors --latency-ms 8 --batch-size 64 --output plan.json",
    "hawada plan ./teacher text.txt --speedup 1.5 --seq-len 256 --adapter ./adapter --json",
)
def plan(
    model: Model,
    progress: Progress | None,
    calibration: Annotated[Path, typer.Argument(help="Examples: .safetensors of inputs, .npy, or .txt for an LM.")],
    output: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
    speedup: Annotated[float | None, typer.Option(help="Times faster than the dense model.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds per call.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Of the dense model's latency.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Parameters at most.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Trained gates; Fisher importance if left out.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Calibration examples at most.")] = 64,
    hidden: Annotated[bool, typer.Option("--hidden", help="Without --adapter: cut the hidden size, too.")] = False,
    refit: Annotated[
        bool | None, typer.Option(help="Judge shapes by refitted models, or by closed gates; refitted where possible.")
    ] = None,
    **regime: Any,
) -> Any:
    """
    Find the best shape that meets a budget here, and write its plan.

    All legal shapes are searched; the answer is the one of least loss that was built and timed on this machine.

    Give one of --speedup, --latency-ms and --fraction, or --max-parameters, or both.
    """
    return commands.plan(
        model,
        calibration,
        output=output,
        speedup=speedup,
        latency_ms=latency_ms,
        fraction=fraction,
        max_parameters=max_parameters,
        adapter=adapter,
        examples=examples,
        hidden=hidden,
        refit=refit,
        progress=progress,
        **regime,
    )


@command(
    app,
    "hawada slim ./teacher ./adapter ./slim",
    "hawada slim meta-llama/Llama-3.1-8B ./adapter ./slim --max-shard-size 5GB",
    "hawada slim ./teacher ./adapter ./slim --calibration text.txt --json",
)
def slim(
    base: Model,
    progress: Progress | None,
    adapter: Annotated[str, typer.Argument(help="Folder or id of the trained gates.")],
    output: Annotated[Path, typer.Argument(help="Folder for the slim model; must not exist yet, or be empty.")],
    plan: Annotated[Path | None, typer.Option(help="Plan to use instead of the one applied to the adapter.")] = None,
    fold: Fold = True,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Size of a weight file at most, as 5GB or 500MB; 50GB if left out.")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(help="files (if left out), or full: also load both models and compare logits.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Load the model, and reconstruct on these examples: as for `hawada plan`.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Calibration examples at most; 64 if left out.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per example of a text; 256 if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to reconstruct: cpu (if left out), cuda, ...")] = None,
) -> Any:
    """
    Slim a checkpoint of any size straight from its files.

    Tensor by tensor: the dense model is never in memory. With --calibration it is, and the slim model's output
    projections are refitted to it.
    """
    return commands.slim(
        base,
        adapter,
        output,
        plan=plan,
        fold=fold,
        max_shard_size=max_shard_size,
        verify=verify,
        calibration=calibration,
        examples=examples,
        seq_len=seq_len,
        device=device,
        progress=progress,
    )


@command(
    app,
    "hawada train examples/recipes/tiny.yaml --dry-run",
    "hawada train examples/recipes/llama-3.2-1b-h200.yaml --set budget.speedup=2",
    "hawada train recipe.yaml --resume --json > result.json",
    "accelerate launch -m hawada_peft.cli train recipe.yaml",
)
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, budget, gates, training, ...")],
    progress: Progress | None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Another value: section.name=value, as often as needed.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, and print what it would do.")] = False,
) -> Any:
    """
    Slim a model as a recipe says, from gates to a verified folder.

    Train gates, merge, refit, recover, measure, save verified. On several GPUs start it with accelerate or torchrun;
    one process prints.
    """
    from accelerate import PartialState  # type: ignore[import-untyped]

    from ..processes import run_program

    result = run_program(
        lambda: commands.train(recipe, set=overrides or (), resume=resume, dry_run=dry_run, progress=progress)
    )
    if dry_run:
        return result
    return result if PartialState().is_main_process else None


@command(
    app,
    "hawada verify ./slim",
    "hawada verify ./slim --base ./teacher --adapter ./adapter",
    "hawada verify ./slim --compile --onnx --json",
    wrong=lambda result: result.problems,
)
def verify(
    slim: Slim,
    base: Annotated[str | None, typer.Option(help="Dense model: the slim one must be smaller.")] = None,
    adapter: Annotated[str | None, typer.Option(help="With --base: compare logits with the gated model.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan of the export; the report's if left out.")] = None,
    fold: Fold = True,
    compile: Annotated[bool, typer.Option("--compile", help="Also run it under torch.compile.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also export it to ONNX, and run that.")] = False,
) -> Any:
    """
    Reload a slim folder, and check that it is what it should be.

    It must be vanilla (loaded strictly through its Auto class, from safetensors files, without a field, tensor or line
    of code from here), of the sizes that its report says, and finite. Exit code 1 if it is not.
    """
    return commands.verify(slim, base=base, adapter=adapter, plan=plan, fold=fold, compile=compile, onnx=onnx)


@command(
    app,
    "hawada report ./slim",
    "hawada report out/slim --training out --output page",
    "hawada report ./slim --peers peers.json --no-pictures --json",
)
def report(
    slim: Slim,
    output: Annotated[Path | None, typer.Option(help="Folder for the page and the pictures.")] = None,
    training: Annotated[Path | None, typer.Option(help="Folder of the training that made it.")] = None,
    search: Annotated[Path | None, typer.Option(help="File of the search, as `hawada plan` leaves it.")] = None,
    peers: Annotated[Path | None, typer.Option(help="File of other models' measurements.")] = None,
    pictures: Annotated[bool, typer.Option(help="Also write the pictures as files.")] = True,
) -> Any:
    """Write a page about a slim model: what was cut, and what it costs."""
    return commands.report(slim, output=output, training=training, search=search, peers=peers, pictures=pictures)
