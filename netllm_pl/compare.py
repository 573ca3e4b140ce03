"""Compares runs of `fit` by what they left in their folders: one table, one picture of their learning curves."""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.table import Table
from rich.text import Text

from callbacks.hyperparameters import flatten
from netllm_pl.errors import UserError
from netllm_pl.paths import atomic
from netllm_pl.plain_yaml import load_yaml
from netllm_pl.progress import in_words, is_quiet, output, say
from netllm_pl.run_folder import BEST, LAST, NOTE, RESULTS, TABLE, free_place

LEFT_OUT = ("run_dir", "ckpt_path", "weights_only", "save_every", "figures", "costs", "trainer.default_root_dir")
"""Settings in which runs may differ without being different."""
SHOWN = 8
"""Settings of a run in the printed table; all of them are in compare.csv."""


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        folder: Where it lies.
        settings: Its config, flat: ``model.backbone.layers`` and so on.
        curves: Its metrics, a column each, and ``step``; of a run that went on, those of all parts.
        note: Steps, seconds, numbers of weights; empty if it did not end.
        tested: Columns metric, mean, low, high of its checkpoint on the test split; empty if it was not tested.
    """

    folder: Path
    settings: dict[str, Any]
    curves: pd.DataFrame
    note: dict[str, Any]
    tested: pd.DataFrame

    @property
    def task(self) -> str:
        """Class of its task."""
        return str(self.settings.get("model", "?"))

    @property
    def finished(self) -> bool:
        """Whether it trained to its end."""
        return bool(self.note.get("finished"))

    @cached_property
    def monitored(self) -> tuple[str, bool]:
        """Metric that chose its best checkpoint, and whether more is better."""
        from netllm_pl.discovery import concrete_subclasses
        from netllm_pl.task import NetTask

        task = concrete_subclasses(NetTask).get(self.task)  # type: ignore[type-abstract]
        return ("val/loss", False) if task is None else (task.monitor, task.monitor_mode == "max")

    def row(self) -> dict[str, Any]:
        """Return what there is to tell but its settings, by column."""
        metric, more = self.monitored
        found = self.curves.dropna(subset=[metric]) if metric in self.curves else self.curves.iloc[:0]
        best = None if found.empty else found.loc[found[metric].idxmax() if more else found[metric].idxmin()]
        # Where a resumed part ends with a validation, that is logged one step further than its last step of training.
        steps = self.note.get("steps") or int(self.curves["step"].max()) + 1
        trained, size = self.note.get("trained_parameters"), self.note.get("parameters")
        return {
            "task": self.task,
            "finished": self.finished,
            "steps": steps,
            "train_s": self.note.get("train_s"),
            "trainable_share": trained / size if trained is not None and size else None,
            "monitor": metric,
            "best": None if best is None else best[metric],
            "best_step": None if best is None else int(best["step"]) + 1,
            "last": None if best is None else found[metric].iloc[-1],
            **{f"test/{row.metric}": row.mean for row in self.tested.itertuples()},
        }


def compare(folders: Sequence[Path], out: Path) -> pd.DataFrame:
    """Compare runs, print the table, write compare.csv and compare.png, and say where they are.

    What is no run, or cannot be read, is left out with a line that says why.

    Args:
        folders: Folders of runs.
        out: Where to write; a new folder in it, if it holds a comparison.

    Returns:
        One row a run: columns of `Run.row`, and the settings in which the runs differ.

    Raises:
        UserError: No run is left.
    """
    runs, reasons = [], []
    for folder in dict.fromkeys(Path(folder) for folder in folders):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            reasons.append(str(error))
    if not runs:
        raise UserError(f"no run to compare: {'; '.join(reasons)[:350]}")
    for reason in reasons:
        say(f"left out: {reason}")
    for run in runs:
        if not run.finished:
            say(f"not finished: {run.folder}; its metrics so far are compared")
    names = _names([run.folder for run in runs])
    differing = differences([run.settings for run in runs])
    rows = [
        {"run": name, **run.row(), **{key: run.settings.get(key) for key in differing}}
        for name, run in zip(names, runs, strict=True)
    ]
    table = pd.DataFrame(rows)
    out = free_place(out, "compare.csv", "compare")
    with atomic(out / "compare.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic(out / "compare.png") as temporary:
        draw(dict(zip(names, (run.curves for run in runs), strict=True)), temporary)
    if not is_quiet():
        print_table(table, runs, differing)
    print(f"wrote compare.csv, compare.png in {out}")
    return table


def read_run(folder: Path) -> Run:
    """Read what a run left behind.

    Raises:
        UserError: It is no run, nothing was logged yet, or a file is broken.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it holds no config.yaml")
    try:
        config = load_yaml((folder / "config.yaml").read_text())
        note = json.loads((folder / NOTE).read_text()) if (folder / NOTE).is_file() else {}
        tested = pd.read_csv(folder / RESULTS) if (folder / RESULTS).is_file() else pd.DataFrame({"policy": []})
        own = tested[[Path(str(name)).name in (BEST, LAST) for name in tested["policy"]]]
        settings = {name: value for name, value in flatten(config) if name not in LEFT_OUT}
        curves = read_curves(folder)
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        kind = "broken YAML in config.yaml" if isinstance(error, yaml.YAMLError) else str(error).strip().split("\n")[0]
        raise UserError(f"{folder} cannot be read: {kind}") from error
    return Run(folder, settings, curves, note, own)


