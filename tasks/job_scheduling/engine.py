"""The rules of the cluster simulator, for one episode: kernels of numba on the arrays of `Episode`.

Spark executors run the stages of jobs as spark-sched-sim (A. Gertsman), after Decima (Mao et al., SIGCOMM 2019), lets
them; the tests reproduce logs of that program to the last bit. Quirks of it can be switched off; see `Rules`.
"""

import numpy as np

from tasks.job_scheduling.state import (
    ACTIVE,
    ARRIVAL,
    ARRIVED,
    BASE,
    BUSY,
    CHOICES,
    COLD,
    COMMITMENTS,
    COMMITTED,
    COMMON,
    COMMON_WAITS,
    COMPLETED,
    DONE,
    EARLY,
    HOME,
    INCOMPLETE,
    LAST,
    LOCAL,
    MEDIAN,
    MERSENNE,
    MOVING,
    NEWEST,
    NONE,
    OFFER,
    OPEN,
    ORDER,
    OWNER,
    PENDING,
    PICKED,
    POOL,
    PROFILE,
    PROMISED,
    REMAINING,
    REVERSED,
    ROUND,
    SEQUENCE,
    SIZE,
    SOURCE,
    STAGES,
    STALE,
    STARTED,
    STREAM,
    SUPPLY,
    TARGET,
    UNFINISHED,
    UNSTARTED,
    WAITING,
    kernel,
)  # fmt: skip
from tasks.job_scheduling.streams import EMPTY, add, below, counted, discard, uniform

FRESH, FIRST, REST = range(3)
"""Waves of tasks, as `Workload` orders them."""


# Events of executors: a binary heap by time, and by the order in which they were made -----------------------------------


@kernel
def _earlier(ep, a, b):  # type: ignore[no-untyped-def]
    if ep.due[a] != ep.due[b]:
        return ep.due[a] < ep.due[b]
    return ep.executors[a, ORDER] < ep.executors[b, ORDER]


