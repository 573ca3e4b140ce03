"""metrics.csv of a run: what is logged is on the disk as soon as a checkpoint goes beyond it."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from netllm_pl.paths import atomic


class MetricsFile(CSVLogger):
    """Lightning's logger, whose file survives a kill.

    Lightning's own keeps up to a hundred steps in memory, which a resumed run does not log again, and empties the file
    before it writes a new column. This one writes what it has whenever a checkpoint is written, the metrics of the step
    of the checkpoint right behind it, and replaces the file by a whole one.

    Args:
        folder: Where to write metrics.csv.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), name="", version="")
        self._behind_checkpoint = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Note metrics; write them if they belong to a checkpoint."""
        super().log_metrics(metrics, step)
        if self._behind_checkpoint:
            self._behind_checkpoint = False
            self.save()

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Write what there is."""
        self.save()
        self._behind_checkpoint = True


class _Writer(ExperimentWriter):
    def save(self) -> None:
        """Append what was noted, or replace the file by one with more columns; an error leaves it as it was."""
        if not self.metrics:
            return
        file = Path(self.metrics_file_path)
        rows: list[dict[str, Any]] = []
        known: list[str] = []
        if file.is_file():
            with file.open(newline="") as stream:
                known = next(csv.reader(stream), [])
        names = sorted(set(known).union(*self.metrics))
        if names == known:
            _append(file, _text(names, self.metrics))
        else:
            if known:
                with file.open(newline="") as stream:
                    rows = list(csv.DictReader(stream))
            with atomic(file) as temporary:
                temporary.write_text(
                    _text(names, [dict(zip(names, names, strict=True)), *rows, *self.metrics]), newline=""
                )
        self.metrics = []


def _text(names: list[str], rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO(newline="")
    csv.DictWriter(stream, fieldnames=names).writerows(rows)
    return stream.getvalue()


def _append(file: Path, text: str) -> None:
    """Write to the end of a file, all of it or nothing."""
    size = file.stat().st_size
    try:
        with file.open("a", newline="") as stream:
            stream.write(text)
    except BaseException:
        os.truncate(file, size)
        raise
