"""The published layout of viewport data: one headerless CSV file of ``t, roll, pitch, yaw`` a viewer and video."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from netllm_pl.errors import UserError

RATE = "5Hz"
"""Name of the folder level that holds the sampling rate; it may be missing."""

_PATTERN = "simple_5Hz_user*.csv"
_LAYOUT = "video<V>/5Hz/simple_5Hz_user<U>.csv"


@dataclass(frozen=True)
class CsvSource:
    """One CSV file and the labels that its path gives."""

    path: Path
    video: str
    user: str


def csv_sources(path: Path) -> list[CsvSource]:
    """Find the trace files of a root folder, of one video's folder, or one file.

    Raises:
        UserError: There is none, or two files stand for one trace.
    """
    if path.is_file():
        if path.suffix != ".csv":
            raise UserError(f"{path}: unknown kind of file; expected .parquet or .csv")
        return [_source(path)]
    folders = ("", RATE, "video*", f"video*/{RATE}")
    files = sorted(file for folder in folders for file in path.glob(f"{folder}/{_PATTERN}".lstrip("/")))
    if not files:
        raise UserError(f"{path}: holds neither *.parquet nor {_LAYOUT}; give the folder that holds the traces")
    sources = [_source(file) for file in files]
    _refuse_twice(sources)
    return sources


def read_csv(path: Path) -> NDArray[np.float64]:
    """Read one trace.

    Returns:
        (N, 4) seconds, roll, pitch, yaw in degrees.

    Raises:
        UserError: A line is not four finite numbers, or there is no line.
    """
    if not path.read_bytes().strip():
        raise UserError(f"{path}: is empty; expected lines of t,roll,pitch,yaw")
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float64, ndmin=2, comments=None, encoding="utf-8")
    except ValueError as error:
        raise _bad_line(path) from error
    if table.shape[1] != 4 or not np.isfinite(table).all():
        raise _bad_line(path)
    return table


def _source(path: Path) -> CsvSource:
    """Take the labels from names such as ``video3/5Hz/simple_5Hz_user7.csv``."""
    user = re.search(r"user(\w+)$", path.stem)
    folders = [folder for folder in path.absolute().parent.parts if folder != RATE]
    video = re.fullmatch(r"video(\w+)", folders[-1])
    return CsvSource(
        path, _label(video.group(1) if video else folders[-1]), _label(user.group(1) if user else path.stem)
    )


def _label(text: str) -> str:
    return str(int(text)) if text.isdecimal() else text


def _refuse_twice(sources: list[CsvSource]) -> None:
    seen: dict[tuple[str, str], Path] = {}
    for source in sources:
        other = seen.setdefault((source.video, source.user), source.path)
        if other != source.path:
            trace = f"video {source.video}, user {source.user}"
            raise UserError(f"{other} and {source.path}: both stand for {trace}; remove one")


def _bad_line(path: Path) -> UserError:
    """Find the first line that is not four finite numbers: slow, so only done once reading has failed."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.strip() and not _is_row(line):
            expected = "expected four finite numbers t,roll,pitch,yaw and no header"
            return UserError(f"{path}, line {number}: '{line.strip()[:60]}'; {expected}")
    return UserError(f"{path}: cannot be read as lines of t,roll,pitch,yaw")


def _is_row(line: str) -> bool:
    try:
        numbers = [float(cell) for cell in line.split(",")]
    except ValueError:
        return False
    return len(numbers) == 4 and bool(np.isfinite(numbers).all())
