"""Hand-written schedulers, in numba, on the state of the simulator; also what planners continue episodes with.

All go by one scheme: jobs in some order, each with a share of the executors. The source's job keeps executors, or they
go to the first job in order that has a stage and less than its share. Shapes: N episodes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from netllm_pl.kernels import njit
from tasks.job_scheduling.batch import pick
from tasks.job_scheduling.bookkeeping import committable, pool_job
from tasks.job_scheduling.engine import act
from tasks.job_scheduling.simulator import Observations, Simulator
from tasks.job_scheduling.state import (
    ACTIVE,
    BASE,
    CHOICES,
    NONE,
    OWNER,
    REMAINING,
    SOURCE,
    STAGES,
    SUPPLY,
    UNSTARTED,
    WAITING,
    WORK,
    Episode,
    Floats,
    Ints,
)  # fmt: skip

BY_WORK, DIVIDE, EXPONENT, TOTAL, MOST, COUNT_SATURATED, KEEP, SPILL = range(8)
"""Entries of a scheme's parameters."""
KEEPS = ("none", "share", "all")
"""What the parameter `KEEP` numbers."""


@dataclass(frozen=True)
class Scheme:
    """How a hand-written scheduler decides.

    Attributes:
        by_work: Jobs are ordered by work, the least first; otherwise by arrival.
        divide: Executors are divided into shares; otherwise a job may have up to `most`.
        exponent: A job's share is proportional to this power of its work; 0 gives equal shares.
        total: A job's work is that of all its tasks (by rough durations); otherwise the remaining one (tasks that were
            not started x most recent durations).
        most: No share is larger than this part of all executors.
        count_saturated: Jobs without tasks to start count when shares are computed.
        keep: While the job that executors leave has a stage, it is the first to get ``all`` of them, or up to its
            ``share``; with ``none`` it comes in its turn.
        spill: What is above all shares goes to the first job in order that has a stage; otherwise it rests.
    """

    by_work: bool = True
    divide: bool = True
    exponent: float = 0.0
    total: bool = False
    most: float = 1.0
    count_saturated: bool = False
    keep: Literal["none", "share", "all"] = "share"
    spill: bool = True

    def parameters(self) -> Floats:
        """What the kernels read."""
        shares = (self.by_work, self.divide, self.exponent, self.total, self.most, self.count_saturated)
        return np.array([*shares, KEEPS.index(self.keep), self.spill], np.float64)


SCHEMES = {
    # As the published program: all jobs count, and those with nothing left to start still have a supply.
    "fifo": Scheme(by_work=False, divide=False, most=0.5, keep="all", spill=False),
    "fair": Scheme(by_work=False, count_saturated=True, keep="all", spill=False),
    "sjf": Scheme(divide=False, keep="none", spill=False),
    "sjf_capped": Scheme(divide=False, most=0.4, keep="none", spill=False),
    "weighted_fair": Scheme(exponent=-1.0, total=True, count_saturated=True, keep="all"),
    "srpt_fair": Scheme(),
}


@njit()
def works(ep, work):  # type: ignore[no-untyped-def]
    """Remaining work of the active jobs, by arrival: executor-milliseconds that were not started."""
    for a in range(ep.glob[ACTIVE]):
        row = ep.jobs[ep.active[a]]
        work[a] = 0.0
        if row[UNSTARTED] > 0:
            for s in range(row[BASE], row[BASE] + row[STAGES]):
                work[a] += ep.stages[s, REMAINING] * ep.recent[s]


@njit()
def first_choices(ep, first):  # type: ignore[no-untyped-def]
    """First choice of each active job, if possible one that can run at once; NONE if it has none."""
    a = 0
    for k in range(ep.glob[CHOICES]):
        s = ep.choices[k]
        while ep.active[a] != ep.stages[s, OWNER]:
            a += 1
        if first[a] == NONE or (ep.stages[s, WAITING] == 0 and ep.stages[ep.choices[first[a]], WAITING] > 0):
            first[a] = k


@njit()
def choose(ep, scheme):  # type: ignore[no-untyped-def]
    """Decide by a scheme; return the number of the choice, or NONE, and executors."""
    active, executors, free = ep.glob[ACTIVE], len(ep.executors), committable(ep)
    source = pool_job(ep, ep.glob[SOURCE])
    work, share, first = np.empty(active), np.empty(active), np.full(active, NONE)
    works(ep, work)
    if scheme[TOTAL] > 0:
        for a in range(active):
            work[a] = ep.times[ep.active[a], WORK]
    first_choices(ep, first)
    total = 0.0
    for a in range(active):
        counts = scheme[COUNT_SATURATED] > 0 or ep.jobs[ep.active[a], UNSTARTED] > 0
        share[a] = max(work[a], 1.0) ** scheme[EXPONENT] if counts else 0.0
        total += share[a]
    most = np.ceil(scheme[MOST] * executors - 1e-9)
    for a in range(active):
        share[a] = min(np.ceil(executors * share[a] / total - 1e-9), most) if scheme[DIVIDE] else most
    order = np.argsort(work, kind="mergesort") if scheme[BY_WORK] else np.arange(active)
    own = NONE
    for a in range(active):
        if ep.active[a] == source and first[a] != NONE:
            own = a
    if own != NONE and scheme[KEEP] == 2:
        return first[own], free
    if own != NONE and scheme[KEEP] == 1:
        kept = int(share[own]) - (ep.jobs[source, SUPPLY] - free)
        if kept > 0:
            return first[own], min(free, kept)
    for a in order:
        j = ep.active[a]
        missing = int(share[a]) - ep.jobs[j, SUPPLY] + (free if j == source else 0)
        if first[a] != NONE and missing > 0 and (j != source or scheme[KEEP] == 0):
            return first[a], min(free, missing)
    if scheme[SPILL]:
        if own != NONE:
            return first[own], free
        for a in order:
            if first[a] != NONE:
                return first[a], free
    return NONE, free


@njit(nogil=True)
def choose_all(episodes, scheme, actions):  # type: ignore[no-untyped-def]
    """Decide in every episode; actions (N, 2) of those that are over are NONE and 1."""
    for i in range(len(actions)):
        ep = pick(episodes, i)
        actions[i] = (NONE, 1)
        if ep.glob[CHOICES] > 0:
            actions[i] = choose(ep, scheme)


@njit(nogil=True)
def play_all(episodes, plan, scheme, first, end):  # type: ignore[no-untyped-def]
    """Play the episodes from number `first` to `end` to their ends; return the number of decisions."""
    decisions = 0
    for i in range(first, end):
        ep = pick(episodes, i)
        going = ep.glob[CHOICES] > 0
        while going:
            k, count = choose(ep, scheme)
            going = act(ep, plan, k, count, np.inf)
            decisions += 1
    return decisions


class Heuristic:
    """Decides by a scheme; it looks at the state of the simulator, which says no more than the observations do.

    Args:
        scheme: How.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.parameters = scheme.parameters()

    def watch(self, env: Simulator) -> None:
        """Get to know the simulator."""
        self.env = env

    def reset(self, n: int) -> None:
        """Begin n episodes."""

    def act(self, observations: Observations) -> npt.NDArray[np.int64]:
        """Return stage and executors (N, 2)."""
        actions = np.empty((len(observations["time_s"]), 2), np.int64)
        choose_all(self.env.episodes, self.parameters, actions)
        return actions


def adviser(scheme: Scheme) -> Callable[[Episode, Ints], object]:
    """Return what a `Simulator` takes to show the decisions of a scheme in its observations."""
    parameters = scheme.parameters()
    return lambda episodes, actions: choose_all(episodes, parameters, actions)
