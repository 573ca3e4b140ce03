"""Puts experience pools one behind the other: those of the parts of a collection."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from netllm_pl.errors import UserError
from netllm_pl.parquet import read_table
from netllm_pl.paths import atomic_folder, file_sha256
from netllm_pl.pool_check import read_episodes, read_manifest
from netllm_pl.pool_format import PoolWriter, columns_of, refuse_existing


def join_pools(
    pools: Sequence[Path], out: Path, task: str, made_by: Mapping[str, Any], keep_existing: bool = False
) -> None:
    """Make one pool of several, which stay.

    Args:
        pools: Folders of pools with the same columns, in order.
        out: Folder of the pool to write.
        task: Class name of the data module that it belongs to.
        made_by: How it was made.
        keep_existing: Whether one that appears there meanwhile is kept without an error.

    Raises:
        UserError: A pool is not what was written, or there is something at ``out``.
    """
    if len(pools) == 1:
        refuse_existing(out, keep_existing)
        read_manifest(pools[0])
        with atomic_folder(out) as folder:
            for file in pools[0].iterdir():
                _link(file, folder / file.name)
        return
    with PoolWriter(out, task, made_by, keep_existing) as writer:
        for folder in pools:
            manifest = read_manifest(folder)
            episodes = read_episodes(folder, manifest)
            writer.extend(columns_of(manifest), _tables(folder, manifest), {name: episodes[name] for name in episodes})


def _link(file: Path, name: Path) -> None:
    """Give a file another name, where the file system can; else copy it."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _tables(folder: Path, manifest: Mapping[str, Any]) -> Iterator[pa.Table]:
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if file_sha256(file) != shard["sha256"]:
            raise UserError(f"{file} differs from what was collected (SHA-256); copy it again, or remove its part")
        yield read_table(file)
