"""Steps of an experience pool as records in plain files, from which windows are read in any order.

A step's values lie side by side, so that a window is one read. Small files are mapped into memory; large ones are read
by position, as the system counts every page that was ever touched through a map, with its neighbours, as memory of the
process: training would seem to take as much memory as the pool is large.

Shapes: R rows.
"""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from netllm_pl.pool_format import Column
from netllm_pl.rollout import Array

Rows = npt.NDArray[np.int64]

MAPPED_BYTES = 256 * 1024**2
"""Files up to this size are mapped."""


class Steps:
    """The steps of a pool.

    Args:
        folder: What `StepsWriter` wrote.
        columns: The pool's columns.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        self.columns = columns
        self._records = _File(_records_file(folder), _record(columns))
        self._lists = {
            name: _File(_list_file(folder, number), column.stored)
            for number, (name, column) in enumerate(columns.items())
            if column.ragged
        }

    def take(self, begins: Rows, counts: Rows) -> dict[str, tuple[Array, Rows | None]]:
        """Copy runs of neighbouring rows.

        Args:
            begins: First row of each run.
            counts: How many rows each has, at least 1; together R.

        Returns:
            For each column its values (R, ...) and None; or, where the length differs between steps, the values of all
            rows one behind the other (sum of lengths, ...) and their lengths (R,).
        """
        records = self._records.take(begins, counts)
        return {
            name: self._take_lists(name, records[name], counts) if column.ragged else (records[name], None)
            for name, column in self.columns.items()
        }

    def _take_lists(self, name: str, places: Rows, counts: Rows) -> tuple[Array, Rows]:
        """Copy the lists of rows; those of neighbouring rows lie side by side, too."""
        column = self.columns[name]
        begins, lengths = places.T
        first = np.cumsum(counts) - counts
        flat = self._lists[name].take(begins[first], np.add.reduceat(lengths, first))
        return flat.reshape(-1, *column.inner), lengths // prod(column.inner)


class StepsWriter:
    """Writes the steps of a pool for `Steps`, as a context manager.

    Args:
        folder: Where; it exists.
        columns: The pool's columns.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        self.folder, self.columns = folder, columns
        self._written = dict.fromkeys(columns, 0)
        self._files: dict[str | None, IO[bytes]] = {}

    def __enter__(self) -> "StepsWriter":
        """Open the files."""
        self._files[None] = _records_file(self.folder).open("wb")
        for number, (name, column) in enumerate(self.columns.items()):
            if column.ragged:
                self._files[name] = _list_file(self.folder, number).open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        for file in self._files.values():
            file.close()

    def add(self, table: pa.Table) -> None:
        """Append rows that have the columns' types."""
        records = np.zeros(len(table), _record(self.columns))
        for name, column in self.columns.items():
            values = table.column(name).combine_chunks()
            if column.ragged:
                begins = np.asarray(values.offsets, np.int64)
                flat = np.asarray(values.flatten(), column.stored)
                records[name][:, 0] = begins[:-1] - begins[0] + self._written[name]
                records[name][:, 1] = np.diff(begins)
                self._written[name] += len(flat)
                self._files[name].write(flat.tobytes())
            else:
                flat = values.flatten() if column.shape else values
                records[name] = np.asarray(flat).reshape(len(table), *column.inner)
        self._files[None].write(records.tobytes())


class _File:
    """Equal elements in a file."""

    def __init__(self, file: Path, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._stream = file.open("rb", buffering=0)
        size = file.stat().st_size
        small = size <= MAPPED_BYTES or not hasattr(os, "preadv")  # which not every system has
        self._map: Array | None = None
        if small:
            self._map = np.memmap(file, dtype, "r") if size else np.empty(0, dtype)
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # runs are short: no reading ahead

    def take(self, begins: Rows, counts: Rows) -> Array:
        """Copy runs of elements."""
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        if self._map is not None:
            shift = np.repeat(begins - (ends - counts), counts)
            chosen: Array = self._map[shift + np.arange(total)]
            return chosen
        buffer = bytearray(total * self.dtype.itemsize)
        view, size, position = memoryview(buffer), self.dtype.itemsize, 0
        for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
            end = position + count * size
            if os.preadv(self._stream.fileno(), [view[position:end]], begin * size) != end - position:
                raise OSError(f"{self._stream.name} was cut off")
            position = end
        return np.frombuffer(buffer, self.dtype)


def _record(columns: Mapping[str, Column]) -> np.dtype[Any]:
    """Type of a step; of a list with its own length it holds where that begins, and its elements."""
    fields: list[Any] = [
        (name, np.int64, (2,)) if column.ragged else (name, column.stored, column.inner)
        for name, column in columns.items()
    ]
    return np.dtype(fields, align=True)


def _records_file(folder: Path) -> Path:
    return folder / "records.bin"


def _list_file(folder: Path, number: int) -> Path:
    return folder / f"column-{number}.bin"
