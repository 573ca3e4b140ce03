"""The rules of the cluster simulator, for one episode: kernels of numba on the arrays of `Episode`.

Spark executors run the stages of jobs as spark-sched-sim (A. Gertsman), after Decima (Mao et al., SIGCOMM 2019), lets
them; the tests reproduce logs of that program to the last bit. Quirks of it can be switched off; see `Rules`.
"""

import numpy as np

from tasks.job_scheduling.bookkeeping import (  # isort: skip
    backup, committable, demand, find_choices, leave_job, list_idle, move, pool_job, pop, push, shift,
)  # fmt: skip
from tasks.job_scheduling.state import (  # isort: skip
    ACTIVE, ARRIVAL, ARRIVED, BASE, BUSY, CHOICES, COLD, COMMITMENTS, COMMON, COMMON_WAITS, COMPLETED, DONE, HOME,
    INCOMPLETE, LAST, LOCAL, MEDIAN, MERSENNE, NONE, OFFER, OWNER, PENDING, PICKED, POOL, PROFILE, PROMISED,
    REMAINING, REVERSED, ROUND, SIZE, SOURCE, STALE, STARTED, STREAM, SUPPLY, TARGET, UNFINISHED, UNSTARTED,
    WAITING, inlined, kernel,
)  # fmt: skip
from tasks.job_scheduling.streams import below, counted, uniform

FRESH, FIRST, REST = range(3)
"""Waves of tasks, as `Workload` orders them."""


# Executors ------------------------------------------------------------------------------------------------------------


@inlined
def _duration(ep, plan, e, s):  # type: ignore[no-untyped-def]
    """Draw how long a task takes; return level, wave, warm-up, duration, and what is usual."""
    row = ep.stages[s]
    local = ep.jobs[row[OWNER], LOCAL]
    level, right = plan.left[local], plan.right[local]
    stream = plan.switches[STREAM]
    if level != right:
        above, width = plan.span[local]
        draw = 0.5
        if stream == MERSENNE:
            draw = uniform(ep.twister)
        elif stream != MEDIAN:
            draw = counted(ep)
        inside = 1 + int(draw * width) <= above
        if inside != (plan.switches[REVERSED] != 0):
            level = right
    profile, last = row[PROFILE], ep.executors[e, LAST]
    sizes = plan.wave_size[profile, level]
    wave, warm = FIRST, 0
    if last == NONE:
        wave, warm = (FRESH, 0) if sizes[FRESH] > 0 else (FIRST, plan.delays[1])
    elif last == s and sizes[REST] > 0:
        wave = REST
    elif sizes[FIRST] == 0:
        wave = FRESH
    usual = plan.medians[profile, level, wave] + warm
    if stream == MEDIAN:
        return level, wave, warm, usual, usual
    at = below(ep.twister, sizes[wave]) if stream == MERSENNE else int(counted(ep) * sizes[wave])
    return level, wave, warm, plan.durations[plan.wave_start[profile, level, wave] + at] + warm, usual


@inlined
def _start(ep, plan, e, s):  # type: ignore[no-untyped-def]
    """An executor that is at a stage's job begins the next task."""
    shift(ep, plan, s, -1, 0, 0)
    j = ep.stages[s, OWNER]
    if ep.stages[s, REMAINING] == 0:
        ep.jobs[j, UNSTARTED] -= 1
    level, wave, warm, duration, usual = _duration(ep, plan, e, s)
    ep.recent[s] = duration
    ep.task[e, 0], ep.task[e, 1] = ep.clock[0], usual
    ep.executors[e, BUSY] = 1
    ep.executors[e, LAST] = s
    if len(ep.tape):
        row = ep.tape[ep.glob[STARTED]]
        row[0], row[1], row[2], row[3], row[4] = ep.clock[0], j, s - ep.jobs[j, BASE], e, ep.jobs[j, LOCAL]
        row[5], row[6], row[7], row[8] = plan.level_key[ep.stages[s, PROFILE], level], wave, warm > 0, duration
    ep.glob[STARTED] += 1
    push(ep, e, s, ep.clock[0] + duration)


@kernel
def _park(ep, plan, e):  # type: ignore[no-untyped-def]
    """Put an idle executor where it waits: the pool of its job, or the common one if that has nothing left to start."""
    pool = ep.executors[e, POOL]
    j = pool_job(ep, pool)
    if j == NONE:
        return
    if ep.jobs[j, UNSTARTED] == 0:
        move(ep, e, COMMON)
        leave_job(ep, e)
        if not plan.switches[STALE]:
            ep.jobs[j, SUPPLY] -= 1
    elif pool > len(ep.jobs):
        move(ep, e, 1 + j)


