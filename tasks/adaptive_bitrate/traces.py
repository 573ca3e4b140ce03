"""Bandwidth traces: read and checked, the published and the leak-free protocol."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from netllm_pl.data import SPLITS
from netllm_pl.errors import UserError, unknown
from netllm_pl.parquet import footer, read_table, whole_parquet
from tasks.adaptive_bitrate.simulator import Floats, Ints, Traces
from tasks.adaptive_bitrate.trace_text import read_text

Where = Callable[[int], str]
"""Names the file and row that a sample of the flat arrays came from."""

NUMBERS = {"time_s": "seconds", "bandwidth_mbps": "Mbit/s"}
KNOWN = ("trace_name", *NUMBERS, "start_ptr", "source")
"""Columns that are read."""
SLOWEST = 1e-3
"""Mbit/s on average; a download over less would hardly end."""
SHORTEST = 0.01
"""Seconds; a download repeats a trace until it is done, and would hardly end over a shorter one."""
VALID_PERCENT = 20
"""Share of the training sources that the leak-free protocol validates on."""


def read_traces(path: Path) -> Traces:
    """Read bandwidth traces, in the order of the file or of the file names.

    Args:
        path: A Parquet file with the columns trace_name, time_s, bandwidth_mbps and, if wanted, start_ptr (sample in
            whose interval a session starts in fixed mode, from 1; default 1) and source; or a text file or a folder
            of them, one trace each, as `trace_text` describes.

    Raises:
        UserError: Something is missing, broken, or makes no trace; the message names file and row.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"trace path {path} does not exist; give a Parquet file, a text file or a folder of them")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    files, samples, lines = read_text(path)
    names = np.array([file.name for file in files])
    starts = _starts([len(part) for part in samples])

    def where(flat: int) -> str:
        trace = _trace_at(starts, flat)
        return f"{files[trace]}, line {lines[trace][flat - starts[trace]]}"

    flat = np.concatenate(samples)
    sources = np.array([source_of(name) for name in names.tolist()])
    pointers = np.ones(len(names), dtype=np.int64)
    traces = Traces(names, sources, starts, flat[:, 0].copy(), flat[:, 1].copy(), pointers)
    return check_traces(traces, where)


def check_traces(traces: Traces, where: Where) -> Traces:
    """Return traces that a session can be played on.

    Args:
        traces: What was read.
        where: Names file and row of a sample.

    Raises:
        UserError: A value is not finite or negative, time does not ascend, a trace has fewer than 2 samples or next
            to no bandwidth, or a start pointer is not one of its samples 1, 2, ...
    """
    time, bandwidth, starts = traces.time_s, traces.bandwidth_mbps, traces.starts

    def refuse(bad: npt.NDArray[np.bool_], what: Callable[[int], str], cure: str) -> None:
        if bad.any():
            flat = int(bad.argmax())
            name = traces.names[_trace_at(starts, flat)]
            raise UserError(f"{where(flat)} (trace {name}): {what(flat)}; {cure}")

    for name, values in (("time_s", time), ("bandwidth_mbps", bandwidth)):
        bad = ~(np.isfinite(values) & (values >= 0))
        refuse(bad, lambda k, n=name, v=values: f"{n} is {v[k]}", "expected a finite number of at least 0")  # type: ignore[misc]
    first = np.zeros(len(time), dtype=bool)
    first[starts[:-1]] = True
    back = (np.diff(time, prepend=-np.inf) <= 0) & ~first
    refuse(back, lambda k: f"time_s {time[k]} follows {time[k - 1]}", "time must ascend within a trace")
    for trace, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        problem = _problem(time[start:end], bandwidth[start:end], int(traces.pointers[trace]))
        if problem:
            raise UserError(f"{where(start)} (trace {traces.names[trace]}): {problem}")
    return traces


def _problem(time: Floats, bandwidth: Floats, pointer: int) -> str:
    """Say what is wrong with a whole trace, if anything."""
    if len(time) < 2:
        return "the trace has one sample; bandwidth holds between two samples, so give at least 2"
    if not time[-1] - time[0] >= SHORTEST:
        return f"the trace lasts {time[-1] - time[0]:g} s; give a longer one, or check the unit (seconds)"
    if time[0] > time[-1] - time[0]:
        return f"time_s starts at {time[0]}, after more than the trace lasts; let it start near 0"
    mean = (bandwidth[1:] * np.diff(time)).sum() / (time[-1] - time[0])
    if not mean >= SLOWEST:
        return f"the trace carries {mean:g} Mbit/s on average, so no download ends; drop it, or check the unit (Mbit/s)"
    if not 1 <= pointer < len(time):
        return f"start_ptr is {pointer}; expected a sample of the trace from 1 to {len(time) - 1}"
    return ""


def source_of(name: str) -> str:
    """Name what a trace was cut from, as its name tells: traces of one source are dependent.

    FCC names hold ``trace_<number>_<site>`` and give ``fcc-<number>``; HSDPA logs are called
    ``<mode>.<route>-report...`` and give ``hsdpa-<mode>.<route>``. Any other name stands for itself.
    """
    if fcc := re.search(r"(?:^|_)trace_(\d+)_", name):
        return f"fcc-{fcc[1]}"
    if hsdpa := re.match(r"(?:\d+_)?([a-z]+\.[\w-]+?)-report", name):
        return f"hsdpa-{hsdpa[1]}"
    return name


