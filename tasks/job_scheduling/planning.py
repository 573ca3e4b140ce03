"""Looks ahead: a hand-written scheduler goes on after each candidate decision, in a copy of the episode.

The copy knows what a scheduler can know: no job arrives in it that has not arrived yet, and tasks take the median of
their profiles, those that are running too (`expected`). Rollouts as policy improvement: Bertsekas, Tsitsiklis and Wu
(1997). Shapes: N episodes, C candidates.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError
from netllm_pl.kernels import njit
from tasks.job_scheduling.batch import allocate, pick
from tasks.job_scheduling.bookkeeping import committable, demand, enter, expected
from tasks.job_scheduling.engine import act
from tasks.job_scheduling.heuristics import Scheme, choose, first_choices, works
from tasks.job_scheduling.simulator import Observations, Simulator, plan_of
from tasks.job_scheduling.state import (
    ACTIVE,
    ARRIVAL,
    ARRIVED,
    CHOICES,
    COMPLETED,
    NONE,
    PENDING,
    SEQUENCE,
    Floats,
    Ints,
)  # fmt: skip
from tasks.job_scheduling.streams import uniform_of


@dataclass(frozen=True)
class Lookahead:
    """How far, and over what, a planner looks ahead.

    Attributes:
        scheme: Who goes on after the candidate decision.
        horizon_s: Simulated time; what is left then is estimated.
        jobs: How many of the smallest jobs get candidates.
        shares: Candidates of a stage: parts of the executors that it could get.
        extra: Further candidates: any schedulable stages with any numbers of executors, as values of these are wanted
            for learning, too.
        margin: A candidate must be this part better than the scheme's own decision, of its cost, to replace it.
    """

    scheme: Scheme = Scheme()  # noqa: RUF009  # frozen
    horizon_s: float = 60.0
    jobs: int = 4
    shares: tuple[float, ...] = (1.0, 0.5, 0.25)
    extra: int = 0
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no planner can do.

        Raises:
            UserError: A value is out of its range.
        """
        for name, fits, wanted in (
            ("horizon_s", 0 < self.horizon_s < np.inf, "seconds above 0"),
            ("jobs", self.jobs >= 1, "1 or more"),
            ("shares", self.shares and all(0 < share <= 1 for share in self.shares), "one or more above 0, up to 1"),
            ("extra", self.extra >= 0, "0 or more"),
            ("margin", 0 <= self.margin < np.inf, "0 or more"),
        ):
            if not fits:
                raise UserError(f"lookahead.{name} is {getattr(self, name)}; expected {wanted}")


@njit()
def copy(ep, to):  # type: ignore[no-untyped-def]
    """Copy what an episode without random draws goes on from; no more jobs will come in the copy."""
    to.glob[:] = ep.glob
    to.clock[:] = ep.clock
    to.jobs[:] = ep.jobs
    to.times[:] = ep.times
    to.active[:] = ep.active
    to.stages[:] = ep.stages
    to.recent[:] = ep.recent
    to.executors[:] = ep.executors
    to.task[:] = ep.task
    to.glob[PENDING] = 0
    for k in range(ep.glob[PENDING]):
        e = ep.heap[k]
        to.due[e] = expected(ep, e)
        enter(to, e)
    to.pools[:] = ep.pools
    to.commitments[:] = ep.commitments
    to.choices[:] = ep.choices
    to.times[ep.glob[ARRIVED] :, ARRIVAL] = np.inf


@njit()
def left(ep):  # type: ignore[no-untyped-def]
    """Estimate the time that active jobs still spend in the system, ms: one after the other, the shortest first."""
    active = ep.glob[ACTIVE]
    work = np.empty(active)
    works(ep, work)
    work[:] = np.sort(work)
    total, now = 0.0, 0.0
    for a in range(active):
        now += work[a] / len(ep.executors)
        total += now
    return total


@njit()
def cost(ep, to, plan, scheme, k, count, horizon):  # type: ignore[no-untyped-def]
    """Time that the active jobs, not later ones, spend in the system from a decision on, job-milliseconds."""
    copy(ep, to)
    now = ep.clock[0]
    until = now + horizon
    going = act(to, plan, k, count, until)
    while going:
        following, executors = choose(to, scheme)
        going = act(to, plan, following, executors, until)
    total = 0.0
    for a in range(ep.glob[ACTIVE]):
        total += min(to.times[ep.active[a], COMPLETED], until) - now
    return total + left(to)


@njit()
def _append(ep, k, executors, out, count):  # type: ignore[no-untyped-def]
    """Add a candidate unless one that does the same is there; return how many there are."""
    for c in range(count):
        useful = NONE if out[c, 0] == NONE else min(out[c, 1], demand(ep, ep.choices[out[c, 0]]))
        if out[c, 0] == k and useful == executors:
            return count
    out[count] = (k, executors)
    return count + 1


