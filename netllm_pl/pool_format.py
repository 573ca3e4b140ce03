"""What an experience pool is on disk, and how one is written.

A pool is a folder of
  part-00000.parquet ...  one row a step, episodes one behind the other, in order
  episodes.parquet        one row an episode: episode, policy, seed (-1: unknown), steps, return
  manifest.json           format, task, columns, statistics, how it was made, size and SHA-256 of the other files

Columns of a step are `FIXED`, the observations under their own names, and ``values`` if all actions have values.
Arrays of a fixed shape are stored flat, as fixed-size lists. Observations that differ in length from step to step (the
nodes of a graph) are large lists: an array (n, ...) is stored flat, and its shape in the manifest begins with null.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from netllm_pl import __version__
from netllm_pl.errors import UserError
from netllm_pl.paths import atomic_folder, file_sha256
from netllm_pl.rollout import Array, Rollout

FORMAT, VERSION = "netllm_pl experience pool", 1
MANIFEST, EPISODES = "manifest.json", "episodes.parquet"
SHARD_BYTES = 64 * 1024**2
"""Uncompressed size of a shard: what reading and writing hold in memory."""
PORTION = 16384
"""Steps that are turned into columns at a time, or one episode: a long rollout is not copied as a whole."""


@dataclass(frozen=True)
class Column:
    """Type of one column.

    Attributes:
        dtype: Numpy's name of the elements' type.
        shape: Of one step's value; () for a number, None in first place where the length differs between steps.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, values: Array) -> "Column":
        """Type that holds the values (rows, ...) of a rollout: floats become float32, the rest stays as it is."""
        if values.dtype == object:  # arrays of different lengths
            return cls(_stored(values[0].dtype), (None, *values[0].shape[1:]))
        return cls(_stored(values.dtype), values.shape[1:])

    @property
    def ragged(self) -> bool:
        """Whether the length differs between steps."""
        return bool(self.shape) and self.shape[0] is None

    @property
    def inner(self) -> tuple[int, ...]:
        """The fixed part of the shape."""
        return tuple(size for size in self.shape if size is not None)

    @property
    def stored(self) -> np.dtype[Any]:
        """Type of the elements in the files: bits are bytes there."""
        return np.dtype("uint8" if self.dtype == "bool" else self.dtype)

    @property
    def arrow(self) -> pa.DataType:
        """Type in the files."""
        element = pa.from_numpy_dtype(self.stored)
        if self.ragged:
            return pa.large_list(element)
        return pa.list_(element, prod(self.inner)) if self.shape else element

    def pack(self, values: Array) -> pa.Array:
        """Turn values (rows, ...), or an object array of arrays (n, ...), into a column of a file."""
        parts = values if self.ragged else [values]
        if {part.shape[1:] for part in parts} - {self.inner}:
            raise ValueError(f"arrays of different shapes in one column; its first was {self.shape}")
        if self.ragged:
            flat, lengths = np.concatenate(list(values)).reshape(-1), [value.size for value in values]
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
            return pa.LargeListArray.from_arrays(offsets, self._elements(flat))
        elements = self._elements(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(elements, prod(self.inner)) if self.shape else elements

    def _elements(self, flat: Array) -> pa.Array:
        flat = flat.astype(self.dtype, copy=False)
        return pa.array(flat.view(np.uint8) if self.dtype == "bool" else flat)


ELEMENTS = {"bool", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
"""Types of elements."""

FIXED = {
    "episode": Column("int64"),
    "step": Column("int32"),
    "action": Column("int32"),
    "reward": Column("float64"),
    "return_to_go": Column("float64"),
}
"""Columns of every pool; an action may have a shape. A return to go is the sum of rewards from here to the end."""

EPISODE_COLUMNS = {
    "episode": pa.int64(),
    "policy": pa.string(),
    "seed": pa.int64(),
    "steps": pa.int64(),
    "return": pa.float64(),
}


def _stored(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "f":
        return "float32"
    if dtype.kind in "iub":
        return dtype.name
    raise TypeError(f"an experience pool holds numbers, not {dtype}")


class PoolWriter:
    """Writes a pool, as a context manager: under a temporary name, which is renamed when the pool is whole.

    Args:
        folder: The folder to make.
        task: Class name of the data module that the pool belongs to.
        made_by: How it was made: what JSON can hold, and dataclasses.
        keep_existing: Whether a folder of that name that appears meanwhile is kept in place of this one; otherwise it
            is an error, as is one that exists at the start.

    Raises:
        UserError: The folder exists, or nothing was added.
    """

    def __init__(
        self, folder: Path, task: str, made_by: Mapping[str, Any] | None = None, keep_existing: bool = False
    ) -> None:
        self.folder, self.task, self.keep_existing = Path(folder), task, keep_existing
        self.made_by = dict(made_by or {})
        self.columns: dict[str, Column] = {}
        self._stack = ExitStack()
        self._waiting: list[pa.Table] = []
        self._shards: list[dict[str, Any]] = []
        self._episodes: dict[str, list[Array]] = {"policy": [], "seed": [], "steps": [], "return": []}
        self._count = 0
        refuse_existing(self.folder, self.keep_existing)

    def __enter__(self) -> Self:
        """Make the temporary folder."""
        self._temporary = self._stack.enter_context(atomic_folder(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left and the manifest, and rename; remove all after an error."""
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def add(self, rollout: Rollout, policy: str, seeds: Sequence[int] | Array | None = None) -> None:
        """Append the episodes of a rollout.

        Args:
            rollout: N episodes with recorded observations. An observation ``reward`` (of the last action) is left out,
                as the row before holds it; ``info["values"]`` (T, N, A) is kept as ``values``. What differs in length
                from step to step is an object array (T, N) of arrays.
            policy: Who acted.
            seeds: (N,) what the episodes were drawn from.

        Raises:
            UserError: A reward or observation is not finite.
        """
        alive = rollout.alive.T
        steps = alive.sum(1)
        if not rollout.observations or steps.size == 0 or (steps == 0).any():
            raise ValueError("a pool holds episodes with steps and recorded observations: rollout(..., record=True)")
        rewards = np.where(alive, rollout.rewards.T, 0.0)
        to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
        seen = {name: column for name, column in rollout.observations.items() if name != "reward"}
        if "values" in rollout.info:
            seen["values"] = rollout.info["values"]
        clash = sorted(set(seen) & set(FIXED))
        if clash:
            raise ValueError(f"observations may not be called {', '.join(clash)}")
        columns = {name: column.swapaxes(0, 1) for name, column in (seen | {"action": rollout.actions}).items()}
        columns |= {"reward": rewards, "return_to_go": to_go}
        for part in _portions(steps):
            rows = {name: column[part][alive[part]] for name, column in columns.items()}
            episodes = np.arange(self._count + part.start, self._count + part.stop)
            rows |= {"episode": np.repeat(episodes, steps[part]), "step": np.nonzero(alive[part])[1]}
            self._check(rows, policy)
            self._append(rows)
        self._count += len(steps)
        about = {"policy": [policy] * len(steps), "seed": [-1] * len(steps) if seeds is None else seeds}
        for name, values in (about | {"steps": steps, "return": to_go[:, 0]}).items():
            self._episodes[name].append(np.asarray(values))

    def extend(self, columns: Mapping[str, Column], tables: Iterable[pa.Table], episodes: Mapping[str, Array]) -> None:
        """Append another pool.

        Args:
            columns: Its columns, which must be those of this pool.
            tables: Its steps.
            episodes: Its episodes: policy, seed, steps and return, each (episodes,).
        """
        self.columns = self.columns or dict(columns)
        if self.columns != dict(columns):
            raise ValueError(f"columns {sorted(columns)} differ from this pool's {sorted(self.columns)}")
        for table in tables:
            place = table.column_names.index("episode")
            self._keep(table.set_column(place, "episode", pc.add(table["episode"], self._count)))
        self._count += len(episodes["steps"])
        for name, parts in self._episodes.items():
            parts.append(np.asarray(episodes[name]))

    def _check(self, rows: dict[str, Array], policy: str) -> None:
        for name, values in rows.items():
            finite = _finite(values)
            if not finite.all():
                bad = int(rows["episode"][finite.argmin()]) - self._count
                raise UserError(f"'{name}' is not finite in episode {bad} of this rollout of {policy}; check the data")
        if not self.columns:
            fixed = FIXED | {"action": Column("int32", rows["action"].shape[1:])}
            self.columns = fixed | {name: Column.of(rows[name]) for name in rows if name not in fixed}
        if set(rows) != set(self.columns):
            raise ValueError(f"columns {sorted(rows)} differ from the first rollout's {sorted(self.columns)}")
        for name in set(rows) - set(FIXED):
            if Column.of(rows[name]) != self.columns[name]:
                raise ValueError(f"'{name}' is {Column.of(rows[name])}, in the first rollout {self.columns[name]}")

    def _append(self, rows: dict[str, Array]) -> None:
        """Put rows behind those that wait, and write whole shards."""
        packed = {name: column.pack(rows[name]) for name, column in self.columns.items()}
        self._keep(pa.table(packed, schema=schema(self.columns)))

    def _keep(self, table: pa.Table) -> None:
        self._waiting.append(table)
        while sum(table.nbytes for table in self._waiting) >= SHARD_BYTES:
            table = pa.concat_tables(self._waiting)
            size = max(1, int(len(table) * SHARD_BYTES / table.nbytes))
            self._write(table.slice(0, size))
            self._waiting = [table.slice(size)]

    def _write(self, table: pa.Table) -> None:
        name = f"part-{len(self._shards):05d}.parquet"
        pq.write_table(table, self._temporary / name, row_group_size=len(table), compression="zstd")
        self._shards.append({**_identity(self._temporary / name), "steps": len(table)})

    def _finish(self) -> None:
        if not self._count:
            raise UserError(f"no episodes for {self.folder}; an empty experience pool is not written")
        left = pa.concat_tables(self._waiting)
        if len(left):
            self._write(left)
        episodes = {name: np.concatenate(parts) for name, parts in self._episodes.items()}
        table = {"episode": np.arange(self._count), **episodes}
        pq.write_table(pa.table(table, schema=pa.schema(EPISODE_COLUMNS)), self._temporary / EPISODES)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "task": self.task,
            "episodes": self._count,
            "steps": int(episodes["steps"].sum()),
            "return": _statistics(episodes["return"]),
            "policies": {
                str(name): {
                    "episodes": int((episodes["policy"] == name).sum()),
                    "steps": int(episodes["steps"][episodes["policy"] == name].sum()),
                    "return": _statistics(episodes["return"][episodes["policy"] == name]),
                }
                for name in dict.fromkeys(episodes["policy"])
            },
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "made_by": {"netllm_pl": __version__, **self.made_by},
            "episode_table": _identity(self._temporary / EPISODES),
            "shards": self._shards,
        }
        (self._temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, default=_plain) + "\n")
        refuse_existing(self.folder, self.keep_existing)


def refuse_existing(folder: Path, keep_existing: bool = False) -> None:
    """Raise UserError if there is a pool, or anything, where one is to be written, unless it is to be kept."""
    if folder.exists() and not keep_existing:
        raise UserError(f"{folder} exists; choose another folder for the pool, or remove it")


def schema(columns: Mapping[str, Column]) -> pa.Schema:
    """Schema of the shards."""
    return pa.schema([(name, column.arrow) for name, column in columns.items()])


def columns_of(manifest: Mapping[str, Any]) -> dict[str, Column]:
    """Columns of a pool's steps."""
    columns = {name: Column(told["dtype"], tuple(told["shape"])) for name, told in manifest["columns"].items()}
    for name, column in columns.items():
        sizes = column.shape[column.ragged :]
        numbers = all(type(size) is int and 0 <= size < 2**31 for size in sizes) and prod(column.inner) < 2**31
        if column.dtype not in ELEMENTS or not numbers or (column.ragged and not prod(column.inner)):
            raise ValueError(f"column {name!r:.40} of {column.dtype!r:.40} and shape {column.shape!r:.40}")
    return columns


def _portions(steps: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Divide episodes of so many steps into neighbours of at most `PORTION` steps, or single ones."""
    start, taken = 0, 0
    for number, size in enumerate(steps.tolist()):
        if number > start and taken + size > PORTION:
            yield slice(start, number)
            start, taken = number, 0
        taken += size
    yield slice(start, len(steps))


def _finite(values: Array) -> npt.NDArray[np.bool_]:
    """Say of each row whether all of its numbers are finite."""
    parts = list(values) if values.dtype == object else [values]
    finite = np.ones(len(values), np.bool_)
    if parts[0].dtype.kind == "f":
        wrong = np.nonzero(~np.isfinite(np.concatenate(parts).reshape(-1)))[0]
        sizes = [part.size for part in parts] if values.dtype == object else [values[0].size] * len(values)
        finite[np.searchsorted(np.cumsum(sizes), wrong, side="right")] = False
    return finite


def _identity(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _statistics(returns: npt.NDArray[np.float64]) -> dict[str, float]:
    return {"min": float(returns.min()), "mean": float(returns.mean()), "max": float(returns.max())}


def _plain(value: Any) -> Any:
    """What JSON can hold in place of a value."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