@kernel
def _park_all(ep, plan, pool):  # type: ignore[no-untyped-def]
    if pool == COMMON:
        return
    for k in range(list_idle(ep, pool)):
        _park(ep, plan, ep.idle[k])


@kernel
def _go(ep, plan, e, s):  # type: ignore[no-untyped-def]
    """Bring an executor to a stage, if that still needs it."""
    if ep.stages[s, REMAINING] == 0:
        s = backup(ep, plan, e)
        if s == NONE:
            _park(ep, plan, e)
            return
    j = ep.stages[s, OWNER]
    if ep.executors[e, HOME] != j:
        left = pool_job(ep, ep.executors[e, POOL])
        move(ep, e, NONE)
        shift(ep, plan, s, 0, 1, 0)
        ep.jobs[j, SUPPLY] += 1
        if left != NONE:
            ep.jobs[left, SUPPLY] -= 1
        leave_job(ep, e)
        push(ep, e, s, ep.clock[0] + plan.delays[0])
    elif ep.stages[s, WAITING] > 0:
        if plan.switches[COLD]:
            ep.executors[e, LAST] = NONE
        move(ep, e, 1 + j)
    else:
        move(ep, e, 1 + len(ep.jobs) + s)
        _start(ep, plan, e, s)


# Rounds of decisions --------------------------------------------------------------------------------------------------


@kernel
def _commit(ep, plan, target, count):  # type: ignore[no-untyped-def]
    """Promise executors of the source to a pool: a stage's, or the common one."""
    glob, source = ep.glob, ep.glob[SOURCE]
    at = 0
    while at < glob[COMMITMENTS] and (ep.commitments[at, 0] != source or ep.commitments[at, 1] != target):
        at += 1
    if at == glob[COMMITMENTS]:
        glob[COMMITMENTS] += 1
        ep.commitments[at, 0], ep.commitments[at, 1], ep.commitments[at, 2] = source, target, 0
    ep.commitments[at, 2] += count
    ep.pools[source, PROMISED] += count
    if target != COMMON:
        j = pool_job(ep, target)
        shift(ep, plan, target - 1 - len(ep.jobs), 0, 0, count)
        if j != pool_job(ep, source):
            ep.jobs[j, SUPPLY] += count


@kernel
def _promise(ep, pool):  # type: ignore[no-untyped-def]
    """Where the first executor that a pool promised goes."""
    at = 0
    while ep.commitments[at, 0] != pool:
        at += 1
    return ep.commitments[at, 1]


@kernel
def _fulfil(ep, plan, e, target):  # type: ignore[no-untyped-def]
    """Send an executor where it was promised to."""
    source = ep.executors[e, POOL]
    table, count = ep.commitments, ep.glob[COMMITMENTS]
    at = 0
    while table[at, 0] != source or table[at, 1] != target:
        at += 1
    table[at, 2] -= 1
    if table[at, 2] == 0:
        for k in range(at, count - 1):  # a slice assignment would copy in an order that is not defined
            table[k, 0], table[k, 1], table[k, 2] = table[k + 1, 0], table[k + 1, 1], table[k + 1, 2]
        ep.glob[COMMITMENTS] -= 1
    ep.pools[source, PROMISED] -= 1
    if target == COMMON:
        _park(ep, plan, e)
        return
    s, j = target - 1 - len(ep.jobs), pool_job(ep, target)
    shift(ep, plan, s, 0, 0, -1)
    if j != pool_job(ep, source):
        ep.jobs[j, SUPPLY] -= 1
    _go(ep, plan, e, s)


@kernel
def _finish_round(ep, plan):  # type: ignore[no-untyped-def]
    """What was not promised stays; idle executors go where they were promised to."""
    source, left = ep.glob[SOURCE], committable(ep)
    if left > 0:
        _commit(ep, plan, COMMON, left)
    for k in range(list_idle(ep, source)):
        _fulfil(ep, plan, ep.idle[k], _promise(ep, source))
    ep.glob[SOURCE] = NONE
    ep.glob[ROUND] += 1


# Events ---------------------------------------------------------------------------------------------------------------


@kernel
def arrive(ep):  # type: ignore[no-untyped-def]
    """The next job arrives."""
    glob = ep.glob
    ep.active[glob[ACTIVE]] = glob[ARRIVED]
    glob[ACTIVE] += 1
    glob[ARRIVED] += 1
    if ep.pools[COMMON, SIZE] > 0:
        glob[SOURCE] = COMMON


@kernel
def _complete_job(ep, plan, j):  # type: ignore[no-untyped-def]
    _park_all(ep, plan, 1 + j)
    at = 0
    while ep.active[at] != j:
        at += 1
    ep.glob[ACTIVE] -= 1
    for k in range(at, ep.glob[ACTIVE]):
        ep.active[k] = ep.active[k + 1]
    ep.times[j, COMPLETED] = ep.clock[0]
    ep.glob[DONE] += 1


