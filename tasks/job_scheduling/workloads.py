"""Workloads: profiles of jobs, prepared as the simulator draws from them."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError
from tasks.job_scheduling.profiles import (
    WAVES,
    Floats,
    Ints,
    Profiles,
    Where,
    check_profiles,
    heights,
    owners,
    reversed_edges,
    size_key,
    sorted_children,
)
from tasks.job_scheduling.profiles_parquet import read_parquet
from tasks.job_scheduling.published_npy import read_published

__all__ = ["LEVELS", "WAVES", "Workload", "prepare", "read_workload"]

FRESH, FIRST, REST = range(len(WAVES))
"""Numbers of `WAVES`."""
LEVELS = (5, 10, 20, 40, 50, 60, 80, 100)
"""Numbers of executors between which the simulator interpolates."""


@dataclass(frozen=True)
class Workload:
    """Job templates one behind the other in flat arrays: T templates, S stages, E edges, D durations.

    Templates are sorted by size and query. Stages are numbered within a template in `children` and `parents`.

    Attributes:
        sizes: (T,) input size of a template, such as ``2g``.
        queries: (T,) number of its query.
        stage_start: (T + 1,) where the stages of a template begin.
        num_tasks: (S,) tasks of a stage.
        rough_ms: (S,) mean of all durations of the stage.
        height: (S,) longest path to a stage without children, in edges.
        child_start: (S + 1,) where the children of a stage begin.
        children: (E,) ascending.
        parent_start: (S + 1,) where the parents of a stage begin.
        parents: (E,) ascending.
        wave_start: (S, 8, 3) where the durations of a stage at each of `LEVELS` and of each of `WAVES` begin.
        wave_size: (S, 8, 3) how many there are. A stage that lacks a level has those of its largest one.
        level_key: (S, 8) the level that they are of.
        level_present: (S, 8) whether the stage has the level itself.
        durations: (D,) ms, lists in the order of the source.
        medians: (S, 8, 3) lower median of the durations, nan where there are none.
        table: (sizes, queries) number of the template, over distinct ascending sizes and queries.
    """

    sizes: npt.NDArray[np.str_]
    queries: Ints
    stage_start: Ints
    num_tasks: Ints
    rough_ms: Floats
    height: Ints
    child_start: Ints
    children: Ints
    parent_start: Ints
    parents: Ints
    wave_start: Ints
    wave_size: Ints
    level_key: Ints
    level_present: npt.NDArray[np.bool_]
    durations: Floats
    medians: Floats
    table: Ints

    def __len__(self) -> int:
        """Number of templates."""
        return len(self.sizes)

    def template(self, size_index: int, query_index: int) -> int:
        """Number of the template of the so-manieth distinct size and query."""
        return int(self.table[size_index, query_index])


def read_workload(path: Path) -> Workload:
    """Read a workload.

    Args:
        path: A Parquet file, as `profiles_parquet` describes, or a folder, as `published_npy` does.

    Raises:
        UserError: Something is missing or broken, or makes no jobs; the message names file, job and stage.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"workload {path} does not exist; give a Parquet file or a folder, or fetch tpch")
    return prepare(read_published(path) if path.is_dir() else read_parquet(path), str(path))


def prepare(profiles: Profiles, source: str) -> Workload:
    """Clean profiles, and index them by level.

    Of the durations of first waves, those that stand in the list of fresh executors too are removed, one for one; a
    list that is empty then takes that of the next lower level. So do spark-sched-sim and NetLLM.

    Args:
        profiles: Jobs.
        source: Their file, for messages.

    Raises:
        UserError: They make no jobs that can be run.
    """

    def where(stage: int) -> str:
        return f"{source}, {profiles.name(stage)}"

    table = _table(profiles, source)
    check_profiles(profiles, where)
    num_tasks = _num_tasks(profiles, where)
    list_start, list_size, durations = _cleaned(profiles)
    rough = _means(profiles, list_start, list_size, durations)
    rows, present = _rows(profiles)
    wave_start, wave_size = list_start[rows], list_size[rows]
    _refuse_no_draw(profiles, rows, wave_size, where)
    medians = _medians(wave_start, wave_size, durations)
    parent_start, parents = reversed_edges(profiles)
    return Workload(
        profiles.sizes, profiles.queries, profiles.stage_start, num_tasks, rough, heights(profiles, where),
        profiles.child_start, sorted_children(profiles), parent_start, parents,
        wave_start, wave_size, profiles.levels[rows], present, durations, medians, table,
    )  # fmt: skip


