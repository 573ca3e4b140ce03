"""What one episode of the cluster simulator holds, as arrays for numba kernels.

Numbers of things are int64 rows whose columns are named here; times are float64 milliseconds. Pools of executors are
numbered: 0 is the common pool, 1 + j the pool of job j, 1 + J + s that of stage s (J jobs; stages are numbered through
all jobs of the episode). Shapes: J jobs, S stages, E executors, P = 1 + J + S pools.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from netllm_pl.kernels import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Small = npt.NDArray[np.int16]

NONE = -1
"""No pool, job or stage."""
COMMON = 0
"""Number of the common pool."""

# Columns of `Episode.glob`.
SOURCE, ROUND, ACTIVE, ARRIVED, PENDING, SEQUENCE, COMMITMENTS, DONE, CHOICES, STARTED, OFFER, SEED, DRAWS = range(13)
GLOB = 13
# Columns of `Episode.jobs`.
SUPPLY, LOCAL, UNSTARTED, INCOMPLETE, BASE, STAGES, TEMPLATE = range(7)
JOB = 7
# Columns of `Episode.stages`.
OWNER, PROFILE, REMAINING, UNFINISHED, MOVING, COMMITTED, OPEN, WAITING, PICKED = range(9)
STAGE = 9
# Columns of `Episode.executors`.
POOL, HOME, LAST, BUSY, TARGET, ORDER = range(6)
EXECUTOR = 6
# Columns of `Episode.pools`.
SIZE, PROMISED = range(2)
TAPE = 9
"""Columns of `Episode.tape`."""
# Columns of `Episode.times`.
ARRIVAL, COMPLETED, WORK = range(3)
TIME = 3


class Episode(NamedTuple):
    """Arrays of one episode, or with an axis in front, of many.

    Attributes:
        glob: (GLOB,) SOURCE pool whose executors are assigned; ROUND stamp of the current round; ACTIVE jobs; ARRIVED
            jobs; PENDING events of executors; SEQUENCE number of the next event; COMMITMENTS entries; DONE jobs;
            CHOICES: schedulable stages; STARTED tasks; OFFER: whether stages got ready that the common pool was not
            offered; SEED and DRAWS of the counted random stream.
        clock: (1,) now, ms.
        jobs: (J, JOB) SUPPLY of executors; LOCAL ones; UNSTARTED stages (with tasks that were not started);
            INCOMPLETE stages; BASE: number of its first stage; STAGES; TEMPLATE in the workload.
        times: (J, TIME) ARRIVAL and COMPLETED, ms; the latter infinite until then. WORK of all tasks by their rough
            durations, executor-ms.
        active: (J,) numbers of active jobs, by arrival.
        stages: (S, STAGE) OWNER job; PROFILE: number of the stage in the workload; REMAINING tasks that were not
            started; UNFINISHED tasks; executors MOVING and COMMITTED to it; OPEN parents, that want executors; WAITING:
            parents that are not complete; PICKED: stamp of the round in which it was chosen last.
        recent: (S,) most recent duration of a task, ms.
        executors: (E, EXECUTOR) POOL, or NONE on the way; HOME job; LAST stage, NONE if fresh; BUSY; TARGET stage of
            its event; ORDER of its event.
        due: (E,) when its event happens, ms.
        task: (E, 2) when its last task began, ms, and how long such tasks take, ms: what is known of `due`.
        heap: (E,) executors with events, as a binary heap.
        pools: (P, 2) SIZE and PROMISED executors.
        commitments: (2 E + 2, 3) from pool, to pool, executors; in order of their making.
        choices: (S,) the schedulable stages.
        twister: (625,) state of the Mersenne Twister, and the position in it; unused with other streams.
        tables: (P + 2, T) hash tables of the pools' executor sets, -1 empty and -2 deleted, and room for two; T = 0 if
            sets are ordered.
        shapes: (P + 2, 3) used entries, filled entries and mask of each table.
        tape: (tasks or 0, TAPE) every start of a task: ms, job, stage, executor, local executors, level, wave, whether
            warm-up was added, ms it takes.
        idle: (E,) the executors that were listed last.
    """

    glob: Ints
    clock: Floats
    jobs: Ints
    times: Floats
    active: Ints
    stages: Ints
    recent: Floats
    executors: Ints
    due: Floats
    task: Floats
    heap: Ints
    pools: Ints
    commitments: Ints
    choices: Ints
    twister: Ints
    tables: Small
    shapes: Ints
    tape: Floats
    idle: Ints


_uncounted: dict[str, Any] = {"_nrt": False}
kernel = njit(**_uncounted)
"""Compiles a function that allocates nothing and returns no array. Without counting references to the arrays, episodes
run four times as fast."""
inlined = njit(forceinline=True, **_uncounted)
"""The same for what every event does; twice as fast again."""


class Plan(NamedTuple):
    """The workload and the rules, as kernels read them; see `Workload` and `Rules`.

    Attributes:
        child_start, children, parent_start, parents, height: The DAGs, by stage of the workload; local numbers.
        durations, wave_start, wave_size, medians, level_key: Task durations, ms.
        left, right: (E + 1,) numbers of the levels around a number of executors.
        span: (E + 1, 2) executors above the left level, and between the levels.
        delays: (2,) moving and warm-up, ms.
        switches: (SWITCHES,) see `Rules`.
    """

    child_start: Ints
    children: Ints
    parent_start: Ints
    parents: Ints
    height: Ints
    durations: Floats
    wave_start: Ints
    wave_size: Ints
    medians: Floats
    level_key: Ints
    left: Ints
    right: Ints
    span: Ints
    delays: Floats
    switches: Ints


# Entries of `Plan.switches`.
STREAM, REVERSED, COMMON_WAITS, EARLY, COLD, STALE, NEWEST = range(7)
SWITCHES = 7
# Streams of random numbers.
MEDIAN, MERSENNE, COUNTED = range(3)