@inlined
def _end_task(ep, plan, e):  # type: ignore[no-untyped-def]
    """An executor ends a task: it takes the next one of the stage, or goes where it was promised to, or is free."""
    s = ep.executors[e, TARGET]
    row = ep.stages[s]
    row[UNFINISHED] -= 1
    ep.executors[e, BUSY] = 0
    if row[REMAINING] > 0:
        _start(ep, plan, e, s)
        return
    j, pool = row[OWNER], 1 + len(ep.jobs) + s
    grown = False
    if row[UNFINISHED] == 0:
        ep.jobs[j, INCOMPLETE] -= 1
        for k in range(plan.child_start[row[PROFILE]], plan.child_start[row[PROFILE] + 1]):
            child = ep.jobs[j, BASE] + plan.children[k]
            ep.stages[child, WAITING] -= 1
            if ep.stages[child, WAITING] == 0:
                grown = True
        if ep.jobs[j, INCOMPLETE] == 0:
            _complete_job(ep, plan, j)
    promised = ep.pools[pool, PROMISED] > 0
    if promised:
        _fulfil(ep, plan, e, _promise(ep, pool))
    else:
        if plan.switches[COLD]:
            ep.executors[e, LAST] = NONE
        if grown:
            _park(ep, plan, e)
    if grown:
        ep.glob[SOURCE] = 1 + j
        ep.glob[OFFER] = 1
    elif not promised:
        ep.glob[SOURCE] = pool


@kernel
def _end_move(ep, plan, e):  # type: ignore[no-untyped-def]
    """An executor arrives at a job."""
    s = ep.executors[e, TARGET]
    j = ep.stages[s, OWNER]
    ep.executors[e, HOME] = j
    ep.jobs[j, LOCAL] += 1
    shift(ep, plan, s, 0, -1, 0)
    move(ep, e, 1 + j)
    _go(ep, plan, e, s)


@inlined
def next_event(ep):  # type: ignore[no-untyped-def]
    """When the next event happens, ms; infinite if there is none."""
    glob = ep.glob
    soonest = ep.due[ep.heap[0]] if glob[PENDING] > 0 else np.inf
    return min(soonest, ep.times[glob[ARRIVED], ARRIVAL]) if glob[ARRIVED] < len(ep.jobs) else soonest


@inlined
def _asks(ep, plan):  # type: ignore[no-untyped-def]
    """Whether executors of the source, or, if mended, of the common pool must be assigned; parks them if not."""
    glob = ep.glob
    while True:
        if committable(ep) > 0:
            if find_choices(ep, plan) > 0:
                return True
            _park_all(ep, plan, glob[SOURCE])
            glob[SOURCE] = NONE
        if plan.switches[COMMON_WAITS] or not glob[OFFER]:
            return False
        glob[OFFER] = 0
        glob[SOURCE] = COMMON


@kernel
def resume(ep, plan, until):  # type: ignore[no-untyped-def]
    """Let time pass until something must be decided; False if nothing will be, or not before a time, ms."""
    glob = ep.glob
    while True:
        if _asks(ep, plan):
            return True
        now = next_event(ep)
        if now > until or now == np.inf:
            glob[CHOICES] = 0
            return False
        ep.clock[0] = now
        if glob[ARRIVED] < len(ep.jobs) and ep.times[glob[ARRIVED], ARRIVAL] == now:  # was in the queue before others
            arrive(ep)
        else:
            e = pop(ep)
            if ep.executors[e, BUSY]:
                _end_task(ep, plan, e)
            else:
                _end_move(ep, plan, e)


@kernel
def act(ep, plan, k, count, until):  # type: ignore[no-untyped-def]
    """Give executors of the source to choice k (NONE: leave the rest), and let time pass if the round is over.

    Returns:
        Whether there is something to decide.
    """
    glob = ep.glob
    if k != NONE:
        s = ep.choices[k]
        _commit(ep, plan, 1 + len(ep.jobs) + s, min(count, demand(ep, s)))
        ep.stages[s, PICKED] = glob[ROUND]
        if committable(ep) > 0 and find_choices(ep, plan) > 0:
            return True
    _finish_round(ep, plan)
    return resume(ep, plan, until)


@kernel
def job_time(ep, first, before):  # type: ignore[no-untyped-def]
    """Time that jobs, from number `first` on, have spent in the system since a time: job-milliseconds."""
    total = 0.0
    for j in range(first, ep.glob[ARRIVED]):
        if ep.times[j, COMPLETED] > before:
            total += min(ep.times[j, COMPLETED], ep.clock[0]) - max(ep.times[j, ARRIVAL], before)
    return total
