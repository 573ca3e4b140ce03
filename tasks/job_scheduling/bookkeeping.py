"""What the rules of the cluster simulator keep account of: events, pools of executors, demand, schedulable stages.

Kernels of numba on the arrays of one `Episode`.
"""

import numpy as np

from tasks.job_scheduling.state import (  # isort: skip
    ACTIVE, BASE, BUSY, CHOICES, COMMITTED, COMMON, EARLY, HOME, LAST, LOCAL, MOVING, NEWEST, NONE, OPEN, ORDER,
    OWNER, PENDING, PICKED, POOL, PROFILE, PROMISED, REMAINING, ROUND, SEQUENCE, SIZE, SOURCE, STAGES, SUPPLY,
    TARGET, UNSTARTED, WAITING, inlined, kernel,
)  # fmt: skip
from tasks.job_scheduling.streams import EMPTY, add, discard

# Events of executors: a binary heap by time, and by the order in which they were made ---------------------------------


@inlined
def _earlier(ep, a, b):  # type: ignore[no-untyped-def]
    if ep.due[a] != ep.due[b]:
        return ep.due[a] < ep.due[b]
    return ep.executors[a, ORDER] < ep.executors[b, ORDER]


@inlined
def enter(ep, e):  # type: ignore[no-untyped-def]
    """Put an executor with an event into the heap."""
    glob, heap = ep.glob, ep.heap
    at = glob[PENDING]
    glob[PENDING] += 1
    while at > 0 and _earlier(ep, e, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = e


@inlined
def push(ep, e, s, time):  # type: ignore[no-untyped-def]
    """An executor will arrive at a stage, or end a task of it."""
    ep.executors[e, TARGET] = s
    ep.executors[e, ORDER] = ep.glob[SEQUENCE]
    ep.due[e] = time
    ep.glob[SEQUENCE] += 1
    enter(ep, e)


@inlined
def pop(ep):  # type: ignore[no-untyped-def]
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


@inlined
def expected(ep, e):  # type: ignore[no-untyped-def]
    """When an executor's event happens as far as a scheduler can know, ms.

    A task takes as long as such tasks usually do (the median), but from now on at least a quarter of that.
    """
    if not ep.executors[e, BUSY]:
        return ep.due[e]  # moves take the same time always
    began, usual = ep.task[e]
    return max(began + usual, ep.clock[0] + usual / 4)


# Bookkeeping ----------------------------------------------------------------------------------------------------------


@inlined
def pool_job(ep, pool):  # type: ignore[no-untyped-def]
    """Job that a pool belongs to; NONE for the common one."""
    jobs = len(ep.jobs)
    if pool <= COMMON:
        return NONE
    return pool - 1 if pool <= jobs else ep.stages[pool - 1 - jobs, OWNER]


@inlined
def committable(ep):  # type: ignore[no-untyped-def]
    """Executors of the source that nothing was decided for yet."""
    source = ep.glob[SOURCE]
    return 0 if source == NONE else ep.pools[source, SIZE] - ep.pools[source, PROMISED]


@inlined
def demand(ep, s):  # type: ignore[no-untyped-def]
    """Executors that a stage could still use."""
    return ep.stages[s, REMAINING] - ep.stages[s, MOVING] - ep.stages[s, COMMITTED]


@inlined
def shift(ep, plan, s, remaining, moving, committed):  # type: ignore[no-untyped-def]
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
def move(ep, e, pool):  # type: ignore[no-untyped-def]
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
            add(ep.tables[pool], ep.shapes[pool], e, ep.tables[-1])


@kernel
def leave_job(ep, e):  # type: ignore[no-untyped-def]
    """An executor is of no job any more, and fresh."""
    home = ep.executors[e, HOME]
    if home != NONE:
        ep.jobs[home, LOCAL] -= 1
    ep.executors[e, HOME] = NONE
    ep.executors[e, LAST] = NONE


@kernel
def list_idle(ep, pool):  # type: ignore[no-untyped-def]
    """List the executors of a pool that are not busy, in the order in which they are taken; return their number."""
    count, out = 0, ep.idle
    if ep.tables.shape[1] == 0:
        for e in range(len(ep.executors)):
            if ep.executors[e, POOL] == pool and not ep.executors[e, BUSY]:
                out[count] = e
                count += 1
        return count
    chosen, shape = ep.tables[-2], ep.shapes[-2]
    chosen[:] = EMPTY
    shape[0], shape[1], shape[2] = 0, 0, 7
    for at in range(ep.shapes[pool, 2] + 1):
        key = np.int64(ep.tables[pool, at])
        if key >= 0 and not ep.executors[key, BUSY]:
            add(chosen, shape, key, ep.tables[-1])
    for at in range(shape[2] + 1):
        if chosen[at] >= 0:
            out[count] = chosen[at]
            count += 1
    return count


# Schedulable stages ---------------------------------------------------------------------------------------------------


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
def backup(ep, plan, e):  # type: ignore[no-untyped-def]
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
