"""Many episodes of the cluster simulator at once: their arrays, and kernels that start, step and observe them.

Shapes: N episodes; M nodes (incomplete stages of active jobs), E edges, J active jobs and K schedulable stages of an
episode; capitals with a bar in comments are sums over episodes.
"""

import numpy as np

from netllm_pl.kernels import njit
from tasks.job_scheduling.bookkeeping import committable, demand, expected, find_choices, pool_job
from tasks.job_scheduling.engine import act, arrive, job_time

from tasks.job_scheduling.state import (  # isort: skip
    ACTIVE, ARRIVAL, ARRIVED, BASE, BUSY, CHOICES, COMMITTED, COMMON, COMPLETED, EXECUTOR, GLOB, HOME, INCOMPLETE,
    JOB, LAST, LOCAL, MOVING, NONE, OPEN, OWNER, PENDING, PICKED, POOL, PROFILE, REMAINING, SEED, SIZE, SOURCE,
    STAGE, STAGES, SUPPLY, TAPE, TARGET, TEMPLATE, TIME, UNFINISHED, UNSTARTED, WAITING, WORK, Episode, Floats, Ints,
    Plan,
)  # fmt: skip
from tasks.job_scheduling.streams import EMPTY, add, capacity, counted, uniform

NODES, EXTRA, JOBS = 5, 15, 11
"""Features of a node as published, further ones, and those of a job; `Simulator` tells them."""
USUAL = ((0, 2), (2, 2), (4, 2), (4, 1), (4, 0))
"""Levels and waves of the usual durations that are told of a stage: 5, 20 and 50 executors; first and fresh tasks."""
DECISION = 7
"""Columns of what `step` tells of a decision."""


def allocate(episodes: int, jobs: int, stages: int, executors: int, tasks: int, hashed: bool) -> Episode:
    """Make the arrays of N episodes; ``tasks`` rows of the tape, 0 to write none."""
    pools = 1 + jobs + stages
    table = capacity(executors) if hashed else 0
    return Episode(
        glob=np.zeros((episodes, GLOB), np.int64),
        clock=np.zeros((episodes, 1)),
        jobs=np.zeros((episodes, jobs, JOB), np.int64),
        times=np.zeros((episodes, jobs, TIME)),
        active=np.zeros((episodes, jobs), np.int64),
        stages=np.zeros((episodes, stages, STAGE), np.int64),
        recent=np.zeros((episodes, stages)),
        executors=np.zeros((episodes, executors, EXECUTOR), np.int64),
        due=np.zeros((episodes, executors)),
        task=np.zeros((episodes, executors, 2)),
        heap=np.zeros((episodes, executors), np.int64),
        pools=np.zeros((episodes, pools, 2), np.int64),
        commitments=np.zeros((episodes, 2 * executors + 2, 3), np.int64),
        choices=np.zeros((episodes, stages), np.int64),
        twister=np.zeros((episodes, 625), np.int64),
        tables=np.zeros((episodes, pools + 2 if hashed else 1, table), np.int16),
        shapes=np.zeros((episodes, pools + 2 if hashed else 1, 3), np.int64),
        tape=np.zeros((episodes, tasks, TAPE)),
        idle=np.zeros((episodes, executors), np.int64),
    )


@njit()
def pick(all_episodes: Episode, i: int) -> Episode:
    """One of many episodes."""
    a = all_episodes
    return Episode(
        a.glob[i], a.clock[i], a.jobs[i], a.times[i], a.active[i], a.stages[i], a.recent[i], a.executors[i], a.due[i],
        a.task[i], a.heap[i], a.pools[i], a.commitments[i], a.choices[i], a.twister[i], a.tables[i], a.shapes[i],
        a.tape[i], a.idle[i],
    )  # fmt: skip


