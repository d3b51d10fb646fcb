"""The command line: `hawada`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from .errors import HawAdaError

app = typer.Typer(help="Hardware-aware slimming of Hugging Face models.", no_args_is_help=True, add_completion=False)

Model = Annotated[str, typer.Argument(help="Folder or id of the dense model.")]
Mode = Annotated[str | None, typer.Option(help="forward, prefill or decode; by the kind of model if left out.")]
BatchSize = Annotated[int, typer.Option(help="Rows per call.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per row.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels along each side; the config's if left out.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's if left out.")]
Backend = Annotated[str, typer.Option(help="eager, compile or cuda_graph.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback()
def _root() -> None:
    """Hardware-aware slimming of Hugging Face models. Exit codes: 0 done, 1 an error that the message explains."""


@contextmanager
def _one_message() -> Iterator[None]:
    """Errors on bad input as one message, without a traceback."""
    try:
        yield
    except (HawAdaError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(code=1) from None


def _refuse_options(given: Mapping[str, object], why: str) -> None:
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if named:
        raise HawAdaError(f"{', '.join(named)} {why}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for teachers, adapters and slim models.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training: under a minute on two cores.")] = False,
) -> None:
    """Train two small teachers on real data, slim them, and print what came out."""
    # Here, so that the other commands do not need scikit-learn.
    from .demo import render, run_demo

    with _one_message():
        typer.echo(render(run_demo(output, quick=quick)))


@app.command()
def measure(
    model: Model,
    mode: Mode = None,
    batch_size: BatchSize = 1,
    seq_len: SeqLen = None,
    image_size: ImageSize = None,
    dtype: Dtype = None,
    backend: Backend = "eager",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """
    Measure a latency table of a model's shapes on this machine. No weights are loaded.

    Example: hawada measure meta-llama/Llama-3.2-1B --batch-size 8 --seq-len 1024 --dtype bfloat16 --device cuda
    """
    from .adapters.huggingface import Shape
    from .export.find_plan import measure_table, regime_of
    from .latency import LatencyBudget
    from .loading import load_skeleton

    with _one_message():
        skeleton = load_skeleton(model)
        asked = LatencyBudget(
            speedup=1.0,
            batch_size=batch_size,
            seq_len=seq_len,
            image_size=image_size,
            mode=mode,
            dtype=dtype,
            backend=backend,
            device=device,
        )
        table = measure_table(skeleton, regime_of(skeleton, asked))
        if as_json:
            typer.echo(json.dumps(table.to_dict()))
            return
        sizes = table.dense.sizes()
        layers, ffn = sizes["num_hidden_layers"], sizes["intermediate_size"]
        typer.echo(str(table))
        typer.echo(f"FFN sizes in multiples of {table.multiple} are not slower than larger ones")
        for text, shape in (
            (f"{layers * 3 // 4} of {layers} layers", Shape(num_hidden_layers=max(1, layers * 3 // 4))),
            (f"{layers // 2} of {layers} layers", Shape(num_hidden_layers=max(1, layers // 2))),
            (f"FFN {ffn // 2} of {ffn}", Shape(intermediate_size=ffn // 2)),
        ):
            ms = table.estimate(shape.complete(table.dense))
            typer.echo(f"  {text:24} {ms:9.3f} ms  {table.dense_ms / ms:5.2f}x  (estimated)")


@app.command()
def plan(
    model: Model,
    calibration: Annotated[Path, typer.Argument(help="Examples: .safetensors of inputs, .npy, or .txt for an LM.")],
    output: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
    speedup: Annotated[float | None, typer.Option(help="Times faster than the dense model.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds per call.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Of the dense model's latency.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Parameters at most.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Trained gates; Fisher importance if left out.")] = None,
    examples: Annotated[int, typer.Option(help="Calibration examples at most.")] = 64,
    hidden: Annotated[bool, typer.Option("--hidden", help="Without --adapter: cut the hidden size, too.")] = False,
    mode: Mode = None,
    batch_size: BatchSize = 1,
    seq_len: SeqLen = None,
    image_size: ImageSize = None,
    dtype: Dtype = None,
    backend: Backend = "eager",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """
    Find the shape of least loss that meets a budget on this machine, and write the plan for it.

    Example: hawada plan ./teacher text.txt --speedup 1.5 --batch-size 8 --seq-len 256
    """
    from peft import PeftModel, get_peft_model

    from .config import HawAdaConfig
    from .export.find_plan import find_plan
    from .latency import LatencyBudget
    from .loading import batches_of, load_examples, load_model
    from .training import gate_importance

    with _one_message():
        budget = LatencyBudget(
            speedup=speedup,
            latency_ms=latency_ms,
            fraction=fraction,
            max_parameters=max_parameters,
            batch_size=batch_size,
            seq_len=seq_len,
            image_size=image_size,
            mode=mode,
            dtype=dtype,
            backend=backend,
            device=device,
        )
        batches = batches_of(load_examples(calibration, model, length=seq_len or 256, count=examples), 8)
        base = load_model(model, device)
        if adapter is None:
            kinds = ("heads", "ffn", "layers", "hidden") if hidden else ("heads", "ffn", "layers")
            gated: PeftModel = get_peft_model(base, HawAdaConfig(gates=kinds))
            importance = gate_importance(gated, batches)
        else:
            gated, importance = PeftModel.from_pretrained(base, str(adapter)), None
        result = find_plan(gated, budget, batches, importance=importance)
        if result.plan is not None:
            output.write_text(result.plan.to_json())
        best = result.best
        if as_json:
            typer.echo(
                json.dumps(
                    {
                        "shape": best.shape.to_dict(),
                        "measured_ms": best.measured_ms,
                        "dense_ms": result.dense_ms,
                        "speedup": result.speedup,
                        "measured_loss": best.measured_loss,
                        "parameters": best.parameters,
                        "plan": str(output),
                    }
                )
            )
            return
        typer.echo(str(result))
        typer.echo(f"plan written to {output}")


@app.command("slim")
def slim_command(
    base: Model,
    adapter: Annotated[str, typer.Argument(help="Folder or id of the trained gates.")],
    output: Annotated[Path, typer.Argument(help="Folder for the slim model; must not exist yet, or be empty.")],
    plan: Annotated[Path | None, typer.Option(help="Plan to use instead of the one applied to the adapter.")] = None,
    fold: Annotated[bool, typer.Option(help="Fold the gates' soft values into the weights.")] = True,
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
    as_json: Json = False,
) -> None:
    """
    Slim a checkpoint of any size straight from its files, tensor by tensor. The dense model is never in memory.

    With --calibration it is: the slim model's output projections are then refitted to it.

    Example: hawada slim meta-llama/Llama-3.1-8B ./adapter ./slim --max-shard-size 5GB

    Example: hawada slim ./teacher ./adapter ./slim --calibration text.txt
    """
    from .calibrated import slim_calibrated
    from .export.plan import Plan
    from .export.stream import slim_checkpoint
    from .loading import batches_of, load_examples

    from_files = {"max_shard_size": max_shard_size, "verify": verify}
    in_memory = {"examples": examples, "seq_len": seq_len, "device": device}
    with _one_message():
        if calibration is None:
            _refuse_options(in_memory, "needs --calibration: add it, or leave this out")
        else:
            _refuse_options(
                from_files,
                "is for slimming from files, and --calibration slims in memory, where logits are always compared and "
                "transformers cuts the files: leave one of them out",
            )
        chosen = None if plan is None else Plan.from_json(plan.read_text(encoding="utf-8"))
        if calibration is None:
            size, check = max_shard_size or "50GB", verify or "files"
            written = slim_checkpoint(base, adapter, output, plan=chosen, fold=fold, max_shard_size=size, verify=check)
        else:
            batches = batches_of(load_examples(calibration, base, length=seq_len or 256, count=examples or 64), 8)
            written = slim_calibrated(base, adapter, output, batches, plan=chosen, fold=fold, device=device or "cpu")
        if as_json:
            typer.echo(json.dumps(written.to_dict()))
            return
        typer.echo(str(written.plan))
        typer.echo(
            f"{written.parameters:,} of {written.dense_parameters:,} parameters stay: "
            f"{written.weight_bytes / 1e6:.1f} MB in {written.folder}"
        )
        if written.reconstruction is not None:
            typer.echo(f"reconstruction: {written.reconstruction}")
        elif calibration is not None:
            typer.echo("reconstruction: the plan cuts nothing, so there was nothing to refit")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, budget, gates, training, ...")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Another value: section.name=value, as often as needed.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, and print what it would do.")] = False,
    as_json: Json = False,
) -> None:
    """
    Slim a model as a recipe says: train gates, merge, refit, recover, measure, save verified.

    On several GPUs: accelerate launch -m hawada_peft.cli train RECIPE, or torchrun -m in its place.

    Example: hawada train examples/recipes/llama-3.2-1b-h200.yaml --set budget.speedup=2
    """
    from accelerate import PartialState  # type: ignore[import-untyped]

    from .recipes import Recipe, train_recipe

    with _one_message():
        read = Recipe.read(recipe, overrides or [])
        if dry_run:
            steps = read.steps()
            if as_json:
                typer.echo(json.dumps({"recipe": read.to_dict(), "steps": steps, "missing": read.missing_files()}))
                return
            for number, step in enumerate(steps, 1):
                typer.echo(f"{number}. {step}")
            for path in read.missing_files():
                typer.echo(f"missing here: {path}")
            return
        with redirect_stdout(sys.stderr):  # transformers' logs are no result
            result = train_recipe(read, resume=resume)
        processes = PartialState()
        if processes.is_main_process:
            typer.echo(json.dumps(result.to_dict()) if as_json else str(result))
        processes.destroy_process_group()  # its threads must not outlive the interpreter


def main() -> None:
    """The entry point of the `hawada` script."""
    app()


if __name__ == "__main__":
    main()
