"""What holds in every episode of the cluster simulator, whatever the rules and the decisions."""

from dataclasses import fields
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from netllm_pl.testing import check_environment
from tasks.job_scheduling.batch import pick
from tasks.job_scheduling.profiles import Profiles, starts
from tasks.job_scheduling.simulator import Observations, Rules, Simulator

from tasks.job_scheduling.state import (  # isort: skip
    ARRIVAL, ARRIVED, BASE, BUSY, CHOICES, COMMITMENTS, COMMITTED, COMPLETED, DONE, HOME, INCOMPLETE, LOCAL, MOVING,
    OPEN, OWNER, PENDING, POOL, PROFILE, PROMISED, REMAINING, SIZE, STAGES, SUPPLY, TARGET, UNFINISHED, UNSTARTED,
    WAITING, Episode,
)  # fmt: skip
from tasks.job_scheduling.workloads import Workload, prepare

SWITCHES = [field.name for field in fields(Rules) if field.type in ("bool", bool)]
MENDED: dict[str, Any] = dict.fromkeys(SWITCHES, False)
Children = tuple[tuple[int, ...], ...]
GRAPHS: tuple[Children, ...] = (
    ((1,), ()), ((2,), (2,), (3, 4), (), ()), ((1, 2), (3,), (3,), ()), ((), (), (1,)),
)  # fmt: skip
"""Children of the stages of each query."""


@pytest.fixture(scope="module")
def small() -> Workload:
    """Queries of few stages and tasks; fresh executors were not measured everywhere, and two levels nowhere."""
    rng = np.random.default_rng(3)
    stages = [children for graph in GRAPHS for children in graph]
    levels = [(5, 10, 20) if k % 3 else (5, 7) for k in range(len(stages))]
    tasks = np.repeat(rng.integers(1, 6, len(stages)), [len(part) for part in levels])
    sizes = np.stack([rng.integers(0, 3, len(tasks)), rng.integers(1, 3, len(tasks)), tasks], 1)
    return prepare(
        Profiles(
            sizes=np.array(["2g"] * len(GRAPHS)),
            queries=np.arange(len(GRAPHS)) + 1,
            stage_start=starts([len(graph) for graph in GRAPHS]),
            child_start=starts([len(children) for children in stages]),
            children=np.array([child for children in stages for child in children], np.int64),
            level_start=starts([len(part) for part in levels]),
            levels=np.concatenate(levels),
            list_start=starts(sizes.ravel())[:-1].reshape(-1, 3),
            list_size=sizes,
            durations=rng.integers(50, 3000, sizes.sum()).astype(np.float64),
        ),
        "small workload",
    )


def some_action(observations: Observations) -> np.ndarray:
    """Any possible decision, as the clock wills."""
    time = (observations["time_s"] * 1000).astype(np.int64)
    counts = np.array([max(len(stages), 1) for stages in observations["stages"]])
    return np.stack([time * 7 % counts, 1 + time * 13 % np.maximum(observations["committable"], 1)], 1)


def play_randomly(simulator: Simulator, seeds: Any, rest: float = 0.0, watch: Any = None) -> np.ndarray:
    """Play with random decisions, resting with some probability; return sums of rewards (N,)."""
    rng = np.random.default_rng(0)
    observations, total = simulator.reset(seeds), np.zeros(len(seeds))
    while not simulator.over.all():
        actions = simulator.sample(observations, rng)
        actions[rng.random(len(actions)) < rest, 0] = -1
        observations, rewards, _, _ = simulator.step(actions)
        total += rewards
        if watch is not None:
            watch(simulator)
    return total


def counts(numbers: np.ndarray, length: int) -> np.ndarray:
    """How often each number from 0 on occurs; negative ones do not count."""
    return np.bincount(numbers[numbers >= 0], minlength=length)


def assert_executors(ep: Episode, rules: Rules) -> None:
    """Each is in one pool or on its way; those that are busy or on their way have one event."""
    pool, busy = ep.executors[:, POOL], ep.executors[:, BUSY] > 0
    away = pool < 0
    assert np.array_equal(ep.pools[:, SIZE], counts(pool, len(ep.pools)))
    assert ep.pools[:, SIZE].sum() + away.sum() == rules.executors
    assert (pool[busy] == 1 + len(ep.jobs) + ep.executors[busy, TARGET]).all()
    pending = ep.heap[: ep.glob[PENDING]]
    assert sorted(pending.tolist()) == np.flatnonzero(busy | away).tolist()
    assert (ep.due[pending] >= ep.clock[0]).all()
    assert np.array_equal(ep.jobs[:, LOCAL], counts(ep.executors[:, HOME], len(ep.jobs)))
    if rules.order == "hash":
        for p in np.flatnonzero(ep.pools[:, SIZE]):
            keys = ep.tables[p, : ep.shapes[p, 2] + 1]
            assert sorted(keys[keys >= 0].tolist()) == np.flatnonzero(pool == p).tolist()


