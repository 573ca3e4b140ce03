"""The published layout of TPC-H profiles: ``<size>/adj_mat_<query>.npy`` and ``<size>/task_duration_<query>.npy``.

So they are in Decima's repository (Mao et al., SIGCOMM 2019) and in spark-sched-sim. The first is a square matrix,
nonzero where the stage of the column waits for that of the row; the second a pickled dictionary, stage to wave to level
to durations in ms, which is read without running it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from netllm_pl.errors import UserError
from netllm_pl.unpickle import as_array, read_npy
from tasks.job_scheduling.profiles import WAVES, Floats, Ints, Profiles, size_key, starts

KEYS = {"fresh": "fresh_durations", "first": "first_wave", "rest": "rest_wave"}
"""Published names of the waves."""
LAYOUT = "<size>/adj_mat_<query>.npy and <size>/task_duration_<query>.npy"


class _Stage(NamedTuple):
    """One stage.

    Attributes:
        children: (E,) stages that wait for it.
        levels: In stored order, L of them.
        lists: L x 3 lists of durations.
    """

    children: Ints
    levels: list[int]
    lists: list[Floats]


def read_published(folder: Path) -> Profiles:
    """Read profiles in the published layout, sorted by size and query.

    Args:
        folder: The folder with one folder a size in it, such as ``tpch``.

    Raises:
        UserError: There are none, or a file is missing, broken, or holds anything but numbers.
    """
    jobs = _jobs(Path(folder))
    stages = [list(_stages(adjacency, durations)) for _, _, adjacency, durations in jobs]
    flat = [stage for job in stages for stage in job]
    lists = [values for stage in flat for values in stage.lists]
    lengths = [len(values) for values in lists]
    return Profiles(
        sizes=np.array([job[0] for job in jobs], dtype=np.str_),
        queries=np.array([job[1] for job in jobs], dtype=np.int64),
        stage_start=starts([len(job) for job in stages]),
        child_start=starts([len(stage.children) for stage in flat]),
        children=np.concatenate([np.zeros(0, np.int64), *(stage.children for stage in flat)]),
        level_start=starts([len(stage.levels) for stage in flat]),
        levels=np.array([level for stage in flat for level in stage.levels], dtype=np.int64),
        list_start=starts(lengths)[:-1].reshape(-1, len(WAVES)),
        list_size=np.array(lengths, dtype=np.int64).reshape(-1, len(WAVES)),
        durations=np.concatenate([np.zeros(0), *lists]),
    )


def _jobs(folder: Path) -> list[tuple[str, int, Path, Path]]:
    """Size, query, adjacency file and durations file of every job."""
    jobs = []
    for file in folder.glob("*/*.npy"):
        match = re.fullmatch(r"(adj_mat|task_duration)_(\d{1,9})", file.stem)
        if match is None:  # the published folders hold maps of stage numbers too
            continue
        pair = [file.with_name(f"{kind}_{match[2]}.npy") for kind in ("adj_mat", "task_duration")]
        for other in pair:
            if not other.is_file():
                raise UserError(f"{other} is missing beside {file.name}; a job needs both")
        if match[1] == "adj_mat":
            jobs.append((file.parent.name, int(match[2]), pair[0], pair[1]))
    if not jobs:
        raise UserError(f"{folder}: holds no {LAYOUT}; give the folder with the sizes in it")
    return sorted(jobs, key=lambda job: (size_key(job[0]), job[1]))


def _stages(adjacency_file: Path, durations_file: Path) -> Iterator[_Stage]:
    adjacency, profile = read_npy(adjacency_file), read_npy(durations_file)
    if not isinstance(adjacency, np.ndarray) or adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise UserError(f"{adjacency_file}: expected a square matrix")
    if not isinstance(profile, dict) or set(profile) != set(range(len(adjacency))):
        raise UserError(f"{durations_file}: expected the stages 0 to {len(adjacency) - 1} of {adjacency_file.name}")
    for stage, row in enumerate(adjacency):
        levels, lists = _waves(profile[stage], f"{durations_file}, stage {stage}")
        yield _Stage(np.flatnonzero(row), levels, lists)


def _waves(waves: Any, where: str) -> tuple[list[int], list[Floats]]:
    """Levels, and lists of durations at each of them, of one stage."""
    if not isinstance(waves, dict) or not all(isinstance(waves.get(key), dict) for key in KEYS.values()):
        raise UserError(f"{where}: expected {', '.join(KEYS.values())}, each from level to durations")
    levels = list(waves[KEYS["first"]])
    if not all(isinstance(level, int | np.integer) and 0 < level < 2**31 for level in levels):
        raise UserError(f"{where}: levels {str(levels)[:80]}; expected numbers of executors")
    tables = [waves[KEYS[wave]] for wave in WAVES]
    extra = {level for table in tables for level in table} - set(levels)
    if extra:
        raise UserError(f"{where}: {KEYS['first']} has no level {next(iter(extra))!r}, which other waves have")
    lists = [_durations(table.get(level, ()), f"{where}, level {level}") for level in levels for table in tables]
    return [int(level) for level in levels], lists


def _durations(values: Any, where: str) -> Floats:
    try:
        array = as_array(values)
    except (ValueError, AttributeError) as error:  # lists of unlike things; an array without content
        raise UserError(f"{where}: durations are no list of numbers; expected milliseconds") from error
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iuf"):
        raise UserError(f"{where}: durations are {str(values)[:60]}; expected a list of milliseconds")
    return array.astype(np.float64)
