"""Runs commands that are killed, interrupted, or left without disk or memory, for tests/test_faults.py.

A process that has imported everything forks for each run (Python's fork server), so a run starts at once.
"""

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PRELOADED = [
    "netllm_pl.run", "netllm_pl.collect", "netllm_pl.evaluate", "netllm_pl.fetch", "netllm_pl.commands",
    "tasks.viewport_prediction", "tasks.adaptive_bitrate", "tasks.job_scheduling", "tasks.throughput_prediction",
    "tasks.viewport_prediction.fetching", "callbacks.cost", "callbacks.figures", "callbacks.hyperparameters",
    "transformers.models.llama.modeling_llama", "transformers.models.vit.modeling_vit", "peft", "pooch", "requests",
]  # fmt: skip
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
CODES = {"kill": {-signal.SIGKILL}, "term": {143}, "interrupt": {130}, "full": {1, 2}, "memory": None}
"""Exit codes of a run that was hit; a run that needed more memory may end anyhow."""
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
"""Audit events of Python that are operations on files."""


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    Attributes:
        kind: ``kill``, ``term`` or ``interrupt`` (signals), ``full`` (disk) or ``memory``.
        where: ``operation``: at an operation on files; ``time``: at any moment; ``limit``: where a limit of the
            operating system on the size of files or of memory is reached.
        share: How far, of the operations, seconds, bytes of an undisturbed run; from 0 to 1.
    """

    kind: str
    where: str
    share: float


@dataclass(frozen=True)
class Measured:
    """An undisturbed run.

    Attributes:
        seconds: It took.
        operations: On files of the watched folder.
        largest: Bytes of the largest file that it wrote.
        memory: Bytes of address space by which it grew.
    """

    seconds: float
    operations: int
    largest: int
    memory: int


def draw(rng: np.random.Generator, kind: str) -> Fault:
    """Draw where a fault hits."""
    where = {"full": ("operation", "limit"), "memory": ("operation", "limit")}.get(kind, ("operation", "time"))
    return Fault(kind, str(rng.choice(where)), float(rng.random()))


class Runner:
    """Runs commands.

    Args:
        folder: Everything that they write lies in it.
        cache: Their cache.

    Attributes:
        hits: Runs that were ended by a fault.
        finished: Whether the last run was not.
        any_sum: Take data for the published ones that are not.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.hits = 0
        self.any_sum = self.finished = False

    def __call__(
        self, words: list[str], fault: Fault | None = None, whole: Measured | None = None, fails: str = ""
    ) -> Measured:
        """Run a command; check how it ends, with a message if it is to fail.

        Returns:
            What it took.
        """
        log, note = self.folder / "log.txt", self.folder / "note.json"
        note.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        begun, begins = context.Pipe(duplex=False)
        process = context.Process(target=_victim, args=(words, self, fault, whole, begins))
        process.start()
        begun.recv()
        begin = time.monotonic()
        if fault is not None and fault.where == "time":
            assert whole is not None and process.pid is not None
            process.join(fault.share * whole.seconds)
            if process.is_alive():
                os.kill(process.pid, SIGNALS[fault.kind])
        process.join(900 if fault is None else 60 if fault.kind == "memory" else 180)  # the first one compiles kernels
        if fault is not None and fault.kind == "memory" and process.is_alive():
            process.kill()  # CPython waits for ever for a thread that had no memory to begin with
            process.join()
        seconds = time.monotonic() - begin
        told = f"{fault} exit {process.exitcode}\n{log.read_text() if log.exists() else ''}"
        if fault is not None:
            print(
                f"{words[0]}: {fault.kind} by {fault.where} at {fault.share:.2f}: {process.exitcode}, {seconds:.1f} s"
            )
        if process.is_alive():
            process.kill()
            raise AssertionError(f"hangs: {told}")
        self.finished = process.exitcode == 0
        if fails:
            assert process.exitcode == 2 and fails in told, told
        elif fault is None:
            assert process.exitcode == 0, told
        elif process.exitcode != 0:
            self.hits += 1
            expected = CODES[fault.kind]
            assert expected is None or process.exitcode in expected, told
            if fault.kind != "memory":
                assert "Traceback" not in told, told
        taken = json.loads(note.read_text()) if note.exists() else {"operations": 0, "largest": 0, "memory": 0}
        return Measured(seconds, **taken)


def _victim(words: list[str], runner: Runner, fault: Fault | None, whole: Measured | None, begins: Any) -> None:
    """Run a command in a process of its own, and let it happen."""
    folder = runner.folder
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the fork server had told to do nothing
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # before the command begins
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["NETLLM_CACHE"] = str(runner.cache)
    import torch

    from netllm_pl import cli, parts

    torch.set_num_threads(1)
    parts.SAVE_S = 0.0
    if runner.any_sum:
        from tasks.viewport_prediction import fetching

        fetching.refuse_mismatch = lambda *_: None  # the published archive is not at hand
    counted = _Operations(folder, fault, whole)
    sys.addaudithook(counted)
    size = _address_space()
    if fault is not None and fault.where == "limit":
        assert whole is not None
        if fault.kind == "full":
            limit, most = resource.RLIMIT_FSIZE, int(fault.share * whole.largest)
        else:  # most of it is asked for at the beginning
            limit, most = resource.RLIMIT_AS, size + int(fault.share**2 * whole.memory)
        resource.setrlimit(limit, (most, most))
    try:
        begins.send(None)
        counted.on = True
        cli.main([*words, *(["--debug"] if os.environ.get("NETLLM_DEBUG") else [])])
    except KeyboardInterrupt:  # before the command begins
        os._exit(130)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))  # at once: what is left to do in the interpreter is none of the command's work
    counted.on = False
    largest = max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)
    note = {"operations": counted.number, "largest": largest, "memory": _address_space() - size}
    (folder / "note.json").write_text(json.dumps(note))
    sys.stdout.flush()
    os._exit(0)


class _Operations:
    """An audit hook that counts operations on files, and does something at one of them."""

    def __init__(self, folder: Path, fault: Fault | None, whole: Measured | None) -> None:
        self.folder, self.number, self.on = str(folder), 0, False
        chosen = fault is not None and fault.where == "operation" and whole is not None
        self.at = 1 + int(fault.share * whole.operations) if chosen else None  # type: ignore[union-attr]
        self.kind = fault.kind if fault is not None else ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in OPERATIONS or not str(arguments[0]).startswith(self.folder):
            return
        self.number += 1
        if self.at is None or self.number < self.at:
            return
        if self.kind == "full":  # and stays so
            writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes and event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        elif self.number == self.at:
            if self.kind == "memory":
                raise MemoryError
            os.kill(os.getpid(), SIGNALS[self.kind])


def _address_space() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def readers() -> dict[str, Callable[[Path], object]]:
    """What must read a file by its suffix, if it is whole."""
    import pandas as pd
    import pyarrow.parquet as pq
    import torch
    import yaml
    from safetensors.torch import load_file

    return {
        ".ckpt": lambda file: torch.load(file, weights_only=True), ".parquet": pq.read_table, ".csv": pd.read_csv,
        ".json": lambda file: json.loads(file.read_text()), ".yaml": lambda file: yaml.safe_load(file.read_text()),
        ".safetensors": load_file,
    }  # fmt: skip


def check_whole(*folders: Path) -> None:
    """Check that every file with its own name is whole; what is being written has a hidden folder."""
    read = readers()
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix in read and not any(".partial" in part for part in file.parts):
                try:
                    read[file.suffix](file)
                except Exception as error:
                    raise AssertionError(f"{file} is torn: {error!r}") from error