def assert_stages(ep: Episode, workload: Workload, rules: Rules) -> None:
    """Tasks, demand and parents are those that a count gives."""
    jobs, target = ep.jobs, ep.executors[:, TARGET]
    stages = ep.stages[: jobs[-1, BASE] + jobs[-1, STAGES]]
    busy, away = ep.executors[:, BUSY] > 0, ep.executors[:, POOL] < 0
    assert (stages[:, REMAINING] >= 0).all()
    assert np.array_equal(stages[:, UNFINISHED] - stages[:, REMAINING], counts(target[busy], len(stages)))
    assert np.array_equal(stages[:, MOVING], counts(target[away], len(stages)))
    assert np.array_equal(jobs[:, UNSTARTED], counts(stages[stages[:, REMAINING] > 0, OWNER], len(jobs)))
    assert np.array_equal(jobs[:, INCOMPLETE], counts(stages[stages[:, UNFINISHED] > 0, OWNER], len(jobs)))
    demand = stages[:, REMAINING] - stages[:, MOVING] - stages[:, COMMITTED]
    for s, stage in enumerate(stages):
        begin, end = workload.parent_start[stage[PROFILE] : stage[PROFILE] + 2]
        parents = jobs[stage[OWNER], BASE] + workload.parents[begin:end]
        assert stage[OPEN] == (demand[parents] > 0).sum()
        assert stage[WAITING] == (stages[parents, UNFINISHED] > 0).sum()
        if s in ep.choices[: ep.glob[CHOICES]]:
            assert demand[s] > 0 and stage[OPEN] == 0 and (rules.early_commitment or stage[WAITING] == 0)


def assert_promises(ep: Episode, rules: Rules) -> None:
    """Promised executors are in the pools that promised them, and the supply of a job is what it has and what comes."""
    jobs, pool = ep.jobs, ep.executors[:, POOL]
    stages = ep.stages[: jobs[-1, BASE] + jobs[-1, STAGES]]
    owner = np.concatenate([[-1], np.arange(len(jobs)), stages[:, OWNER]])
    source, to, count = ep.commitments[: ep.glob[COMMITMENTS]].T
    assert (count > 0).all() and len({*zip(source, to, strict=True)}) == len(count)
    assert np.array_equal(ep.pools[:, PROMISED], np.bincount(source, count, len(ep.pools)))
    assert (ep.pools[:, PROMISED] <= ep.pools[:, SIZE]).all()
    assert np.array_equal(stages[:, COMMITTED], np.bincount(to, count, len(ep.pools))[1 + len(jobs) :][: len(stages)])
    away = ep.executors[pool < 0, TARGET]
    outside = owner[to] != np.where(owner[to] < 0, -1, owner[source])
    supply = counts(owner[pool[pool >= 0]], len(jobs)) + counts(stages[away, OWNER], len(jobs))
    supply = supply + np.bincount(owner[to][outside], count[outside], len(jobs))
    assert (jobs[:, SUPPLY] >= supply).all()
    assert rules.stale_supply or np.array_equal(jobs[:, SUPPLY], supply)


def assert_work(simulator: Simulator, n: int) -> None:
    """All tasks ran once, after those of the parents; an executor does one thing at a time, and moves between jobs."""
    workload, rules, ep = simulator.workload, simulator.rules, pick(simulator.episodes, n)
    tape = {name: column.copy() for name, column in simulator.tape(n).items()}
    at, job = tape["t_start_ms"], tape["job_id"]
    end = at + tape["duration_ms"]
    stage = ep.jobs[job, BASE] + tape["stage_id"]
    last = int(stage.max()) + 1
    assert np.array_equal(np.bincount(stage), workload.num_tasks[ep.stages[:last, PROFILE]])
    assert (np.diff(at) >= 0).all() and (at >= ep.times[job, ARRIVAL]).all()
    first, final = np.full(last, np.inf), np.zeros(last)
    np.minimum.at(first, stage, at)
    np.maximum.at(final, stage, end)
    for s in range(last):
        profile, base = ep.stages[s, PROFILE], ep.jobs[ep.stages[s, OWNER], BASE]
        for child in workload.children[workload.child_start[profile] : workload.child_start[profile + 1]]:
            assert first[base + child] >= final[s]
    ended = np.zeros(len(ep.jobs))
    np.maximum.at(ended, job, end)
    assert np.array_equal(ep.times[:, COMPLETED], ended)
    order = np.lexsort((at, tape["executor_id"]))
    for a, b in pairwise(order.tolist()):
        if tape["executor_id"][a] == tape["executor_id"][b]:
            assert at[b] >= end[a] + (rules.moving_delay_ms if job[a] != job[b] else 0.0)
    assert (tape["num_local_execs"] >= 1).all() and (tape["num_local_execs"] <= rules.executors).all()
    rows = ep.stages[stage, PROFILE]
    fits = workload.level_key[rows] == tape["level_key"][:, None]
    level, wave = fits.argmax(1), np.searchsorted(("first_wave", "fresh_durations", "rest_wave"), tape["wave"])
    wave = np.array([1, 0, 2])[wave]
    for k in range(len(at)):
        begin, size = workload.wave_start[rows[k], level[k], wave[k]], workload.wave_size[rows[k], level[k], wave[k]]
        drawn = tape["duration_ms"][k] - rules.warmup_ms * tape["warmup_added"][k]
        assert fits[k].any() and drawn in workload.durations[begin : begin + size]


