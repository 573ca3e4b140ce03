"""Profiles of jobs as they were measured: DAGs of stages, and how long tasks took with so many executors."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Where = Callable[[int], str]
"""Names the file, job and stage that a stage of the flat arrays came from."""

WAVES = ("fresh", "first", "rest")
"""Tasks of a fresh executor, of one that comes from another stage, and the later ones of an executor in a stage."""
LONGEST_MS = 1e12
"""No task lasts 30 years."""


@dataclass(frozen=True)
class Profiles:
    """Jobs one behind the other in flat arrays: T jobs, S stages, E edges, L levels of stages, D durations.

    Attributes:
        sizes: (T,) input size of a job, such as ``2g``.
        queries: (T,) number of its query.
        stage_start: (T + 1,) where the stages of a job begin.
        child_start: (S + 1,) where the children of a stage begin.
        children: (E,) stages that wait for it, numbered within the job.
        level_start: (S + 1,) where the levels of a stage begin.
        levels: (L,) executors that ran the job when its tasks were measured, in stored order.
        list_start: (L, 3) where the durations of each of `WAVES` begin.
        list_size: (L, 3) how many there are.
        durations: (D,) ms.
    """

    sizes: npt.NDArray[np.str_]
    queries: Ints
    stage_start: Ints
    child_start: Ints
    children: Ints
    level_start: Ints
    levels: Ints
    list_start: Ints
    list_size: Ints
    durations: Floats

    def __len__(self) -> int:
        """Number of jobs."""
        return len(self.sizes)

    @property
    def stages(self) -> int:
        """Number of stages of all jobs."""
        return len(self.child_start) - 1

    def name(self, stage: int) -> str:
        """Name a stage of the flat arrays, such as ``job 2g/3, stage 4``."""
        job = int(np.searchsorted(self.stage_start, stage, side="right")) - 1
        return f"job {self.sizes[job]}/{self.queries[job]}, stage {stage - self.stage_start[job]}"


def size_key(size: str) -> tuple[float, str]:
    """Sort key of input sizes: 2g is before 10g; what is no number of bytes comes last, by letters."""
    known = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)b?", size.lower())
    return (float(known[1]) * 1000.0 ** " kmgt".index(known[2] or " "), size) if known else (np.inf, size)


def starts(lengths: npt.ArrayLike) -> Ints:
    """(N + 1,) where parts of these lengths begin in a flat array, and where it ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def owners(start: Ints) -> Ints:
    """(D,) to which part an entry of a flat array belongs."""
    return np.repeat(np.arange(len(start) - 1), np.diff(start))


def check_profiles(profiles: Profiles, where: Where) -> Profiles:
    """Return profiles whose numbers can be used; whether their DAGs are such is seen when their heights are computed.

    Args:
        profiles: What was read.
        where: Names file, job and stage.

    Raises:
        UserError: A child is not another stage of the job or given twice; levels are missing, given twice or below 1;
            a duration is not finite and above 0.
    """

    def refuse(bad: npt.NDArray[np.bool_], stage: Ints, what: Callable[[int], str]) -> None:
        if bad.any():
            at = int(bad.argmax())
            raise UserError(f"{where(int(stage[at]))}: {what(at)}")

    stages = np.repeat(np.diff(profiles.stage_start), np.diff(profiles.stage_start))
    parent, children = owners(profiles.child_start), profiles.children
    outside = (children < 0) | (children >= stages[parent])
    refuse(
        outside, parent, lambda k: f"child {children[k]} does not exist; the job has {stages[parent[k]]} stages from 0"
    )
    _refuse_twice(parent, children, lambda k: f"{where(int(parent[k]))}: child {children[k]} is given twice; keep one")

    every = np.arange(profiles.stages)
    refuse(np.diff(profiles.level_start) == 0, every, lambda _: "levels are empty; a stage needs one, with durations")
    stage, levels = owners(profiles.level_start), profiles.levels
    refuse(levels < 1, stage, lambda k: f"level {levels[k]} is not a number of executors; expected 1 or more")
    _refuse_twice(stage, levels, lambda k: f"{where(int(stage[k]))}: level {levels[k]} is given twice; keep one")

    bad = ~((profiles.durations > 0) & (profiles.durations <= LONGEST_MS))
    if bad.any():
        at = int(bad.argmax())
        holds = (profiles.list_start <= at) & (at < profiles.list_start + profiles.list_size)
        level, wave = np.argwhere(holds)[0].tolist()
        raise UserError(
            f"{where(int(stage[level]))}: {WAVES[wave]} at level {levels[level]} holds {profiles.durations[at]}; "
            "expected finite milliseconds above 0"
        )
    return profiles


def _refuse_twice(owner: Ints, values: Ints, message: Callable[[int], str]) -> None:
    order = np.lexsort((values, owner))
    same = (np.diff(owner[order]) == 0) & (np.diff(values[order]) == 0)
    if same.any():
        raise UserError(message(int(order[int(same.argmax()) + 1])))


def sorted_children(profiles: Profiles) -> Ints:
    """(E,) children, ascending within a stage."""
    return profiles.children[np.lexsort((profiles.children, owners(profiles.child_start)))]


def reversed_edges(profiles: Profiles) -> tuple[Ints, Ints]:
    """(S + 1,) where the parents of a stage begin; (E,) parents, numbered within the job, ascending."""
    base = np.repeat(profiles.stage_start[:-1], np.diff(profiles.stage_start))
    parent = owners(profiles.child_start)
    child = profiles.children + base[parent]
    order = np.lexsort((parent, child))
    return starts(np.bincount(child, minlength=profiles.stages)), (parent - base[parent])[order]


def heights(profiles: Profiles, where: Where) -> Ints:
    """(S,) longest path from a stage to one without children, in edges.

    Args:
        profiles: Jobs whose children exist.
        where: Names file, job and stage.

    Raises:
        UserError: Stages wait for each other in a cycle.
    """
    height = np.zeros(profiles.stages, dtype=np.int64)
    spans = [slice(a, b) for a, b in pairwise(profiles.child_start.tolist())]
    parent_start, parents = reversed_edges(profiles)
    for first, last in pairwise(profiles.stage_start.tolist()):
        left = [span.stop - span.start for span in spans[first:last]]
        ready = [k for k, count in enumerate(left) if count == 0]
        for stage in ready:  # grows while it is walked
            for parent in parents[parent_start[first + stage] : parent_start[first + stage + 1]].tolist():
                height[first + parent] = max(height[first + parent], height[first + stage] + 1)
                left[parent] -= 1
                if left[parent] == 0:
                    ready.append(parent)
        if len(ready) < last - first:
            stuck = next(k for k, count in enumerate(left) if count)
            raise UserError(
                f"{where(first + stuck)}: it waits for itself, or leads to stages that do; remove the cycle"
            )
    return height
