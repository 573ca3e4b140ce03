"""Built-in generator of workloads that are like the TPC-H profiles, so that everything runs without data.

A query scans tables, shuffles and joins them two by two, and aggregates. What the parts are like is measured on the
profiles that Decima was trained with (Mao et al., SIGCOMM 2019); `tests/test_cjs_synthetic.py` compares the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError
from tasks.job_scheduling.profiles import Floats, Ints, Profiles, size_key, starts
from tasks.job_scheduling.workloads import LEVELS, Workload, prepare

SCANS = (1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 6, 8, 8)
"""Quantiles of the tables that a query scans."""
STEPS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6)
"""Quantiles of its stages with one parent."""
MOST_STAGES, DEEPEST = 18, 9
LEFT_DEEP = 0.65
"""Share of joins that take the last join's result, not two tables at random."""
SKIPS = 0.04
"""Share of stages whose result is read by a grandchild too."""
BLOCKS_PER_GB = (5.93, 1.33, 0.91, 0.19, 0.0)
"""Tasks of a table's scan, which are 2 at least: one a block of the lineitem, orders, partsupp, customer and nation
tables."""
MAIN_TABLE = (0.77, 0.08, 0.1, 0.05, 0.0)
OTHER_TABLES = (0.08, 0.17, 0.06, 0.27, 0.42)
"""How often they are the first and the other tables of a query."""
SHUFFLE_TASKS = 200
"""Spark's default number of partitions."""
RESULT_TASKS = ((1, 2, 3, 5, 6, 8, 46, 176, 200), (0.45, 0.05, 0.1, 0.1, 0.1, 0.04, 0.04, 0.04, 0.08))
"""Tasks of the last stage, and how often."""