COMBINATIONS = [
    dict(zip(SWITCHES, switches, strict=True)) | {"stream": stream, "order": order}
    for k, switches in enumerate(product([True, False], repeat=len(SWITCHES)))
    for stream, order in [(("published", "counted", "median")[k % 3], ("hash", "ascending")[k // 3 % 2])]
]


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("rest", [0.0, 0.2])
def test_executors_tasks_and_promises_are_conserved(small: Workload, part: int, rest: float) -> None:
    """Under all 64 combinations of switches, with random decisions; with rest some jobs may never end."""
    chance = np.random.default_rng(part)
    for number, combination in list(enumerate(COMBINATIONS))[part::8]:
        sizes: dict[str, Any] = {"jobs": 7, "executors": 4 + number % 9, "arrival_rate": 10.0 ** -(3 + number % 3)}
        rules = Rules(**sizes, **combination, moving_delay_ms=100.0 * (number % 5))
        simulator = Simulator(small, rules, first_seed=number, tape=True)
        clock = np.zeros(2)

        def watch(simulator: Simulator, rules: Rules = rules, clock: np.ndarray = clock) -> None:
            assert (simulator.episodes.clock[:, 0] >= clock).all()
            clock[:] = simulator.episodes.clock[:, 0]
            if chance.random() < 0.2:
                for n in range(2):
                    ep = pick(simulator.episodes, n)
                    assert ep.glob[DONE] == np.isfinite(ep.times[:, COMPLETED]).sum() <= ep.glob[ARRIVED]
                    assert_executors(ep, rules)
                    assert_stages(ep, simulator.workload, rules)
                    assert_promises(ep, rules)

        total = play_randomly(simulator, range(2), rest, watch)
        times = simulator.episodes.times
        ended = np.isfinite(times).all((1, 2))
        assert rest > 0 or ended.all()
        spent = (times[:, :, COMPLETED] - times[:, :, ARRIVAL]).sum(1) / 1000
        np.testing.assert_allclose(total[ended], -spent[ended], rtol=1e-9)
        for n in np.flatnonzero(ended).tolist():
            assert_work(simulator, n)


def test_simulator_repeats_itself_alone_and_in_a_batch(small: Workload) -> None:
    check_environment(Simulator(small, Rules(jobs=9, executors=7)), [3, 0, 11, 2**40], some_action)
    check_environment(Simulator(small, Rules(jobs=9, executors=7, stream="counted")), [1, 2], some_action)


def test_first_seed_is_added(small: Workload) -> None:
    ends = []
    for first, seeds in ((0, [105, 107]), (100, [5, 7])):
        simulator = Simulator(small, Rules(jobs=5, executors=5), first)
        play_randomly(simulator, seeds)
        ends.append(simulator.episodes.times)
        assert simulator.first["seed"].tolist() == [105, 107]
    assert np.array_equal(*ends)


def test_jobs_are_drawn_and_arrive_as_a_poisson_process(small: Workload) -> None:
    simulator = Simulator(small, Rules(jobs=2000, executors=5))
    simulator.reset([1, 2])
    jobs = simulator.jobs()
    assert (jobs["t_arrival_ms"][:, 0] == 0).all()
    gaps = np.diff(jobs["t_arrival_ms"])
    assert abs(gaps.mean() / 25_000 - 1) < 0.06 and abs(gaps.std() / 25_000 - 1) < 0.1
    assert np.abs(np.bincount(jobs["query_num"].ravel())[1:] / 1000 - 1).max() < 0.1


@pytest.mark.parametrize(
    ("change", "same"),
    [({"arrival_rate": 1e-4}, False), ({"moving_delay_ms": 0.0}, False), ({"stream": "counted"}, False)]
    + [({"warmup_ms": 0.0}, False), ({}, True)]
    + [({name: False}, False) for name in MENDED],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_every_rule_changes_something(small: Workload, change: dict[str, Any], same: bool) -> None:
    seen: list[list[float]] = [[], []]
    busy: dict[str, Any] = {"jobs": 25, "executors": 20, "arrival_rate": 3e-4}
    for part, rules in zip(seen, (Rules(**busy), Rules(**busy | change)), strict=True):

        def watch(simulator: Simulator, part: list[float] = part) -> None:
            part.append(sum(features.sum(dtype=np.float64) for features in simulator.observations["jobs"]))

        play_randomly(Simulator(small, rules), range(12), watch=watch)
    assert (seen[0] == seen[1]) == same
