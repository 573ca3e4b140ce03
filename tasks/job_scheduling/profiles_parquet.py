"""Profiles of jobs in Parquet: one row a stage.

| column | type | what |
|---|---|---|
| size | text | input size, such as ``2g`` |
| query | integer | number of the query |
| stage | integer | number of the stage in the job, from 0 |
| children | list of integers | stages that wait for it |
| levels | list of integers | numbers of executors at which tasks were measured; the first tells the number of tasks |
| first | list of lists of numbers | at each level, ms: the first task of every executor in the stage |
| fresh | list of lists of numbers | those of them whose executor had just come to the job |
| rest | list of lists of numbers | later tasks |

Rows may be in any order; further columns are ignored.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from netllm_pl.errors import UserError
from netllm_pl.parquet import footer, read_table, whole_parquet
from netllm_pl.paths import atomic
from tasks.job_scheduling.profiles import WAVES, Ints, Profiles, owners, size_key, starts

EXPECTED = {
    "size": ("text", pa.string()),
    "query": ("integers", pa.int64()),
    "stage": ("integers", pa.int64()),
    "children": ("lists of integers", pa.list_(pa.int64())),
    "levels": ("lists of integers", pa.list_(pa.int64())),
    **{wave: ("lists of lists of numbers (ms)", pa.list_(pa.list_(pa.float64()))) for wave in WAVES},
}
COLUMNS = tuple(EXPECTED)


def read_parquet(path: Path) -> Profiles:
    """Read profiles, sorted by size and query.

    Raises:
        UserError: The file is broken, a column is missing or of another type, or stages are missing or given twice.
    """
    table = _table(path)
    sizes = np.array(table["size"].to_pylist(), dtype=np.str_)
    rank = {name: place for place, name in enumerate(sorted(set(sizes.tolist()), key=size_key))}
    query, stage = (table[name].to_numpy() for name in ("query", "stage"))
    order = np.lexsort((stage, query, [rank[name] for name in sizes.tolist()]))
    sizes, query, stage = sizes[order], query[order], stage[order]
    job = np.flatnonzero(np.append(True, (sizes[1:] != sizes[:-1]) | (query[1:] != query[:-1])))
    stage_start = np.append(job, len(stage))
    _refuse_gaps(path, sizes, query, stage, stage_start)
    table = table.take(order)
    child_start, children = _flat(table["children"])
    level_start, levels = _flat(table["levels"])
    waves = [_flat(table[wave]) for wave in WAVES]
    profiles = Profiles(
        sizes[job], query[job], stage_start, child_start, _values(children), level_start, _values(levels),
        np.zeros((len(levels), len(WAVES)), np.int64), np.zeros((len(levels), len(WAVES)), np.int64), np.zeros(0),
    )  # fmt: skip
    durations, end = [], 0
    for column, (wave, (outer, lists)) in enumerate(zip(WAVES, waves, strict=True)):
        if (outer != level_start).any():
            row = int((np.diff(outer) != np.diff(level_start)).argmax())
            found, wanted = np.diff(outer)[row], np.diff(level_start)[row]
            raise UserError(
                f"{path}, {profiles.name(row)}: {wave} has {found} lists for {wanted} levels; expected one a level"
            )
        inner, values = _flat(lists)
        profiles.list_start[:, column], profiles.list_size[:, column] = inner[:-1] + end, np.diff(inner)
        durations.append(_values(values))
        end += len(values)
    return replace(profiles, durations=np.concatenate(durations))


def write_parquet(profiles: Profiles, path: Path) -> None:
    """Write profiles as `read_parquet` reads them; the file appears when it is complete."""
    job = owners(profiles.stage_start)
    columns = {
        "size": pa.array(profiles.sizes[job].tolist(), pa.string()),
        "query": pa.array(profiles.queries[job]),
        "stage": pa.array(np.arange(profiles.stages) - profiles.stage_start[job]),
        "children": _lists(profiles.child_start, profiles.children),
        "levels": _lists(profiles.level_start, profiles.levels),
    }
    for column, wave in enumerate(WAVES):
        start, size = profiles.list_start[:, column], profiles.list_size[:, column]
        inner = starts(size)
        gathered = np.repeat(start - inner[:-1], size) + np.arange(inner[-1])
        columns[wave] = _lists(profiles.level_start, _lists(inner, profiles.durations[gathered]))
    with atomic(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def _lists(start: Ints, values: Any) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(values))


def _refuse_gaps(path: Path, sizes: Any, query: Ints, stage: Ints, stage_start: Ints) -> None:
    """Stages of a job are 0, 1, 2, ... in ascending rows."""
    expected = np.arange(len(stage)) - stage_start[owners(stage_start)]
    wrong = stage != expected
    if wrong.any():
        row = int(wrong.argmax())
        what = f"{path}, job {sizes[row]}/{query[row]}, stage {stage[row]}"
        if row and expected[row] and stage[row] == stage[row - 1]:
            raise UserError(f"{what}: is given twice; keep one row")
        raise UserError(f"{what}: comes where stage {expected[row]} is expected; stages are numbered from 0 on")


def _table(path: Path) -> pa.Table:
    """Read the columns that are known, with the right types and without nulls."""
    with whole_parquet(path, " of jobs"):
        schema = footer(path, COLUMNS).schema.to_arrow_schema()
        missing = [name for name in COLUMNS if name not in schema.names]
        if missing:
            raise UserError(f"{path}: missing column {', '.join(missing)}; found {', '.join(schema.names)}")
        table = read_table(path, COLUMNS)
        table.validate(full=True)  # broken bytes can make lists that point anywhere
        if not table.num_rows:
            raise UserError(f"{path}: holds no jobs; expected one row a stage")
        return pa.table({name: _column(path, name, table[name]) for name in COLUMNS})


def _column(path: Path, name: str, column: pa.ChunkedArray) -> pa.Array:
    dtype = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    expected, target = EXPECTED[name]
    if not _fits(dtype, target):
        raise UserError(f"{path}: column '{name}' is {column.type}; expected {expected}")
    whole = column.cast(target).combine_chunks()
    level = whole
    while True:
        if level.null_count:
            raise UserError(f"{path}: column '{name}' holds nulls; expected {expected}")
        if not pa.types.is_list(level.type):
            return whole
        level = level.flatten()


def _fits(dtype: pa.DataType, target: pa.DataType) -> bool:
    """Whether values of a type can stand for those of another: integers of any width, and lists of them."""
    if pa.types.is_list(target):
        lists = pa.types.is_list(dtype) or pa.types.is_large_list(dtype)
        # lists that are all empty have no type of their own
        return lists and (pa.types.is_null(dtype.value_type) or _fits(dtype.value_type, target.value_type))
    if pa.types.is_string(target):
        return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))
    return bool(pa.types.is_integer(dtype) or (pa.types.is_floating(target) and pa.types.is_floating(dtype)))


def _flat(lists: Any) -> tuple[Ints, pa.Array]:
    """Where each list begins, from 0, and the values of all."""
    whole = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    offsets = whole.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], whole.flatten()


def _values(values: pa.Array) -> Any:
    return values.to_numpy(zero_copy_only=False)