@njit()
def start(
    ep: Episode, plan: Plan, stage_start: Ints, num_tasks: Ints, rough: Floats, templates: Ints, seed: int
) -> None:
    """Begin an episode: all executors are in the common pool, and the jobs of time zero arrive.

    Args:
        ep: Its arrays, with arrival times filled in.
        plan: Workload and rules.
        stage_start: Of the workload.
        num_tasks: Of the workload.
        rough: Rough durations of the workload, ms.
        templates: (J,) templates of the jobs.
        seed: Of the counted random stream.
    """
    ep.glob[:] = 0
    ep.glob[SEED] = seed
    ep.clock[0] = 0.0
    ep.times[:, COMPLETED] = np.inf
    base = 0
    for j in range(len(templates)):
        first, end = stage_start[templates[j]], stage_start[templates[j] + 1]
        row = ep.jobs[j]
        row[SUPPLY], row[LOCAL] = 0, 0
        row[UNSTARTED], row[INCOMPLETE], row[STAGES] = end - first, end - first, end - first
        row[BASE], row[TEMPLATE] = base, templates[j]
        ep.times[j, WORK] = 0.0
        for profile in range(first, end):
            stage = ep.stages[base + profile - first]
            parents = plan.parent_start[profile + 1] - plan.parent_start[profile]
            stage[OWNER], stage[PROFILE] = j, profile
            stage[REMAINING], stage[UNFINISHED] = num_tasks[profile], num_tasks[profile]
            stage[MOVING], stage[COMMITTED], stage[PICKED] = 0, 0, NONE
            stage[OPEN], stage[WAITING] = parents, parents
            ep.recent[base + profile - first] = rough[profile]
            ep.times[j, WORK] += num_tasks[profile] * rough[profile]
        base += end - first
    ep.executors[:] = 0
    ep.executors[:, POOL], ep.executors[:, HOME], ep.executors[:, LAST] = COMMON, NONE, NONE
    ep.pools[:] = 0
    ep.pools[COMMON, SIZE] = len(ep.executors)
    if ep.tables.shape[1] > 0:
        ep.tables[:] = EMPTY
        ep.shapes[:] = 0
        ep.shapes[:, 2] = 7
        for e in range(len(ep.executors)):
            add(ep.tables[COMMON], ep.shapes[COMMON], e, ep.tables[-1])
    ep.glob[SOURCE] = COMMON
    while ep.glob[ARRIVED] < len(ep.jobs) and ep.times[ep.glob[ARRIVED], ARRIVAL] <= 0:
        arrive(ep)
    find_choices(ep, plan)


@njit(nogil=True)
def start_all(episodes, plan, stage_start, num_tasks, rough, templates, seeds):  # type: ignore[no-untyped-def]
    """Begin all episodes; templates (N, J)."""
    for i in range(len(seeds)):
        start(pick(episodes, i), plan, stage_start, num_tasks, rough, templates[i], seeds[i])


@njit()
def step(ep, plan, k, count):  # type: ignore[no-untyped-def]
    """Take a decision and let time pass to the next one; return the job-milliseconds that have passed."""
    before = ep.clock[0]
    first = ep.active[0] if ep.glob[ACTIVE] > 0 else ep.glob[ARRIVED]
    act(ep, plan, k, count, np.inf)
    return job_time(ep, first, before)


@njit(nogil=True)
def step_all(episodes, plan, actions, rewards, told):  # type: ignore[no-untyped-def]
    """Take a decision in every episode that is not over, (N, 2), and tell what was decided, (N, DECISION).

    Returns:
        0; or, with nothing changed, 1 + the number of an episode in which it is not possible.
    """
    for i in range(len(actions)):
        ep, (k, count) = pick(episodes, i), actions[i]
        choices = ep.glob[CHOICES]
        if choices and not (k == NONE or (0 <= k < choices and 1 <= count <= committable(ep))):
            return 1 + i
    for i in range(len(actions)):
        ep, (k, count) = pick(episodes, i), actions[i]
        rewards[i] = 0.0
        told[i], told[i, 2] = NONE, 0
        if ep.glob[CHOICES] == 0:
            continue
        if k != NONE:
            s = ep.choices[k]
            j = ep.stages[s, OWNER]
            told[i, 0], told[i, 1], told[i, 2] = j, s - ep.jobs[j, BASE], min(count, demand(ep, s))
        told[i, 3], told[i, 4] = pool_job(ep, ep.glob[SOURCE]), committable(ep)
        told[i, 5], told[i, 6] = ep.glob[ACTIVE], ep.glob[CHOICES]
        rewards[i] = -step(ep, plan, k, count)
    return 0


@njit()
def count_all(episodes, plan, counts):  # type: ignore[no-untyped-def]
    """Count nodes, edges, active jobs and schedulable stages of every episode, (N, 4)."""
    for i in range(len(counts)):
        ep = pick(episodes, i)
        counts[i] = 0
        for a in range(ep.glob[ACTIVE]):
            row = ep.jobs[ep.active[a]]
            counts[i, 0] += row[INCOMPLETE]
            for s in range(row[BASE], row[BASE] + row[STAGES]):
                if ep.stages[s, UNFINISHED] > 0:
                    profile = ep.stages[s, PROFILE]
                    counts[i, 1] += plan.child_start[profile + 1] - plan.child_start[profile]
        counts[i, 2], counts[i, 3] = ep.glob[ACTIVE], ep.glob[CHOICES]