@njit()
def candidates(ep, scheme, jobs, shares, extra, out):  # type: ignore[no-untyped-def]
    """List decisions worth a look, the scheme's own first; return their number. Out (C, 2)."""
    out[0] = choose(ep, scheme)
    count, free, active = 1, committable(ep), ep.glob[ACTIVE]
    work, first = np.empty(active), np.full(active, NONE)
    works(ep, work)
    first_choices(ep, first)
    taken = 0
    for a in np.argsort(work, kind="mergesort"):
        if first[a] == NONE or taken == jobs:
            continue
        taken += 1
        limit = min(free, demand(ep, ep.choices[first[a]]))
        for share in shares:
            count = _append(ep, first[a], max(1, int(np.ceil(share * limit))), out, count)
    for draw in range(extra):
        k = int(uniform_of(ep.glob[SEQUENCE], 2 * draw) * ep.glob[CHOICES])
        limit = min(free, demand(ep, ep.choices[k]))
        count = _append(ep, k, 1 + int(uniform_of(ep.glob[SEQUENCE], 2 * draw + 1) * limit), out, count)
    return count


@njit(nogil=True)
def plan_all(episodes, scratch, plan, scheme, horizon, jobs, shares, extra, begin, end, tried, costs, counts):  # type: ignore[no-untyped-def]
    """Look ahead in episodes begin to end: candidates (N, C, 2), their costs (N, C), job-ms, and numbers (N,)."""
    to = pick(scratch, begin)
    for i in range(begin, end):
        ep = pick(episodes, i)
        counts[i] = 0
        if ep.glob[CHOICES] == 0:
            continue
        counts[i] = candidates(ep, scheme, jobs, shares, extra, tried[i])
        for c in range(counts[i]):
            costs[i, c] = cost(ep, to, plan, scheme, tried[i, c, 0], tried[i, c, 1], horizon)


class Planner:
    """Takes the candidate decision after which a hand-written scheduler does best.

    Args:
        lookahead: How it looks ahead.
        threads: Threads that share the episodes; null takes the cores that the process may use.
    """

    def __init__(self, lookahead: Lookahead | None = None, threads: int | None = None) -> None:
        self.lookahead = lookahead or Lookahead()
        self.threads = threads or len(os.sched_getaffinity(0))

    def watch(self, env: Simulator) -> None:
        """Get to know the simulator."""
        self.env = env
        self.plan = plan_of(env.workload, replace(env.rules, stream="median", order="ascending"))
        episodes, jobs = env.episodes.glob.shape[0], env.rules.jobs
        stages, executors = env.episodes.stages.shape[1], env.rules.executors
        self.scratch = allocate(episodes, jobs, stages, executors, 0, False)

    def reset(self, n: int) -> None:
        """Begin n episodes."""

    def look(self) -> tuple[Ints, Floats, Ints]:
        """Return candidates (N, C, 2), their costs (N, C) in job-seconds, and how many there are (N,)."""
        ahead, count = self.lookahead, len(self.env.decisions)
        most = 1 + ahead.jobs * len(ahead.shares) + ahead.extra
        tried, costs = np.zeros((count, most, 2), np.int64), np.zeros((count, most))
        counts, shares = np.zeros(count, np.int64), np.array(ahead.shares)
        workers = min(self.threads, count)
        bounds = np.linspace(0, count, workers + 1).astype(int)

        def work(k: int) -> None:
            plan_all(
                self.env.episodes, self.scratch, self.plan, ahead.scheme.parameters(), 1000.0 * ahead.horizon_s,
                ahead.jobs, shares, ahead.extra, bounds[k], bounds[k + 1], tried, costs, counts,
            )  # fmt: skip

        if workers == 1:
            work(0)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(work, range(workers)))
        return tried, costs / 1000.0, counts

    def act(self, observations: Observations) -> npt.NDArray[np.int64]:
        """Return stage and executors (N, 2)."""
        tried, costs, counts = self.look()
        costs[:, 0] *= 1 - self.lookahead.margin
        costs = np.where(np.arange(costs.shape[1]) < counts[:, None], costs, np.inf)
        best: Ints = tried[np.arange(len(tried)), costs.argmin(1)]
        return best


class Valued:
    """A simulator whose ``info`` also holds ``values`` (N,) of (C, 3): candidates and what they are worth.

    A row is a stage (its number among the schedulable ones, or -1), executors, and the value in job-seconds: how much
    worse than the best candidate it is, at most 0.

    Args:
        simulator: What is played.
        lookahead: How candidates are found and valued.
    """

    def __init__(self, simulator: Simulator, lookahead: Lookahead) -> None:
        self.simulator, self.planner = simulator, Planner(lookahead)

    def __getattr__(self, name: str) -> Any:
        """Whatever else there is, the simulator has."""
        return getattr(self.simulator, name)

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start one episode for each seed."""
        observations = self.simulator.reset(seeds)
        self.planner.watch(self.simulator)
        return observations

    def step(self, actions: npt.NDArray[Any]) -> tuple[Observations, Floats, npt.NDArray[np.bool_], Observations]:
        """Value candidates, then take the decisions."""
        tried, costs, counts = self.planner.look()
        values = np.empty(len(counts), object)
        for i, count in enumerate(counts):
            worse = costs[i, :count].min(initial=np.inf) - costs[i, :count]
            values[i] = np.concatenate([tried[i, :count], worse[:, None]], axis=1).astype(np.float32)
        observations, rewards, over, info = self.simulator.step(actions)
        return observations, rewards, over, info | {"values": values}
