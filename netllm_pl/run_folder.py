"""The folder of a run: its name, and that no run writes over another."""

import json
import os
import re
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from netllm_pl import __version__
from netllm_pl.errors import UserError
from netllm_pl.paths import atomic
from netllm_pl.quantize import weight_count

LAST, BEST = "last.ckpt", "best.ckpt"
TABLE, RESULTS, NOTE = "metrics.csv", "summary.csv", "run.json"
OF_A_RUN = (LAST, BEST, TABLE, RESULTS)
"""Files that show that a folder holds a run."""
INHERITED = "NETLLM_RUN_DIR"
"""Environment variable in which the first process of a run tells those that it starts where the run goes."""


def task_name(task: type) -> str:
    """Return what a task is called: its folder below ``tasks``, or its class in small letters if it has none."""
    parts = task.__module__.split(".")
    if parts[0] == "tasks" and len(parts) > 1:
        return parts[1]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", task.__name__).lower()


def make_folder(root: Path, name: str) -> Path:
    """Make a new folder named by time, such as ``runs/job_scheduling-20261124-121500``.

    Of two that are made in the same second, the later one has a number.
    """
    first = folder = root / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")


def folder_of_run(task: type) -> Path:
    """Make the folder of a new run, below ``runs``; all processes of a run get the same one."""
    from netllm_pl.launch import told_by_first

    inherited = os.environ.get(INHERITED)
    if inherited is not None and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(inherited)
    folder = Path(told_by_first(lambda: str(make_folder(Path("runs"), task_name(task)))))
    os.environ[INHERITED] = str(folder)
    return folder


def home_of(checkpoint: str | None) -> Path | None:
    """Return the folder of the run that a checkpoint is the last one of; None if there is none."""
    path = None if checkpoint is None else Path(checkpoint)
    return path.parent if path is not None and path.name == LAST and (path.parent / "config.yaml").is_file() else None


def claim(folder: Path, checkpoint: str | None) -> None:
    """Refuse to train into the folder of another run; keep the metrics of the part that a resumed run goes on from.

    Args:
        folder: Where the run goes.
        checkpoint: What it goes on from.

    Raises:
        UserError: The folder holds a run, and not the one that goes on.
    """
    found = next((name for name in OF_A_RUN if (folder / name).exists()), None)
    resumes = checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()
    if found is not None and not resumes:
        last = folder / LAST
        cure = f"go on with it: --ckpt_path {last}" if last.exists() else f"remove it ({found} is there)"
        raise UserError(f"{folder} holds a run already; give another --run_dir, or {cure}")
    metrics = folder / TABLE
    if metrics.is_file():
        metrics.rename(metrics.with_stem(f"metrics-part{len(list(folder.glob('metrics*.csv')))}"))


def note_run(folder: Path, task: nn.Module, steps: int, seconds: float, finished: bool) -> None:
    """Write run.json: what `compare` tells of a run beside its metrics.

    Args:
        folder: Folder of the run.
        task: What was trained.
        steps: Training steps that were taken, in all parts of the run.
        seconds: How long they took.
        finished: Whether it trained to its end.
    """
    weights = [(weight_count(weight), weight.requires_grad) for weight in task.parameters()]
    note = {
        "version": __version__,
        "task": type(task).__name__,
        "finished": finished,
        "steps": steps,
        "train_s": round(seconds, 2),
        "parameters": sum(size for size, _ in weights),
        "trained_parameters": sum(size for size, trained in weights if trained),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    with atomic(folder / NOTE) as temporary:
        temporary.write_text(json.dumps(note, indent=2) + "\n")


def free_place(folder: Path, file: str, command: str) -> Path:
    """Return the folder if it holds no such file, else a new one in it, named by command and time."""
    return make_folder(folder, command) if (folder / file).exists() else folder
