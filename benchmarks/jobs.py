"""
Command lines, spread over devices, several on each, until the time is up.

    python benchmarks/jobs.py jobs.txt --devices 0 1 --per-device 3 --seconds 570 --log jobs.log

Each line of the file is a command (no shell; empty lines and those with # in front are left out). They start in their
order, as soon as a device has room, with CUDA_VISIBLE_DEVICES set to it. In a line {device} stands for the device,
{turns} for the path of a lock that all jobs on that device share (see turns.py: many train together, who times is
alone), {until} for the second (since the epoch) at which the time is up. A job that knows {until} stops by itself; one
that does not is stopped a little later, with its children. Nothing is started after it. On CPU cores:
`taskset -c {device} python ...`, --devices 0 1 2 3 --per-device 1.

The log has what the jobs print, line by line, each with its job's number. Exit status: 1 if a job failed, 3 if there
was no time for some, otherwise 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

GRACE = 10.0
"""Seconds that a job has after the time is up, before it is stopped."""


@dataclass(frozen=True)
class Done:
    """A job that ran: its exit status (negative: by which signal it was stopped), where, and for how long."""

    number: int
    status: int
    device: str
    seconds: float


class Log:
    """Lines of several jobs in one file."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.lock, self.started = file, threading.Lock(), time.monotonic()

    def write(self, text: str) -> None:
        """One line, with the seconds since the start."""
        with self.lock:
            self.file.write(f"{time.monotonic() - self.started:6.1f} {text.rstrip()}\n")
            self.file.flush()


def run_jobs(
    lines: Sequence[str], devices: Sequence[str], per_device: int, until: float, log: Log, *, grace: float = GRACE
) -> list[Done]:
    """
    Run command lines.

    Args:
        lines: with placeholders as in the module's docstring.
        devices: what CUDA_VISIBLE_DEVICES is set to.
        per_device: jobs at a time on each.
        until: nothing is started after it, seconds since the epoch.
        log: for what the jobs print.
        grace: seconds after that until what still runs is stopped.

    Returns:
        The jobs that were started, in the order in which they ended.
    """
    waiting, done = deque(enumerate(lines)), []

    def work(device: str, folder: str) -> None:
        while time.time() < until:
            try:
                number, line = waiting.popleft()
            except IndexError:
                return
            values = {"device": device, "turns": str(Path(folder) / f"turns-{device}"), "until": f"{until:.0f}"}
            for name, value in values.items():
                line = line.replace(f"{{{name}}}", value)
            done.append(_run(number, line, device, until + grace, log))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(devices) * per_device) as pool:
        # One job on every device before the second on any.
        for future in [pool.submit(work, device, folder) for _ in range(per_device) for device in devices]:
            future.result()
    return done


def _run(number: int, line: str, device: str, end: float, log: Log) -> Done:
    started = time.monotonic()
    log.write(f"[{number}] starts on {device}: {line}")
    command = shlex.split(line)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable if command[0] == "python" else command[0], *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:

        def stop() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, end - time.time()), stop)
        timer.start()
        for printed in process.stdout or ():
            log.write(f"[{number}] {printed}")
        status = process.wait()
        timer.cancel()
    seconds = time.monotonic() - started
    log.write(f"[{number}] ended with {status} after {seconds:.0f} s")
    return Done(number, status, device, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path, help="a file of command lines")
    parser.add_argument("--devices", nargs="+", default=["0"], help="for CUDA_VISIBLE_DEVICES")
    parser.add_argument("--per-device", type=int, default=3, help="jobs at a time on each")
    parser.add_argument("--seconds", type=float, required=True, help="until nothing more is started")
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args(arguments)
    lines = [line.strip() for line in options.jobs.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    until = time.time() + options.seconds
    with options.log.open("a", encoding="utf-8") as file:
        done = run_jobs(lines, options.devices, options.per_device, until, Log(file))
    failed = [each for each in done if each.status]
    print(f"{len(done)} of {len(lines)} jobs ran, {len(failed)} of them failed: see {options.log}")
    return 1 if failed else 3 if len(done) < len(lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