@kernel
def _push(ep, e, s, time):  # type: ignore[no-untyped-def]
    """An executor will arrive at a stage, or end a task of it."""
    glob, heap = ep.glob, ep.heap
    ep.executors[e, TARGET] = s
    ep.executors[e, ORDER] = glob[SEQUENCE]
    ep.due[e] = time
    glob[SEQUENCE] += 1
    at = glob[PENDING]
    glob[PENDING] += 1
    while at > 0 and _earlier(ep, e, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = e


@kernel
def _pop(ep):  # type: ignore[no-untyped-def]
    """Take the executor with the next event off the heap."""
    heap = ep.heap
    ep.glob[PENDING] -= 1
    count = ep.glob[PENDING]
    first, moved = heap[0], heap[count]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= count:
            break
        if child + 1 < count and _earlier(ep, heap[child + 1], heap[child]):
            child += 1
        if not _earlier(ep, heap[child], moved):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved
    return first


# Bookkeeping ------------------------------------------------------------------------------------------------------------


@kernel
def pool_job(ep, pool):  # type: ignore[no-untyped-def]
    """Job that a pool belongs to; NONE for the common one."""
    jobs = len(ep.jobs)
    if pool <= COMMON:
        return NONE
    return pool - 1 if pool <= jobs else ep.stages[pool - 1 - jobs, OWNER]


@kernel
def committable(ep):  # type: ignore[no-untyped-def]
    """Executors of the source that nothing was decided for yet."""
    source = ep.glob[SOURCE]
    return 0 if source == NONE else ep.pools[source, SIZE] - ep.pools[source, PROMISED]


@kernel
def demand(ep, s):  # type: ignore[no-untyped-def]
    """Executors that a stage could still use."""
    return ep.stages[s, REMAINING] - ep.stages[s, MOVING] - ep.stages[s, COMMITTED]


@kernel
def _shift(ep, plan, s, remaining, moving, committed):  # type: ignore[no-untyped-def]
    """Change what a stage's demand consists of; its children learn whether it is filled."""
    row = ep.stages[s]
    before = row[REMAINING] - row[MOVING] - row[COMMITTED]
    row[REMAINING] += remaining
    row[MOVING] += moving
    row[COMMITTED] += committed
    after = row[REMAINING] - row[MOVING] - row[COMMITTED]
    if (before > 0) != (after > 0):
        profile, base = row[PROFILE], ep.jobs[row[OWNER], BASE]
        for k in range(plan.child_start[profile], plan.child_start[profile + 1]):
            ep.stages[base + plan.children[k], OPEN] += 1 if after > 0 else -1


@kernel
def _move(ep, e, pool):  # type: ignore[no-untyped-def]
    """Put an executor into a pool, or on the way (NONE)."""
    hashed = ep.tables.shape[1] > 0
    old = ep.executors[e, POOL]
    if old != NONE:
        ep.pools[old, SIZE] -= 1
        if hashed:
            discard(ep.tables[old], ep.shapes[old], e)
    ep.executors[e, POOL] = pool
    if pool != NONE:
        ep.pools[pool, SIZE] += 1
        if hashed:
            add(ep.tables[pool], ep.shapes[pool], e, ep.spare[1])


@kernel
def _leave_job(ep, e):  # type: ignore[no-untyped-def]
    home = ep.executors[e, HOME]
    if home != NONE:
        ep.jobs[home, LOCAL] -= 1
    ep.executors[e, HOME] = NONE
    ep.executors[e, LAST] = NONE


@kernel
def _idle(ep, pool, out):  # type: ignore[no-untyped-def]
    """List the executors of a pool that are not busy, in the order in which they are taken; return their number."""
    count = 0
    if ep.tables.shape[1] == 0:
        for e in range(len(ep.executors)):
            if ep.executors[e, POOL] == pool and not ep.executors[e, BUSY]:
                out[count] = e
                count += 1
        return count
    chosen, shape = ep.spare[0], ep.spare_shape
    chosen[:] = EMPTY
    shape[0], shape[1], shape[2] = 0, 0, 7
    for at in range(ep.shapes[pool, 2] + 1):
        e = np.int64(ep.tables[pool, at])
        if e >= 0 and not ep.executors[e, BUSY]:
            add(chosen, shape, e, ep.spare[1])
    for at in range(shape[2] + 1):
        e = chosen[at]
        if e >= 0:
            out[count] = e
            count += 1
    return count


# Schedulable stages -----------------------------------------------------------------------------------------------------


@kernel
def schedulable(ep, plan, s):  # type: ignore[no-untyped-def]
    """Whether a stage may be chosen, if its job may."""
    row = ep.stages[s]
    wants = row[REMAINING] - row[MOVING] - row[COMMITTED] > 0
    early = plan.switches[EARLY] or row[WAITING] == 0
    return wants and row[OPEN] == 0 and row[PICKED] != ep.glob[ROUND] and early


@kernel
def find_choices(ep, plan):  # type: ignore[no-untyped-def]
    """List the schedulable stages, by arrival of their jobs; return their number."""
    source = pool_job(ep, ep.glob[SOURCE])
    count = 0
    for k in range(ep.glob[ACTIVE]):
        j = ep.active[k]
        row = ep.jobs[j]
        if row[UNSTARTED] == 0 or (j != source and row[SUPPLY] >= len(ep.executors)):
            continue
        for s in range(row[BASE], row[BASE] + row[STAGES]):
            if schedulable(ep, plan, s):
                ep.choices[count] = s
                count += 1
    ep.glob[CHOICES] = count
    return count


@kernel
def _of_job(ep, plan, j):  # type: ignore[no-untyped-def]
    """The last (first, if mended) schedulable stage of a job."""
    base, count = ep.jobs[j, BASE], ep.jobs[j, STAGES]
    for k in range(count):
        s = base + (count - 1 - k if plan.switches[NEWEST] else k)
        if schedulable(ep, plan, s):
            return s
    return NONE


@kernel
def _backup(ep, plan, e):  # type: ignore[no-untyped-def]
    """Another stage for an executor whose stage has nothing left to start."""
    home, active = ep.executors[e, HOME], ep.glob[ACTIVE]
    found = _of_job(ep, plan, home)
    for k in range(active):
        if found != NONE:
            return found
        j = ep.active[active - 1 - k if plan.switches[NEWEST] else k]
        if j != home and ep.jobs[j, SUPPLY] < len(ep.executors) and ep.jobs[j, UNSTARTED] > 0:
            found = _of_job(ep, plan, j)
    return found


# Executors --------------------------------------------------------------------------------------------------------------


@kernel
def _duration(ep, plan, e, s):  # type: ignore[no-untyped-def]
    """Draw how long a task takes; return level, wave, warm-up and duration."""
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
    if stream == MEDIAN:
        return level, wave, warm, plan.medians[profile, level, wave] + warm
    if stream == MERSENNE:
        at = below(ep.twister, sizes[wave])
    else:
        at = int(counted(ep) * sizes[wave])
    return level, wave, warm, plan.durations[plan.wave_start[profile, level, wave] + at] + warm


@kernel
def _start(ep, plan, e, s):  # type: ignore[no-untyped-def]
    """An executor that is at a stage's job begins the next task."""
    _shift(ep, plan, s, -1, 0, 0)
    j = ep.stages[s, OWNER]
    if ep.stages[s, REMAINING] == 0:
        ep.jobs[j, UNSTARTED] -= 1
    level, wave, warm, duration = _duration(ep, plan, e, s)
    ep.recent[s] = duration
    ep.executors[e, BUSY] = 1
    ep.executors[e, LAST] = s
    if len(ep.tape):
        row = ep.tape[ep.glob[STARTED]]
        row[0], row[1], row[2], row[3], row[4] = ep.clock[0], j, s - ep.jobs[j, BASE], e, ep.jobs[j, LOCAL]
        row[5], row[6], row[7], row[8] = plan.level_key[ep.stages[s, PROFILE], level], wave, warm > 0, duration
    ep.glob[STARTED] += 1
    _push(ep, e, s, ep.clock[0] + duration)


@kernel
def _park(ep, plan, e):  # type: ignore[no-untyped-def]
    """Put an idle executor where it waits: the pool of its job, or the common one if that has nothing left to start."""
    pool = ep.executors[e, POOL]
    j = pool_job(ep, pool)
    if j == NONE:
        return
    if ep.jobs[j, UNSTARTED] == 0:
        _move(ep, e, COMMON)
        _leave_job(ep, e)
        if not plan.switches[STALE]:
            ep.jobs[j, SUPPLY] -= 1
    elif pool > len(ep.jobs):
        _move(ep, e, 1 + j)


@kernel
def _park_all(ep, plan, pool):  # type: ignore[no-untyped-def]
    if pool == COMMON:
        return
    for k in range(_idle(ep, pool, ep.idle)):
        _park(ep, plan, ep.idle[k])


@kernel
def _go(ep, plan, e, s):  # type: ignore[no-untyped-def]
    """Bring an executor to a stage, if that still needs it."""
    if ep.stages[s, REMAINING] == 0:
        s = _backup(ep, plan, e)
        if s == NONE:
            _park(ep, plan, e)
            return
    j = ep.stages[s, OWNER]
    if ep.executors[e, HOME] != j:
        left = pool_job(ep, ep.executors[e, POOL])
        _move(ep, e, NONE)
        _shift(ep, plan, s, 0, 1, 0)
        ep.jobs[j, SUPPLY] += 1
        if left != NONE:
            ep.jobs[left, SUPPLY] -= 1
        _leave_job(ep, e)
        _push(ep, e, s, ep.clock[0] + plan.delays[0])
    elif ep.stages[s, WAITING] > 0:
        if plan.switches[COLD]:
            ep.executors[e, LAST] = NONE
        _move(ep, e, 1 + j)
    else:
        _move(ep, e, 1 + len(ep.jobs) + s)
        _start(ep, plan, e, s)


# Rounds of decisions ----------------------------------------------------------------------------------------------------


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
        _shift(ep, plan, target - 1 - len(ep.jobs), 0, 0, count)
        if j != pool_job(ep, source):
            ep.jobs[j, SUPPLY] += count


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
    _shift(ep, plan, s, 0, 0, -1)
    if j != pool_job(ep, source):
        ep.jobs[j, SUPPLY] -= 1
    _go(ep, plan, e, s)


@kernel
def _finish_round(ep, plan):  # type: ignore[no-untyped-def]
    """What was not promised stays; idle executors go where they were promised to."""
    source, left = ep.glob[SOURCE], committable(ep)
    if left > 0:
        _commit(ep, plan, COMMON, left)
    idle, made, entries = ep.idle, ep.made, ep.glob[COMMITMENTS]
    count = _idle(ep, source, idle)
    for k in range(entries):
        for c in range(3):
            made[k, c] = ep.commitments[k, c]
    at = 0
    for k in range(entries):
        if made[k, 0] == source:
            for _ in range(min(made[k, 2], count - at)):
                _fulfil(ep, plan, idle[at], made[k, 1])
                at += 1
    ep.glob[SOURCE] = NONE
    ep.glob[ROUND] += 1


# Events -----------------------------------------------------------------------------------------------------------------


@kernel
def arrive(ep):  # type: ignore[no-untyped-def]
    """The next job arrives."""
    glob = ep.glob
    ep.active[glob[ACTIVE]] = glob[ARRIVED]
    glob[ACTIVE] += 1
    glob[ARRIVED] += 1
    glob[OFFER] = 1
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


@kernel
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
        at = 0
        while ep.commitments[at, 0] != pool:
            at += 1
        _fulfil(ep, plan, e, ep.commitments[at, 1])
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
    _shift(ep, plan, s, 0, -1, 0)
    _move(ep, e, 1 + j)
    _go(ep, plan, e, s)


@kernel
def next_event(ep):  # type: ignore[no-untyped-def]
    """When the next event happens, ms; infinite if there is none."""
    glob = ep.glob
    soonest = ep.due[ep.heap[0]] if glob[PENDING] > 0 else np.inf
    return min(soonest, ep.times[glob[ARRIVED], ARRIVAL]) if glob[ARRIVED] < len(ep.jobs) else soonest


@kernel
def resume(ep, plan, until):  # type: ignore[no-untyped-def]
    """Let time pass until something must be decided; False if nothing will be, or not before a time, ms."""
    glob = ep.glob
    while True:
        now = next_event(ep)
        if now > until or now == np.inf:
            glob[CHOICES] = 0
            return False
        ep.clock[0] = now
        if glob[ARRIVED] < len(ep.jobs) and ep.times[glob[ARRIVED], ARRIVAL] == now:  # was in the queue before others
            arrive(ep)
        else:
            e = _pop(ep)
            if ep.executors[e, BUSY]:
                _end_task(ep, plan, e)
            else:
                _end_move(ep, plan, e)
        while True:
            if committable(ep) > 0:
                if find_choices(ep, plan) > 0:
                    return True
                _park_all(ep, plan, glob[SOURCE])
                glob[SOURCE] = NONE
            if plan.switches[COMMON_WAITS] or not glob[OFFER]:
                break
            glob[OFFER] = 0
            glob[SOURCE] = COMMON


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