def select(traces: Traces, indices: Sequence[int] | Ints) -> Traces:
    """Return some of the traces, in the order of the indices."""
    chosen = np.asarray(indices, dtype=np.int64)
    rows = [np.arange(traces.starts[k], traces.starts[k + 1]) for k in chosen.tolist()]
    flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return Traces(
        traces.names[chosen], traces.sources[chosen], _starts([len(part) for part in rows]),
        traces.time_s[flat], traces.bandwidth_mbps[flat], traces.pointers[chosen],
    )  # fmt: skip


def with_starts(traces: Traces, starts: int) -> Traces:
    """Repeat every trace with start pointers that are spread evenly over it, from its own one on.

    Args:
        traces: Traces.
        starts: How often.
    """
    repeated = select(traces, np.tile(np.arange(len(traces)), starts))  # the traces as they are come first
    lengths = np.diff(repeated.starts) - 1  # pointers are 1 to the last sample
    shifts = np.repeat(np.arange(starts), len(traces)) * lengths // starts
    return replace(repeated, pointers=1 + (repeated.pointers - 1 + shifts) % lengths)


def published_split(data_dir: Path, split: str) -> Traces:
    """Read a split as published: ``abr/traces_<split>.parquet``.

    It leaks. All valid traces are in train, and most test traces are windows of train traces.

    Args:
        data_dir: Root of the data sets.
        split: train, valid or test.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return read_traces(Path(data_dir) / "abr" / f"traces_{split}.parquet")


def leak_free_split(data_dir: Path, split: str) -> Traces:
    """Read a split whose sources occur in no other one.

    Test is the published one. Of the published training traces, those whose source occurs in test are left out; the
    sources s with ``sha256("valid:" + s) % 100 < 20`` make valid, the others train.

    Args:
        data_dir: Root of the data sets.
        split: train, valid or test.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    test = published_split(data_dir, "test")
    if split == "test":
        return test
    pool = published_split(data_dir, "train")
    known = set(test.sources.tolist())
    wanted = [
        k for k, s in enumerate(pool.sources.tolist()) if s not in known and _is_valid(s) == (split == "valid")
    ]  # fmt: skip
    return select(pool, wanted)


def _is_valid(source: str) -> bool:
    return int(hashlib.sha256(f"valid:{source}".encode()).hexdigest(), 16) % 100 < VALID_PERCENT


def _read_parquet(path: Path) -> Traces:
    table = _table(path)
    codes = table["trace_name"].combine_chunks().dictionary_encode()
    labels = np.array(codes.dictionary.to_pylist(), dtype=np.str_)
    # Codes count traces in order of appearance, so that a stable sort keeps the order of traces and of their samples.
    code = codes.indices.to_numpy(zero_copy_only=False)
    row = np.argsort(code, kind="stable")
    starts = _starts(np.bincount(code, minlength=len(labels)))
    first = row[starts[:-1]]

    def where(flat: int) -> str:
        return f"{path}, row {row[flat]}"

    def constant(column: str, default: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One value a trace."""
        if column not in table.column_names:
            return default
        values = np.array(table[column].to_pylist(), dtype=default.dtype.type)
        other = values[row] != np.repeat(values[first], np.diff(starts))
        if other.any():
            at, begin = row[other.argmax()], first[code[row[other.argmax()]]]
            raise UserError(
                f"{path}, row {at} (trace {labels[code[at]]}): {column} is {values[at]}, but {values[begin]} in row "
                f"{begin}; expected one value a trace"
            )
        return values[first]

    sources = constant("source", np.array([source_of(name) for name in labels.tolist()]))
    pointers = constant("start_ptr", np.ones(len(labels), dtype=np.int64))
    time, bandwidth = (np.asarray(table[name], dtype=np.float64)[row] for name in NUMBERS)
    return check_traces(Traces(labels, sources, starts, time, bandwidth, pointers), where)


def _table(path: Path) -> pa.Table:
    """Read the columns that are known, with the right types and without nulls."""
    with whole_parquet(path):
        schema = footer(path, KNOWN).schema.to_arrow_schema()
        wanted = [name for name in ("trace_name", *NUMBERS) if name not in schema.names]
        if wanted:
            raise UserError(f"{path}: missing column {', '.join(wanted)}; found {', '.join(schema.names)}")
        known = [name for name in KNOWN if name in schema.names]
        table = read_table(path, known)
        table.validate(full=True)  # broken bytes can make texts that are none
        if not table.num_rows:
            raise UserError(f"{path}: holds no rows; expected one row a bandwidth sample")
        return pa.table({name: _column(path, name, table[name]) for name in known})


def _column(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    dtype = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
    whole = pa.types.is_integer(dtype)
    if name in ("trace_name", "source"):
        fits, target, expected = text or whole, pa.string(), "text"
    elif name == "start_ptr":
        fits, target, expected = whole, pa.int64(), "integers"
    else:
        fits, target, expected = whole or pa.types.is_floating(dtype), pa.float64(), f"numbers ({NUMBERS[name]})"
    if not fits:
        raise UserError(f"{path}: column '{name}' is {dtype}; expected {expected}")
    if column.null_count:
        row = int(np.asarray(column.is_null()).argmax())
        raise UserError(f"{path}, row {row}: column '{name}' is null; repair or drop the row")
    return column.cast(target)


def _starts(lengths: Sequence[int] | Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _trace_at(starts: Ints, flat: int) -> int:
    return int(np.searchsorted(starts, flat, side="right")) - 1