def _table(profiles: Profiles, source: str) -> Ints:
    if not len(profiles):
        raise UserError(f"{source}: holds no jobs")
    sizes = sorted(set(profiles.sizes.tolist()), key=size_key)
    queries = np.unique(profiles.queries)
    table = np.full((len(sizes), len(queries)), -1, dtype=np.int64)
    at = [sizes.index(size) for size in profiles.sizes.tolist()], np.searchsorted(queries, profiles.queries)
    table[at] = np.arange(len(profiles))
    if (table < 0).any():
        size, query = np.argwhere(table < 0)[0].tolist()
        raise UserError(
            f"{source}: no job of size {sizes[size]} and query {queries[query]}; sizes and queries are drawn apart, so "
            "give every size of every query"
        )
    empty = np.diff(profiles.stage_start) == 0
    if empty.any():
        job = int(empty.argmax())
        raise UserError(f"{source}, job {profiles.sizes[job]}/{profiles.queries[job]}: has no stages; drop it")
    return table


def _num_tasks(profiles: Profiles, where: Where) -> Ints:
    """(S,) tasks of the first and later waves at the level that is stored first."""
    stored = profiles.list_size[profiles.level_start[:-1]]
    tasks = stored[:, FIRST] + stored[:, REST]
    if (tasks == 0).any():
        stage = int((tasks == 0).argmax())
        level = profiles.levels[profiles.level_start[stage]]
        raise UserError(f"{where(stage)}: no tasks; first and rest are empty at its first level, {level}")
    return tasks


def _cleaned(profiles: Profiles) -> tuple[Ints, Ints, Floats]:
    """Starts and sizes of lists (L, 3), and durations (D,), with first waves that hold no fresh executors."""
    start, size = profiles.list_start.copy(), profiles.list_size.copy()
    added: list[list[float]] = []
    end = len(profiles.durations)
    for row in np.flatnonzero((size[:, FRESH] > 0) & (size[:, FIRST] > 0)).tolist():
        fresh, first = (
            profiles.durations[a : a + n].tolist() for a, n in zip(start[row, :2], size[row, :2], strict=True)
        )
        kept = _without(first, fresh)
        start[row, FIRST], size[row, FIRST] = end, len(kept)
        end += len(kept)
        added.append(kept)
    for begin, stop in pairwise(profiles.level_start.tolist()):
        if size[begin:stop, FIRST].all():
            continue
        order = begin + np.argsort(profiles.levels[begin:stop])
        for lower, row in pairwise(order.tolist()):
            if size[row, FIRST] == 0:
                start[row, FIRST], size[row, FIRST] = start[lower, FIRST], size[lower, FIRST]
    return start, size, np.concatenate([profiles.durations, *(np.array(kept) for kept in added)])


def _without(values: list[float], taken: list[float]) -> list[float]:
    """Values in their order, less the first occurrences of those that were taken."""
    left = Counter(taken)
    kept = []
    for value in values:
        if left[value] > 0:
            left[value] -= 1
        else:
            kept.append(value)
    return kept


def _means(profiles: Profiles, start: Ints, size: Ints, durations: Floats) -> Floats:
    """(S,) mean over all levels and waves."""
    sums = np.concatenate([[0.0], np.cumsum(durations)])  # exact for whole milliseconds
    totals = (sums[start + size] - sums[start]).sum(1)
    at = profiles.level_start[:-1]
    means: Floats = np.add.reduceat(totals, at) / np.add.reduceat(size.sum(1), at)
    return means


def _rows(profiles: Profiles) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """(S, 8) row of each of `LEVELS`, or of the largest level of a stage; (S, 8) whether it has the level."""
    stage = owners(profiles.level_start)
    order = np.lexsort((profiles.levels, stage))
    rows = np.repeat(order[profiles.level_start[1:] - 1, None], len(LEVELS), axis=1)
    present = np.zeros(rows.shape, dtype=np.bool_)
    for column, level in enumerate(LEVELS):
        found = np.flatnonzero(profiles.levels == level)
        rows[stage[found], column] = found
        present[stage[found], column] = True
    return rows, present


def _refuse_no_draw(profiles: Profiles, rows: Ints, size: Ints, where: Where) -> None:
    """Fresh executors draw from the fresh or the first wave, whatever the rest holds."""
    bad = (size[:, :, FRESH] == 0) & (size[:, :, FIRST] == 0)
    if bad.any():
        stage, column = np.argwhere(bad)[0].tolist()
        level = profiles.levels[rows[stage, column]]
        raise UserError(
            f"{where(stage)}: no duration for a new executor at level {level}: first and fresh are empty there, and "
            "first at lower levels; fill one of them"
        )


def _medians(start: Ints, size: Ints, durations: Floats) -> Floats:
    """Lower medians, of the shape of the starts."""
    middle = [
        np.sort(durations[a : a + n])[(n - 1) // 2] if n else np.nan
        for a, n in zip(start.ravel().tolist(), size.ravel().tolist(), strict=True)
    ]
    return np.array(middle).reshape(start.shape)
