"""One command in several processes of this machine, each with a GPU of its own if there are any."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO, Any

from netllm_pl.progress import is_quiet

POLL_S = 0.1
"""Seconds between two looks at the processes."""
GRACE_S = 10.0
"""Seconds that a process has to stop before it is killed."""


def without_devices(words: Sequence[str]) -> list[str]:
    """Leave ``--devices N`` out of a command line."""
    places = [place for place, word in enumerate(words) if word == "--devices"]
    left_out = {*places, *(place + 1 for place in places)}
    return [w for place, w in enumerate(words) if place not in left_out and not w.startswith("--devices=")]


def run_shards(command: str, words: Sequence[str], count: int) -> None:
    """Run the shards of a command side by side, each in a process, and wait for all of them.

    A process sees one GPU only; if there are fewer of these than processes, they take turns. The first process shows
    its progress. When one fails, the others are stopped: what they have kept by then, the same command goes on with.

    Args:
        command: A command that takes ``--shard``.
        words: Its arguments.
        count: How many processes.

    Raises:
        SystemExit: A process failed: with its exit code, behind its message.
    """
    with ExitStack() as stack:
        running: list[subprocess.Popen[bytes]] = []
        said: list[tuple[IO[bytes], IO[bytes] | None]] = []
        stack.callback(_stop, running)
        for number in range(count):
            call = [sys.executable, "-m", "netllm_pl", command, *words, "--shard", f"{number + 1}/{count}"]
            call += ["--quiet"] if number or is_quiet() else []
            out = stack.enter_context(TemporaryFile())
            errors = stack.enter_context(TemporaryFile()) if number else None
            running.append(subprocess.Popen(call, stdout=out, stderr=errors, env=_environment(number, count)))
            said.append((out, errors))
        failed = _first_failure(running)
        if failed is not None:
            sys.stderr.write(_text(said[failed][1]))
            code = running[failed].returncode
            if code != 2:  # no mistake of the user's
                print(f"process {failed + 1} of {count} failed; the same command goes on", file=sys.stderr)
            raise SystemExit(code if code > 0 else 128 - code)
        for told, _ in said:
            sys.stdout.write(_text(told))
        sys.stdout.flush()


def _first_failure(running: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all processes have ended, or one has failed; return its number."""
    while True:
        codes = [process.poll() for process in running]
        if any(codes):
            # A mistake hits all of them: the first one, whose errors can be seen, need not be told again.
            wait_for(running[0], GRACE_S / 5)
            return next(number for number, process in enumerate(running) if process.poll())
        if None not in codes:
            return None
        wait_for(running[codes.index(None)], POLL_S)


def wait_for(process: "subprocess.Popen[Any]", seconds: float) -> bool:
    """Wait for the end of a process; tell whether it has ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.terminate()
    for process in running:
        if not wait_for(process, GRACE_S):
            process.kill()
            process.wait()


def _text(stream: IO[bytes] | None) -> str:
    if stream is None:
        return ""
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _environment(number: int, count: int) -> dict[str, str]:
    """Give a process a GPU, and a share of the cores."""
    import torch  # imported late: a wrong command line is told at once

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ, **own}
