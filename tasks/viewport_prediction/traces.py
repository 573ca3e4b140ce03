"""Viewport traces: read from Parquet or from the published CSV layout, checked, and written to Parquet."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from netllm_pl.errors import UserError
from netllm_pl.parquet import first_line, footer
from netllm_pl.paths import atomic
from tasks.viewport_prediction.published_csv import csv_sources, read_csv

COLUMNS = ("video", "user", "t", "roll", "pitch", "yaw")
"""Columns of a trace table, one row a sample: labels, seconds, degrees. Any further column is ignored."""

ANGLES = COLUMNS[3:]

Labels = NDArray[np.str_]


@dataclass(frozen=True)
class Traces:
    """Viewport traces, one behind the other, sorted by video and user with numbers in order of their value.

    Attributes:
        angles: (N, 3) float32 raw roll, pitch, yaw in degrees; yaw wraps at +-180.
        times: (N,) float64 seconds.
        video: (M,) label of the video of each trace; numbers are written as in ``str(int)``.
        user: (M,) label of the viewer of each trace.
        starts: (M + 1,) int64; trace m is the rows ``starts[m]`` to ``starts[m + 1]``, in the order of the file.
    """

    angles: NDArray[np.float32]
    times: NDArray[np.float64]
    video: Labels
    user: Labels
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of traces M."""
        return len(self.video)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(M,) number of samples of each trace."""
        return np.diff(self.starts)


def label_order(label: str) -> tuple[int, int, str]:
    """Return the sort key of a label: numbers first, by value, then text."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def read_traces(path: Path) -> Traces:
    """Read viewport traces.

    Args:
        path: A Parquet file or a folder of them with the columns video, user, t, roll, pitch, yaw; or the published
            layout ``<root>/video<V>/5Hz/simple_5Hz_user<U>.csv`` (the ``5Hz`` level may be missing), one video's
            folder of it, or one CSV file.

    Raises:
        UserError: Something is missing, of the wrong type, not a finite number, or broken.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"data path {path} does not exist; give a Parquet file, a folder, or run fetch first")
    shards = [path] if path.suffix == ".parquet" and path.is_file() else sorted(path.glob("*.parquet"))
    traces = _read_parquet(shards) if shards else _read_published(path)
    _warn_of_time(traces, path)
    return traces


def write_traces(traces: Traces, path: Path) -> None:
    """Write traces to one Parquet file that ``read_traces`` reads back; an interrupted write leaves no file there."""
    columns: dict[str, NDArray[np.generic]] = {
        "video": np.repeat(_numbers_if_all(traces.video), traces.lengths),
        "user": np.repeat(_numbers_if_all(traces.user), traces.lengths),
        "t": traces.times,
        **{name: traces.angles[:, column] for column, name in enumerate(ANGLES)},
    }
    with atomic(Path(path)) as temporary:
        pq.write_table(pa.table(columns), temporary, row_group_size=2**17)


def assemble(angles: NDArray[np.float32], times: NDArray[np.float64], video: Labels, user: Labels) -> Traces:
    """Sort rows into traces; rows of one trace keep their order.

    Args:
        angles: (N, 3) degrees.
        times: (N,) seconds.
        video: (N,) label of each row.
        user: (N,) label of each row.
    """
    videos, video_rank = _ranked(video)
    users, user_rank = _ranked(user)
    key = video_rank * len(users) + user_rank
    order = np.argsort(key, kind="stable")
    keys, first = np.unique(key[order], return_index=True)
    starts = np.append(first, len(key)).astype(np.int64)
    return Traces(angles[order], times[order], videos[keys // len(users)], users[keys % len(users)], starts)


def _ranked(labels: Labels) -> tuple[Labels, NDArray[np.int64]]:
    """Return the distinct labels in order, and for each row the place of its label."""
    distinct, code = np.unique(labels, return_inverse=True)
    order = np.array(sorted(range(len(distinct)), key=lambda place: label_order(str(distinct[place]))), dtype=np.int64)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[code]


def _numbers_if_all(labels: Labels) -> NDArray[np.generic]:
    """Return labels as integers, as the public data has them, if that loses nothing."""
    numeric = all(label.isdecimal() and str(int(label)) == label for label in labels.tolist())
    return labels.astype(np.int64) if numeric else labels.astype(object)


def _warn_of_time(traces: Traces, path: Path) -> None:
    """Warn of traces whose time stamps run backwards: public data has some, so their rows stay in file order."""
    backwards = np.diff(traces.times, prepend=traces.times[:1]) <= 0
    backwards[traces.starts[:-1]] = False
    count = int(np.add.reduceat(backwards, traces.starts[:-1]).astype(bool).sum())
    if count:
        warnings.warn(f"{path}: time stamps do not increase in {count} traces; rows keep file order", stacklevel=3)


def _read_published(path: Path) -> Traces:
    """Read the published CSV layout."""
    sources = csv_sources(path)
    tables = [read_csv(source.path) for source in sources]
    rows = [len(table) for table in tables]
    table = np.concatenate(tables)
    video = np.repeat([source.video for source in sources], rows)
    user = np.repeat([source.user for source in sources], rows)
    return assemble(table[:, 1:].astype(np.float32), table[:, 0].copy(), video, user)


def _read_parquet(shards: Sequence[Path]) -> Traces:
    rows = [_checked_rows(shard) for shard in shards]
    if not sum(rows):
        raise UserError(f"{shards[0]}: holds no rows; expected one row a viewport sample")
    # Row numbers in messages count from 0 inside their own file.
    first_row = np.cumsum([0, *rows])
    angles, times, labels, row = [], [], [], 0
    for batch in _stream(shards):
        part = _numbers(batch, row, shards, first_row)
        times.append(part[:, 0])
        angles.append(part[:, 1:].astype(np.float32))
        labels.append(batch.select(["video", "user"]))
        row += batch.num_rows
    if row != sum(rows):
        names = ", ".join(str(shard) for shard in shards[:3])
        raise UserError(f"{names}: {row} of {sum(rows)} rows can be read; fetch or copy it again")
    table = pa.concat_tables(labels)
    return assemble(np.concatenate(angles), np.concatenate(times), _labels(table["video"]), _labels(table["user"]))


def _labels(column: pa.ChunkedArray) -> Labels:
    """Return a text column as a numpy array of fixed width text: by code, as rows repeat few labels."""
    codes = column.combine_chunks().dictionary_encode()
    names: Labels = np.array(codes.dictionary.to_pylist(), dtype=np.str_)
    return np.asarray(names[codes.indices.to_numpy(zero_copy_only=False)])


def _checked_rows(shard: Path) -> int:
    """Check the columns of one file and return how many rows it has; reads the footer only."""
    metadata = footer(shard, COLUMNS)
    schema = metadata.schema.to_arrow_schema()
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise UserError(f"{shard}: missing column {', '.join(missing)}; found {', '.join(schema.names)}")
    for name in COLUMNS:
        _check_type(shard, name, schema.field(name).type)
    return int(metadata.num_rows)


def _check_type(shard: Path, name: str, dtype: pa.DataType) -> None:
    text = pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
    if name in ("video", "user"):
        if not (text or pa.types.is_integer(dtype)):
            raise UserError(f"{shard}: column '{name}' is {dtype}; expected integers or text as labels")
    elif not (pa.types.is_floating(dtype) or pa.types.is_integer(dtype)):
        unit = "seconds" if name == "t" else "degrees"
        raise UserError(f"{shard}: column '{name}' is {dtype}; expected numbers ({unit}): cast it to float32")


def _stream(shards: Sequence[Path]) -> Iterator[pa.Table]:
    """Give the rows of all files in large Arrow tables, through ``datasets``, without a copy on disk."""
    import datasets

    number = datasets.Value("float64")
    label = datasets.Value("string")
    features = datasets.Features({name: label if name in ("video", "user") else number for name in COLUMNS})
    # Reading local files must not touch the network: the library would report the use of its Parquet reader.
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is broken is said below
    try:
        with tempfile.TemporaryDirectory() as cache:
            files = [str(shard.absolute()) for shard in shards]
            stream = datasets.load_dataset(
                "parquet", data_files=files, split="train", streaming=True,
                columns=list(COLUMNS), features=features, cache_dir=cache,
            )  # fmt: skip
            for table in stream.with_format("arrow").iter(batch_size=2**17):
                table.validate(full=True)  # broken bytes can make texts that are none
                yield table
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        names = ", ".join(str(shard) for shard in shards[:3])
        raise UserError(f"{names}: cannot be read ({first_line(error)}); fetch or copy it again") from error
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(level)


def _numbers(batch: pa.Table, row: int, shards: Sequence[Path], first_row: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (rows, 4) t, roll, pitch, yaw, all finite; a missing label or number raises and names its row."""
    for name in COLUMNS:
        column = batch[name].combine_chunks()
        bad = np.asarray(column.is_null())
        if name not in ("video", "user"):
            bad |= ~np.isfinite(np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64))
        if bad.any():
            place = int(bad.argmax())
            shard = int(np.searchsorted(first_row, row + place, side="right")) - 1
            where = f"row {row + place - int(first_row[shard])}"
            trace = f"video {batch['video'][place]}, user {batch['user'][place]}"
            value = column[place] if column[place].is_valid else "null"
            raise UserError(
                f"{shards[shard]}: column '{name}' is {value} in {where} ({trace}); "
                "expected a finite number or a label: repair or drop the row"
            )
    return np.stack([np.asarray(batch[name], dtype=np.float64) for name in COLUMNS[2:]], axis=1)