def read_curves(folder: Path) -> pd.DataFrame:
    """Join the metrics of the parts of a run: of each step, what was logged last.

    Raises:
        UserError: There are none.
    """
    parts = sorted(folder.glob("metrics-part*.csv"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0))
    files = [file for file in (*parts, folder / TABLE) if file.is_file() and file.stat().st_size]
    joined: pd.DataFrame | None = None
    for file in files:
        text = file.read_text()
        # A disk that is full, or a crash, may cut the last line in the middle of a number.
        frame = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1] or text))
        if "step" not in frame:
            raise UserError(f"{folder} cannot be read: {file.name} has no column step")
        # A run that was killed had gone further than the checkpoint from which it went on.
        frames = [frame] if joined is None else [joined[joined["step"] < frame["step"].min()], frame]
        joined = pd.concat(frames, ignore_index=True)
    if joined is None or joined.empty:
        raise UserError(f"{folder} has logged nothing yet: no {TABLE}")
    return joined


def differences(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ between runs: of the model, the data, the trainer; a key may be absent."""
    parts = ("model", "data", "trainer")
    keys = list(dict.fromkeys(key for one in settings for key in one if key != "model"))  # which is the task
    keys.sort(key=lambda key: (*parts, part := key.partition(".")[0]).index(part))
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1]


def draw(curves: dict[str, pd.DataFrame], file: Path) -> None:
    """Draw the learning curves of runs as PNG: one axis a metric, one line a run.

    Args:
        curves: Metrics of each run, by its name.
        file: Where to write.
    """
    from matplotlib.figure import Figure  # with no pyplot there is no window, and nothing to close

    names = dict.fromkeys(name for frame in curves.values() for name in frame)
    metrics = [name for name in names if name.startswith("val/") or name == "train/loss"]
    columns = min(3, max(1, len(metrics)))
    rows = max(1, math.ceil(len(metrics) / columns))
    figure = Figure(figsize=(5 * columns, 3.2 * rows + 0.25 * len(curves)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, metric in zip(axes, metrics, strict=False):
        for number, (run, frame) in enumerate(curves.items()):
            shown = frame[["step", metric]].dropna() if metric in frame else frame.iloc[:0]
            values = shown.get(metric, [])
            marker = "o" if len(shown) < 30 else None
            look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
            axis.plot(shown["step"] + 1, values, marker=marker, markersize=3, label=run, **look)
        axis.set(title=metric, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes[len(metrics) :]:
        axis.set_axis_off()
    if metrics:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1, fontsize="small")
    figure.savefig(file, dpi=120, format="png")


def print_table(table: pd.DataFrame, runs: Sequence[Run], differing: Sequence[str]) -> None:
    """Print one row a run.

    Args:
        table: As `compare` gives it.
        runs: Its runs.
        differing: Settings in which they differ.
    """
    shown = Table(title=f"{len(runs)} runs", show_lines=True)
    for name in ("run", "task", "settings that differ", "validation: best, last", "test", "trainable", "trained"):
        shown.add_column(name, overflow="fold")
    for row, run in zip(table.to_dict("records"), runs, strict=True):
        own = [f"{key.removeprefix('model.')}: {run.settings[key]}" for key in differing if key in run.settings]
        own = own[:SHOWN] + ([f"... {len(own) - SHOWN} more in compare.csv"] if len(own) > SHOWN else [])
        best = f"{row['monitor']} {_short(row['best'])} at step {_short(row['best_step'])}, {_short(row['last'])}"
        tested = [f"{one.metric} {_short(one.mean)}" for one in run.tested.itertuples()]
        if tested:
            first = run.tested.iloc[0]
            tested[0] += f" [{_short(first['low'])}, {_short(first['high'])}]"
        share = "" if pd.isna(row["trainable_share"]) else f"{100 * row['trainable_share']:.2f} %"
        seconds = "" if pd.isna(row["train_s"]) else f" in {in_words(row['train_s'])}"
        time = f"{row['steps']} steps{seconds}{'' if run.finished else ', unfinished'}"
        validated = "" if pd.isna(row["best"]) else best
        cells = (row["run"], run.task, "\n".join(own), validated, "\n".join(tested), share, time)
        shown.add_row(*map(Text, cells))  # plain: brackets would be taken for markup
    output().print(shown)


def _names(folders: Sequence[Path]) -> list[str]:
    """Call runs by their folders' names, or by their paths if two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _short(value: Any) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)