@njit()
def observe(ep, plan, nodes, extra, edges, heights, job_nodes, jobs, caps, stages, limits):  # type: ignore[no-untyped-def]
    """Fill the arrays of one episode; see `Simulator`.

    All descendants of an incomplete stage are incomplete, so that all edges from it are edges of the observation.
    """
    executors, free = len(ep.executors), committable(ep)
    source = pool_job(ep, ep.glob[SOURCE])
    soonest, total = np.full(len(ep.recent), np.inf), np.zeros(len(ep.recent))
    for at in range(ep.glob[PENDING]):
        e = ep.heap[at]
        if ep.executors[e, BUSY]:
            s, left = ep.executors[e, TARGET], expected(ep, e) - ep.clock[0]
            soonest[s] = min(soonest[s], left)
            total[s] += left
    node = edge = choice = 0
    number = np.empty(64, np.int64)
    for a in range(ep.glob[ACTIVE]):
        j = ep.active[a]
        row = ep.jobs[j]
        cap = free if j == source else min(max(executors - row[SUPPLY], 0), free)
        begin, work, remaining, free_soon = node, 0.0, 0, np.inf
        if row[STAGES] > len(number):
            number = np.empty(row[STAGES], np.int64)
        for s in range(row[BASE], row[BASE] + row[STAGES]):
            stage = ep.stages[s]
            if stage[UNFINISHED] == 0:
                continue
            number[s - row[BASE]] = node
            left, recent = stage[REMAINING], ep.recent[s]
            nodes[node, 0] = cap / executors
            nodes[node, 1] = 1.0 if j == source else -1.0
            nodes[node, 2] = row[SUPPLY] / executors
            nodes[node, 3] = left / 200.0
            nodes[node, 4] = left * recent / 1e5
            wanted = choice < ep.glob[CHOICES] and ep.choices[choice] == s
            if wanted:
                stages[choice], limits[choice] = node, min(free, demand(ep, s))
                choice += 1
            extra[node, 0], extra[node, 1], extra[node, 2] = recent / 1e3, left, stage[UNFINISHED] - left
            extra[node, 3], extra[node, 4], extra[node, 5] = stage[MOVING], stage[COMMITTED], demand(ep, s)
            extra[node, 6], extra[node, 7] = stage[WAITING], wanted
            running = stage[UNFINISHED] - left
            extra[node, 8] = soonest[s] / 1e3 if running > 0 and soonest[s] < np.inf else 0.0
            extra[node, 9] = total[s] / running / 1e3 if running > 0 else 0.0
            for k in range(len(USUAL)):
                usual = plan.medians[stage[PROFILE], USUAL[k][0], USUAL[k][1]]
                extra[node, 10 + k] = (recent if np.isnan(usual) else usual) / 1e3
            free_soon = min(free_soon, soonest[s])
            heights[node] = plan.height[stage[PROFILE]]
            work += left * recent / 1e3
            remaining += left
            node += 1
        for s in range(row[BASE], row[BASE] + row[STAGES]):
            if ep.stages[s, UNFINISHED] > 0:
                profile = ep.stages[s, PROFILE]
                for c in range(plan.child_start[profile], plan.child_start[profile + 1]):
                    edges[edge, 0], edges[edge, 1] = number[s - row[BASE]], number[plan.children[c]]
                    edge += 1
        job_nodes[a], caps[a] = node - begin, cap
        told = jobs[a]
        told[0], told[1], told[2], told[3] = row[SUPPLY], row[LOCAL], cap, j == source
        told[4], told[5], told[6], told[7] = work, remaining, row[INCOMPLETE], row[UNSTARTED]
        told[8], told[9] = (ep.clock[0] - ep.times[j, ARRIVAL]) / 1e3, ep.pools[1 + j, SIZE]
        told[10] = free_soon / 1e3 if free_soon < np.inf else 0.0


@njit(nogil=True)
def observe_all(  # type: ignore[no-untyped-def]
    episodes, plan, ends, nodes, extra, edges, heights, job_nodes, jobs, caps, stages, limits, numbers
):  # fmt: skip
    """Fill the arrays of all episodes, one behind the other; ends (N + 1, 4) says where each begins and ends.

    ``numbers`` (N, 3) gets the executors to assign, the place of the source job among the active ones, and now, ms.
    """
    for i in range(len(numbers)):
        ep = pick(episodes, i)
        (n, e, j, k), (n1, e1, j1, k1) = ends[i], ends[i + 1]
        observe(
            ep, plan, nodes[n:n1], extra[n:n1], edges[e:e1], heights[n:n1], job_nodes[j:j1], jobs[j:j1], caps[j:j1],
            stages[k:k1], limits[k:k1],
        )  # fmt: skip
        source = pool_job(ep, ep.glob[SOURCE])
        numbers[i, 0], numbers[i, 1], numbers[i, 2] = committable(ep), NONE, ep.clock[0]
        for a in range(ep.glob[ACTIVE]):
            if ep.active[a] == source:
                numbers[i, 1] = a


@njit()
def uniforms(episodes, published, drawn):  # type: ignore[no-untyped-def]
    """Draw one number from the stream of every episode that is not over, (N,)."""
    for i in range(len(drawn)):
        ep = pick(episodes, i)
        if ep.glob[CHOICES]:
            drawn[i] = uniform(ep.twister) if published else counted(ep)