@dataclass(frozen=True)
class SyntheticWorkload:
    """Number and character of generated jobs.

    Attributes:
        queries: Number of queries; each is a job at every size.
        sizes: Sizes of the input, such as ``10g`` for 10 GB.
        seed: Equal seeds give equal workloads, others share no job.
        scale: Factor on all durations.
        spread: Factor on how far the amounts of data that stages handle lie apart; 0 makes all alike.
    """

    queries: int = 22
    sizes: tuple[str, ...] = ("2g", "5g", "10g", "20g", "50g", "80g", "100g")
    seed: int = 0
    scale: float = 1.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that make no workload.

        Raises:
            UserError: A value is out of its range.
        """
        for name, least, most in (("queries", 1, 10_000), ("seed", 0, 2**63), ("scale", 1e-3, 1e3), ("spread", 0, 2)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"synthetic.{name}: {getattr(self, name)}; expected {least} to {most}")
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise UserError(
                f"synthetic.sizes: {', '.join(self.sizes) or 'none'}; expected different sizes, at least one"
            )
        for size in self.sizes:
            if not 0 < size_key(size)[0] <= 1e12:
                raise UserError(f"synthetic.sizes: '{size}' is no size up to 1000 GB; write 10g for 10 GB")


class _Stages(NamedTuple):
    """Stages of a query, S of them, in the order in which they can run.

    Attributes:
        children: Stages that wait for each of them.
        per_gb: (S,) tasks per GB of input; 0 if their number is fixed.
        tasks: (S,) tasks at least.
        base_ms: (S,) duration of a later task with few executors, without data.
        data_ms: (S,) more per GB of input.
        first_ms: (S,) more for the first task of an executor in the stage.
        fresh_ms: (S,) still more if the executor has just started.
        noise: (S,) standard deviation of a task's logarithm.
    """

    children: list[list[int]]
    per_gb: Floats
    tasks: Floats
    base_ms: Floats
    data_ms: Floats
    first_ms: Floats
    fresh_ms: Floats
    noise: Floats


def generate(config: SyntheticWorkload) -> Workload:
    """Make a workload.

    Args:
        config: How many jobs, and which.
    """
    return prepare(generate_profiles(config), "synthetic workload")


def generate_profiles(config: SyntheticWorkload) -> Profiles:
    """Make the profiles of a workload.

    Args:
        config: How many jobs, and which.
    """
    rng = np.random.default_rng([config.seed, config.queries])
    shapes = zip(_spread(rng, SCANS, config.queries), _spread(rng, STEPS, config.queries), strict=True)
    queries = [_query(rng, scans, steps, config.spread) for scans, steps in shapes]
    sizes = sorted(config.sizes, key=size_key)
    jobs = [(query, size_key(size)[0] / 1e9) for size in sizes for query in queries]
    sizes_of_lists, means, noise = (
        np.concatenate(parts)
        for parts in zip(*(_lists(rng, query, gigabytes) for query, gigabytes in jobs), strict=True)
    )
    # a list of first waves holds the fresh executors' tasks too: in memory the two begin together
    parts = starts(sizes_of_lists.ravel())
    flat, repeats = rng.standard_normal(parts[-1]), sizes_of_lists.ravel()
    durations = np.repeat(means.ravel(), repeats) * np.exp(np.repeat(noise.ravel(), repeats) * flat)
    begin = parts[:-1].reshape(-1, 3)
    fresh, others, rest = sizes_of_lists.T
    stages = [len(query.children) for query, _ in jobs]
    children = [children for query, _ in jobs for children in query.children]
    return Profiles(
        sizes=np.repeat(np.array(sizes), len(queries)),
        queries=np.tile(np.arange(1, len(queries) + 1), len(sizes)),
        stage_start=starts(stages),
        child_start=starts([len(part) for part in children]),
        children=np.array([child for part in children for child in part], dtype=np.int64),
        level_start=np.arange(sum(stages) + 1, dtype=np.int64) * len(LEVELS),
        levels=np.tile(np.array(LEVELS), sum(stages)),
        list_start=np.stack([begin[:, 0], begin[:, 0], begin[:, 2]], axis=1),
        list_size=np.stack([fresh, fresh + others, rest], axis=1),
        durations=np.maximum(np.rint(config.scale * durations), 1.0),
    )


def _spread(rng: np.random.Generator, quantiles: Sequence[int], count: int) -> list[int]:
    """Values of a distribution in random order, evenly spread over it: a few queries are like many."""
    places = (rng.permutation(count) + rng.random(count)) / count * len(quantiles)
    return [quantiles[int(place)] for place in places]


def _query(rng: np.random.Generator, scans: int, steps: int, spread: float) -> _Stages:
    steps = min(steps, MOST_STAGES - (2 * scans - 1))
    while True:
        parents = _plan(rng, scans, steps)
        if _depth(parents) <= DEEPEST:
            break
    children: list[list[int]] = [[] for _ in parents]
    for stage, inputs in enumerate(parents):
        for parent in inputs:
            children[parent].append(stage)
    for own in [part for part in children if part and rng.random() < SKIPS]:
        own.extend(children[own[0]][:1])
    return _durations(rng, children, np.array([not inputs for inputs in parents]), spread)


def _plan(rng: np.random.Generator, scans: int, steps: int) -> list[list[int]]:
    """Parents of every stage of a join tree, numbered so that a stage follows its parents as soon as it can."""
    inputs: list[list[int]] = [[] for _ in range(scans)]
    pieces = list(range(scans))

    def add(of: list[int]) -> None:
        inputs.append(of)
        pieces.append(len(inputs) - 1)

    early = int(rng.integers(0, steps)) if scans > 1 else 0
    for _ in range(early):  # a table's rows are aggregated before they are joined
        add([pieces.pop(int(rng.integers(len(pieces))))])
    while len(pieces) > 1:
        left = len(pieces) - 1 if rng.random() < LEFT_DEEP else int(rng.integers(len(pieces)))
        first = pieces.pop(left)
        add([pieces.pop(int(rng.integers(len(pieces)))), first])
    for _ in range(steps - early):
        add([pieces.pop()])
    order: list[int] = []

    def visit(stage: int) -> None:
        for parent in inputs[stage]:
            visit(parent)
        order.append(stage)

    visit(pieces[0])
    number = {stage: place for place, stage in enumerate(order)}
    return [[number[parent] for parent in inputs[stage]] for stage in order]


def _depth(parents: list[list[int]]) -> int:
    depths: list[int] = []
    for inputs in parents:
        depths.append(1 + max((depths[parent] for parent in inputs), default=0))
    return max(depths)


def _durations(
    rng: np.random.Generator, children: list[list[int]], scan: npt.NDArray[np.bool_], spread: float
) -> _Stages:
    """Tasks and durations of the stages of a query."""
    count = len(children)

    def around(median: float, deviation: float) -> Floats:
        return median * np.exp(deviation * rng.standard_normal(count))

    table = rng.choice(len(BLOCKS_PER_GB), count, p=OTHER_TABLES)
    scanned = np.flatnonzero(scan)
    table[rng.choice(scanned)] = 0 if len(scanned) == 1 else rng.choice(len(BLOCKS_PER_GB), p=MAIN_TABLE)
    tiny = scan & (table == len(BLOCKS_PER_GB) - 1) & (rng.random(count) < 0.5)
    tasks = np.where(scan, 2.0, np.where(rng.random(count) < 0.95, SHUFFLE_TASKS, 1))
    tasks[-1] = rng.choice(RESULT_TASKS[0], p=RESULT_TASKS[1])
    few = ~scan & (tasks < 10)
    data = np.minimum(around(0.3, 2.2 * spread), 40.0)
    return _Stages(
        children=children,
        per_gb=np.where(scan, np.array(BLOCKS_PER_GB)[table], 0.0),
        tasks=tasks,
        base_ms=np.where(
            few | tiny,
            around(150, 0.3),
            np.where(scan, np.where(table < 3, around(2000, 0.1), around(1500, 0.2)), around(14, 0.6 * spread)),
        ),
        data_ms=np.where(scan | few, 0.0, data),
        first_ms=np.where(scan, np.where(tiny, 20.0, around(350, 0.6)), around(95, 0.9)),
        fresh_ms=np.where(scan, around(1600, 0.15), np.where(few, around(2000, 0.4), around(250, 0.6))),
        noise=np.where(scan, 0.1, 0.4),
    )


def _lists(rng: np.random.Generator, query: _Stages, gigabytes: float) -> tuple[Ints, Floats, Floats]:
    """Of one job at every level: number of tasks of fresh executors, of other first ones and of later ones.

    Returns:
        (S x 8, 3) numbers, (S x 8, 3) mean durations in ms, (S x 8, 3) standard deviations of logarithms.
    """
    stages, levels = len(query.children), np.array(LEVELS)
    tasks = np.maximum(query.tasks, np.rint(query.per_gb * gigabytes)).astype(np.int64)
    sizes = np.empty((stages, len(levels), 3), dtype=np.int64)
    for column, level in enumerate(LEVELS):
        sizes[:, column, 0] = _fresh(rng, tasks, level)
    sizes[:, :, 1] = np.minimum(tasks[:, None], levels) - sizes[:, :, 0]
    sizes[:, :, 2] = tasks[:, None] - sizes[:, :, :2].sum(2)
    later = (query.base_ms + query.data_ms * gigabytes)[:, None] * np.exp(0.05 * rng.standard_normal((stages, 1)))
    # executors that share disks and network slow each other down, short tasks most
    crowd = (levels - LEVELS[0]) / (LEVELS[-1] - LEVELS[0])
    rest = later * (1 + (0.3 + 2.6 / (1 + later / 120)) * crowd)
    first = rest + query.first_ms[:, None] * (1 + 1.5 * crowd)
    fresh = first + query.fresh_ms[:, None]
    means = np.stack([fresh, first, rest], axis=2).reshape(-1, 3)
    return sizes.reshape(-1, 3), means, np.broadcast_to(query.noise[:, None, None], sizes.shape).reshape(-1, 3)


def _fresh(rng: np.random.Generator, tasks: Ints, level: int) -> Ints:
    """(S,) executors of a level that start in each stage, as far as its tasks go: all in early ones, by their order."""
    taken = np.zeros(len(tasks), dtype=np.int64)
    for share in (np.where(rng.random(len(tasks)) < 0.3, 1.0, rng.random(len(tasks))), np.ones(len(tasks))):
        wanted = np.rint(share * (tasks - taken)).astype(np.int64)
        before = np.minimum(np.cumsum(wanted), level - taken.sum())
        taken += np.diff(before, prepend=0)
    return taken
