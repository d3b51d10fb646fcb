"""
Quality at equal measured latency, data and steps: hawada against its peers.

Latency wants an idle device, training many processes, so the work is in three stages that hand files on:

    python benchmarks/frontier.py shapes --teacher T --data TRAIN --regime prefill:1x256:float32:eager --threads 1 \
        --budgets 1.25 1.5 2 3 --seeds 0 1 2 --out shapes.jsonl
    python benchmarks/frontier.py quality --teacher T --data TRAIN --eval EVAL --shapes shapes.jsonl --device cuda \
        --steps 300 --seeds 0 1 2 --out quality.jsonl
    python benchmarks/frontier.py write --shapes shapes.jsonl --quality quality.jsonl --name llama-cpu \
        --title "A Llama on one CPU core" --page docs/benchmarks.md

`shapes` finds for every contestant, budget and seed the smallest cut whose latency, measured in turns with the dense
model, meets the budget. `quality` makes these models from the trained weights, measures them, recovers all by the same
distillation and measures them again. `write` puts tables and pictures into a page. `all` is the three on one machine,
with the files in a folder; its defaults suit a CPU.

A stage that was interrupted goes on where it stopped. With --shard I/N only every N-th contestant (`shapes`) or run
(`quality`) is worked on, so that several processes can share a file.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from frontier_bench.page import write
from frontier_bench.quality import HAWADA, quality
from frontier_bench.shapes import parse_regime, shapes
from frontier_bench.summary import summarise
from peers.peer import Peer
from work import add_work_arguments, read_pool


def everything(options: argparse.Namespace, peers: Mapping[str, Peer]) -> None:
    """All stages, one after the other."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {stage: str(folder / f"{stage}.jsonl") for stage in ("shapes", "quality")}
    for stage, run in (("shapes", shapes), ("quality", quality)):
        own = copy.copy(options)
        own.out, own.shapes, own.table = files[stage], files["shapes"], options.table or str(folder / "table.json")
        run(own, peers)
    own.quality = files["quality"]
    write(own, peers)


def parser_of(peers: Mapping[str, Peer]) -> argparse.ArgumentParser:
    names = [*HAWADA, *peers]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    parts = {name: commands.add_parser(name) for name in ("shapes", "quality", "write", "summary", "all")}
    runs = {"shapes": shapes, "quality": quality, "write": write, "summary": summarise, "all": everything}
    for name, run in runs.items():
        parts[name].set_defaults(run=run)
    for name in ("shapes", "quality", "all"):
        part = parts[name]
        add_work_arguments(part)
        part.add_argument(
            "--contestants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
        )
        part.add_argument("--seeds", type=int, nargs="+", default=[0])
        part.add_argument("--shard", default="0/1", help=argparse.SUPPRESS if name == "all" else "I/N")
    for name in ("shapes", "quality"):
        parts[name].add_argument("--out", required=True, help="rows are added to this file")
    for name in ("shapes", "all"):
        part = parts[name]
        part.add_argument("--regime", required=True, help=parse_regime.__doc__)
        part.add_argument("--budgets", type=float, nargs="+", default=[1.5, 2.0], help="speedups")
        part.add_argument("--timing-device", default="cpu")
        part.add_argument("--threads", type=int, default=0, help="torch's CPU threads; 0: as torch decides")
        part.add_argument(
            "--clock",
            choices=("wall", "cpu", "toy"),
            default="wall",
            help="cpu: the thread's processor time, for --threads 1 on a busy machine; toy: by a law of sizes",
        )
        part.add_argument("--timing-seconds", type=float, default=6.0, help="per timing, at most")
        part.add_argument("--timing-rounds", type=int, default=15, help="per timing, at least")
        part.add_argument("--table", default="", help="a file for the search's latency table, used if it is there")
    for name in ("quality", "all"):
        part = parts[name]
        part.add_argument("--eval", required=True, help="held-out data of the same kind")
        part.add_argument("--part", choices=("before", "both"), default="both", help="without or with the recovery")
        part.add_argument("--rate", type=float, help="of the recovery; 1e-3 for text, 5e-4 for images if left out")
        part.add_argument("--lora-rate", type=float, default=2e-3)
        part.add_argument("--eval-length", type=int, default=512, help="tokens of a held-out window")
        part.add_argument("--eval-examples", type=int, help="at most; 100 windows or 2000 images if left out")
    parts["quality"].add_argument("--shapes", required=True, help="what the first stage wrote")
    parts["write"].add_argument("--shapes", required=True)
    parts["write"].add_argument("--quality", required=True)
    summary = parts["summary"]
    summary.description = "One short table of several teachers at one budget, for another page."
    for name in ("--shapes", "--quality"):
        summary.add_argument(name, nargs="+", required=True, help="one file per teacher")
    summary.add_argument("--words", nargs="+", required=True, help="for each of them")
    summary.add_argument("--budget", type=float, default=2.0)
    summary.add_argument("--picture", required=True, help="that `write` has made")
    summary.add_argument("--page", default="README.md")
    parts["all"].add_argument("--folder", default="frontier-output", help="for the rows")
    for name in ("write", "all"):
        part = parts[name]
        part.add_argument("--name", required=True, help="of the section and the pictures")
        part.add_argument("--title", required=True)
        part.add_argument("--page", default="docs/benchmarks.md")
        part.add_argument("--pictures", default="docs/pictures", help="a folder")
    parts["shapes"].epilog = read_pool.__doc__
    return parser


def main(arguments: Sequence[str] | None = None, peers: Mapping[str, Peer] | None = None) -> None:
    """The command line. The registered peers are imported here: some need packages of their own."""
    if peers is None:
        from peers.registry import PEERS

        peers = PEERS
    warnings.simplefilter("ignore", FutureWarning)
    options = parser_of(peers).parse_args(arguments)
    options.run(options, peers)


if __name__ == "__main__":
    main()
