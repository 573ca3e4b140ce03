"""Parquet files that others wrote: whole or refused in one line, and never read where memory would not do."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from netllm_pl.errors import UserError

NUMBER = 8
"""Bytes of a number in memory."""


def memory_bytes() -> int:
    """Bytes that data read at once may take: half of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**33


def refuse_more_than_memory(where: str, count: float, what: str) -> None:
    """Raise UserError if so many bytes cannot be in memory.

    Args:
        where: File or folder.
        count: Bytes.
        what: That are so large, such as ``its 5 rows``.
    """
    if count > memory_bytes():
        raise UserError(
            f"{where}: {what} take {count / 1e9:,.1f} GB, more than half of this machine's memory; give a part of it"
        )


@contextmanager
def whole_parquet(path: Path, of: str = "") -> Iterator[None]:
    """Turn whatever a broken file raises while it is read into an error that names it.

    Args:
        path: The file.
        of: What it should hold, such as `` of jobs``.
    """
    try:
        yield
    except UserError:
        raise
    # ValueError: text that is no UTF-8; NotImplementedError: types that numpy or pandas lack
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path}: not a whole Parquet file{of} ({first_line(error)}); fetch or copy it again"
        ) from error


def footer(path: Path, columns: Sequence[str]) -> pq.FileMetaData:
    """Read a file's footer, and refuse a file whose rows would not fit into memory.

    Args:
        path: The file.
        columns: Those that will be read, of numbers or texts, in whatever lists.

    Raises:
        UserError: It is broken or too large.
    """
    with whole_parquet(path):
        found = pq.read_metadata(path)
        schema = found.schema.to_arrow_schema()
        if not all(isinstance(name, str) for name in schema.names):
            raise ValueError("columns without names")
        groups = [found.row_group(k) for k in range(found.num_row_groups)]
        rows = max([found.num_rows, *(group.num_rows for group in groups)])
        # of a column alone a broken footer may not be asked: pyarrow would end the process
        size = NUMBER * rows * len(columns)
        if set(schema.names) <= set(columns):
            size = max(size, sum(group.total_byte_size for group in groups))
        refuse_more_than_memory(str(path), size, f"its {rows} rows")
    return found


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file, or some columns of it, in the calling thread alone.

    Where memory is short, pyarrow waits for ever for threads that could not begin.
    """
    with pq.ParquetFile(path, pre_buffer=False) as file:
        return file.read(None if columns is None else list(columns), use_threads=False)


def first_line(error: BaseException) -> str:
    """What an error says, in one short line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
