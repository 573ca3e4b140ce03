"""Checks experience pools when they are first opened, and copies their steps on the way."""

import json
from collections.abc import Mapping
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from netllm_pl.errors import UserError
from netllm_pl.parquet import footer, read_table, whole_parquet
from netllm_pl.paths import atomic_folder, file_sha256
from netllm_pl.pool_format import EPISODE_COLUMNS, FORMAT, MANIFEST, VERSION, Column, columns_of, schema
from netllm_pl.pool_steps import StepsWriter

Rows = npt.NDArray[np.int64]

BATCH = 65536
"""Rows that are copied at a time, at most."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a pool's manifest and check that the files it tells of are there.

    Raises:
        UserError: The folder is no pool, or not whole.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder} is no experience pool: it has no {MANIFEST}. `python -m netllm_pl collect` makes one"
        )
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise UserError(f"{file} is of format {manifest['format']} {manifest['version']}, not {FORMAT} {VERSION}")
        columns_of(manifest)
        parts = [manifest["episode_table"], *manifest["shards"]]
        whole = all({"file", "bytes", "sha256"} <= set(part) for part in parts)
        if not whole or not manifest["shards"] or not {"task", "steps", "episodes", "made_by"} <= set(manifest):
            raise KeyError("shards, task, steps, episodes or made_by")
        for part in parts:
            if Path(part["file"]).name != part["file"] or len(part["file"]) > 100:
                raise ValueError(f"the file {part['file']!r:.80} is not one of this folder")
        if not all(type(manifest[name]) is int and manifest[name] > 0 for name in ("steps", "episodes")):
            raise ValueError("steps or episodes is no number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is broken ({type(error).__name__}: {error}); collect the pool anew") from error
    for part in parts:
        file = folder / part["file"]
        if not file.is_file():
            raise UserError(f"{file} is missing: the pool is not whole; copy it again or collect it anew")
        if file.stat().st_size != part["bytes"]:
            raise UserError(f"{file} has {file.stat().st_size} bytes in place of {part['bytes']}; copy it again")
    return manifest


def read_episodes(folder: Path, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Read the episode table."""
    file = folder / manifest["episode_table"]["file"]
    with whole_parquet(file):
        footer(file, list(EPISODE_COLUMNS))
        episodes = read_table(file)
        if episodes.schema != pa.schema(EPISODE_COLUMNS) or len(episodes) != manifest["episodes"]:
            raise UserError(f"{file} is not the episode table of this pool; collect it anew")
        episodes.validate(full=True)
        told = [episodes[name] for name in EPISODE_COLUMNS]
        if any(column.null_count for column in told) or pc.min(episodes["steps"]).as_py() < 1:
            raise UserError(f"{file}: holds empty cells, or an episode without steps; collect the pool anew")
        return episodes.to_pandas(use_threads=False)


def write_copy(folder: Path, manifest: Mapping[str, Any], steps: Rows, out: Path) -> None:
    """Check the shards and copy their rows into a folder for `Steps`.

    Args:
        folder: The pool.
        manifest: Its manifest.
        steps: (episodes,) lengths of its episodes.
        out: The folder to make.

    Raises:
        UserError: A shard is not what was collected, or holds what it should not.
    """
    import datasets  # imported late: it takes a second

    columns = columns_of(manifest)
    files = [folder / shard["file"] for shard in manifest["shards"]]
    for file, shard in zip(files, manifest["shards"], strict=True):
        if file_sha256(file) != shard["sha256"]:
            raise UserError(f"{file} differs from what was collected (SHA-256); copy it again")
        with whole_parquet(file):
            _check_schema(file, footer(file, ()).schema.to_arrow_schema(), schema(columns))
    stream = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=True)
    edges, row = np.concatenate([[0], np.cumsum(steps)]), 0
    with atomic_folder(out) as temporary, StepsWriter(temporary, columns) as writer:
        size = min(BATCH, max(1, manifest["steps"] // len(files)))  # not more than a shard: its size is bounded
        for table in stream.with_format("arrow").iter(batch_size=size):
            if row + len(table) <= edges[-1]:
                _check_rows(folder, table, columns, edges, row)
                writer.add(table)
            row += len(table)
            pa.default_memory_pool().release_unused()  # else training begins with what copying took
        if row != manifest["steps"] or row != edges[-1]:
            raise UserError(f"the pool {folder} has {row} steps in place of {manifest['steps']}; collect it anew")


def _check_schema(file: Path, found: pa.Schema, expected: pa.Schema) -> None:
    for field in expected:
        if field.name not in found.names:
            raise UserError(f"{file} has no column '{field.name}'; collect the pool anew")
        if found.field(field.name).type != field.type:
            raise UserError(f"{file}: column '{field.name}' is {found.field(field.name).type}, expected {field.type}")
    if found.names != expected.names:
        raise UserError(f"{file} has columns {', '.join(found.names)}; expected {', '.join(expected.names)}")


def _check_rows(folder: Path, table: pa.Table, columns: Mapping[str, Column], edges: Rows, first: int) -> None:
    """Check that steps are those of the episode table, and that all numbers are there and finite."""
    rows = np.arange(first, first + len(table))
    episode = np.searchsorted(edges, rows, side="right") - 1
    told = table.column("episode").to_numpy(), table.column("step").to_numpy()
    wrong = (told[0] != episode) | (told[1] != rows - edges[episode])
    if wrong.any():
        raise UserError(f"{folder}, row {first + wrong.argmax()}: episode and step are not those of the episode table")
    for name, told_of in columns.items():
        column = table.column(name)
        flat = column.combine_chunks().flatten() if pa.types.is_nested(column.type) else column
        problem = "is empty or has empty cells" if column.null_count or flat.null_count else ""
        if not problem and pa.types.is_floating(flat.type) and not np.isfinite(flat.to_numpy()).all():
            problem = "is not finite"
        if told_of.ragged and (pc.list_value_length(column).to_numpy() % prod(told_of.inner)).any():
            problem = problem or f"holds no whole number of arrays {told_of.inner}"
        if problem:
            k = next((k for k, value in enumerate(column.to_pylist()) if not _is_whole(value, prod(told_of.inner))), 0)
            raise UserError(
                f"{folder}, row {first + k} (episode {episode[k]}, step {told[1][k]}): column '{name}' {problem}; "
                "collect the pool anew"
            )


def _is_whole(value: Any, size: int) -> bool:
    values = value if isinstance(value, list) else [value]
    divides = not isinstance(value, list) or len(values) % max(size, 1) == 0
    return divides and all(number is not None and isfinite(number) for number in values)
