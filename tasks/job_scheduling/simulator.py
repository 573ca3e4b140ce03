"""Cluster simulator: jobs arrive as a Poisson process, executors are given to their stages; numpy and numba only.

The rules are those of spark-sched-sim as NetLLM runs it; `tasks.job_scheduling.engine` holds them. Shapes: N episodes;
M nodes (incomplete stages of active jobs), E edges, J active jobs, K schedulable stages of one of them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError

from tasks.job_scheduling.batch import (  # isort: skip
    DECISION, EXTRA, JOBS, NODES, allocate, count_all, observe_all, start_all, step_all, uniforms,
)  # fmt: skip
from tasks.job_scheduling.state import (  # isort: skip
    ARRIVAL, CHOICES, COMPLETED, COUNTED, MEDIAN, MERSENNE, STAGES, STARTED, TEMPLATE, Episode, Ints, Plan,
)  # fmt: skip
from tasks.job_scheduling.workloads import LEVELS, Workload

Observations = dict[str, npt.NDArray[Any]]
STREAMS = {"published": MERSENNE, "counted": COUNTED, "median": MEDIAN}
EXTRA_FEATURES = (
    "recent_s", "remaining", "running", "moving", "committed", "demand", "waiting_parents", "schedulable",
    "first_end_s", "mean_end_s", "usual_5_s", "usual_20_s", "usual_50_s", "usual_first_s", "usual_fresh_s",
)  # fmt: skip
"""Times to the end of running tasks are expected ones. Usual durations are medians of the profile, by executors; tasks
of an executor that comes from another stage (first) or is new to the job (fresh) are those with 50."""
JOB_FEATURES = (
    "supply", "local", "cap", "is_source", "work_s", "remaining", "incomplete", "unstarted", "age_s", "idle",
    "first_end_s",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """How a cluster runs; the defaults are the published ones, with their quirks.

    Attributes:
        jobs: Jobs of an episode.
        executors: Executors of the cluster.
        arrival_rate: Jobs per millisecond.
        moving_delay_ms: Time an executor takes to another job.
        warmup_ms: Added to a first task where the profiles have no measurement of one.
        stream: Where task durations are drawn from: ``published``, as Python's ``random`` does when it is seeded after
            the reset; ``counted``, a faster stream; ``median``, no draw at all: lower medians, and the level between
            two that is as likely as not.
        order: Which of several idle executors goes first: ``hash``, as CPython's sets give them; ``ascending``.
        reversed_levels: With n executors between two levels, the farther one is the likelier. Mended: the nearer.
        common_waits: Executors in the common pool are offered at arrivals only. Mended: also when the last parent of a
            stage is complete.
        early_commitment: Executors may be given to stages whose parents still run. Mended: not.
        cold_release: An executor that nothing was decided for forgets its stage. Mended: it stays warm.
        stale_supply: Executors that leave a finishing job still count as its supply. Mended: not.
        newest_backup: An executor that comes too late helps the newest job. Mended: the oldest.
    """

    jobs: int = 200
    executors: int = 50
    arrival_rate: float = 4e-5
    moving_delay_ms: float = 2000.0
    warmup_ms: float = 1000.0
    stream: Literal["published", "counted", "median"] = "published"
    order: Literal["hash", "ascending"] = "hash"
    reversed_levels: bool = True
    common_waits: bool = True
    early_commitment: bool = True
    cold_release: bool = True
    stale_supply: bool = True
    newest_backup: bool = True

    def __post_init__(self) -> None:
        """Refuse rules that no cluster can run by.

        Raises:
            UserError: A value is out of its range.
        """
        for name, fits, expected in (
            ("jobs", 1 <= self.jobs <= 100_000, "1 to 100000"),
            ("executors", 1 <= self.executors <= 5000, "1 to 5000"),
            ("arrival_rate", 0 < self.arrival_rate < np.inf, "jobs per millisecond, above 0"),
            ("moving_delay_ms", 0 <= self.moving_delay_ms < np.inf, "0 or more milliseconds"),
            ("warmup_ms", 0 <= self.warmup_ms < np.inf, "0 or more milliseconds"),
            ("stream", self.stream in STREAMS, f"one of {', '.join(STREAMS)}"),
            ("order", self.order in ("hash", "ascending"), "hash or ascending"),
        ):
            if not fits:
                raise UserError(f"rules.{name} is {getattr(self, name)}; expected {expected}")


def plan_of(workload: Workload, rules: Rules) -> Plan:
    """Put a workload and rules together for the kernels."""
    levels = np.array(LEVELS)
    counts = np.arange(rules.executors + 1)
    right = np.minimum(np.searchsorted(levels, counts), len(levels) - 1)  # the first level that is not below
    between = (counts < levels[right]) & (counts > levels[0])
    left = right - between
    return Plan(
        child_start=workload.child_start,
        children=workload.children,
        parent_start=workload.parent_start,
        parents=workload.parents,
        height=workload.height,
        durations=workload.durations,
        wave_start=workload.wave_start,
        wave_size=workload.wave_size,
        medians=workload.medians,
        level_key=workload.level_key,
        left=left.astype(np.int64),
        right=right.astype(np.int64),
        span=np.stack([counts - levels[left], levels[right] - levels[left]], axis=1).astype(np.int64),
        delays=np.array([rules.moving_delay_ms, rules.warmup_ms]),
        switches=np.array(
            [
                STREAMS[rules.stream], rules.reversed_levels, rules.common_waits, rules.early_commitment,
                rules.cold_release, rules.stale_supply, rules.newest_backup,
            ],
            np.int64,
        ),
    )  # fmt: skip


class Simulator:
    """Episodes side by side: the `Environment` of this task.

    Observations, arrays by name; those whose length differs are object arrays (N,) of arrays:
        nodes (M, 5) float32: features of incomplete stages of active jobs, as Decima sees them: executors that the job
            may get now, of all; 1 if executors leave it, else -1; its supply of executors, of all; remaining tasks /
            200; remaining tasks x most recent duration / 100 s.
        extra (M, 15) float32: `EXTRA_FEATURES`.
        edges (E, 2) int32: parent and child, as numbers of nodes.
        heights (M,) int16: longest path to a sink, in edges.
        job_nodes (J,) int16: nodes of each active job, by arrival; the nodes of a job are neighbours.
        jobs (J, 11) float32: `JOB_FEATURES`.
        caps (J,) int16: executors that the job may get now.
        stages (K,) int16: the schedulable stages, as numbers of nodes, ascending.
        limits (K,) int16: executors that each of them can use, at most.
        committable (N,) int64: executors that are assigned.
        source (N,) int64: the job that they leave, as a number among the active ones; -1 if none.
        time_s (N,) float64: now.
        reward (N,) float64: of the last action.

    An action (N, 2) gives ``executors``, 1 to committable, to the stage number ``k`` of ``stages``; more than it can
    use stay free. k = -1 leaves the rest where it is. The reward is the negative time that jobs have spent in the
    system since the last decision, job-seconds; its sum is the negative sum of completion times.

    Args:
        workload: The jobs there are.
        rules: How the cluster runs.
        first_seed: Added to the seeds of episodes, so that those of two splits differ.
        tape: Keep every start of a task (`tape`).
        adviser: Fills in decisions (N, 2), which observations then hold as ``advice`` (N, 2) int64, such as those of a
            hand-written scheduler (`tasks.job_scheduling.heuristics.adviser`).

    Attributes:
        first: What `reset` tells of each episode: ``seed`` (N,).
    """

    def __init__(
        self,
        workload: Workload,
        rules: Rules | None = None,
        first_seed: int = 0,
        tape: bool = False,
        adviser: Callable[[Episode, Ints], object] | None = None,
    ) -> None:
        self.workload, self.rules, self.first_seed, self.taped = workload, rules or Rules(), first_seed, tape
        self.adviser = adviser
        self.plan = plan_of(workload, self.rules)
        self.table = workload.table
        self.first: Observations = {}

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start one episode for each seed; return observations."""
        seeds = [int(seed) + self.first_seed for seed in seeds]
        jobs = [self._sequence(seed) for seed in seeds]
        templates = np.array([episode[0] for episode in jobs])
        workload, rules = self.workload, self.rules
        stages = np.diff(workload.stage_start)[templates].sum(1)
        totals = np.add.reduceat(workload.num_tasks, workload.stage_start[:-1])
        tasks = int(totals[templates].sum(1).max()) if self.taped else 0
        hashed = rules.order == "hash"
        self.episodes = allocate(len(seeds), rules.jobs, int(stages.max()), rules.executors, tasks, hashed)
        self.episodes.times[:, :, ARRIVAL] = [episode[1] for episode in jobs]
        if rules.stream == "published":
            self.episodes.twister[:] = [random.Random(seed).getstate()[1] for seed in seeds]
        start_all(
            self.episodes, self.plan, workload.stage_start, workload.num_tasks, workload.rough_ms, templates,
            np.array([seed % 2**63 for seed in seeds], np.int64),
        )  # fmt: skip
        self.first = {"seed": np.array(seeds)}
        self.observations: Observations = {}
        self.decisions = np.zeros(len(seeds), np.int64)
        return self._observe(np.zeros(len(seeds)))

    def step(self, actions: npt.NDArray[Any]) -> tuple[Observations, npt.NDArray[Any], npt.NDArray[Any], Observations]:
        """Take a decision in every episode that is not over, and let time pass until the next one.

        Args:
            actions: (N, 2) k and executors.

        Returns:
            Observations, rewards (N,), which episodes are over (N,), and what was decided, arrays (N,):
            ``wall_time_ms``, ``sel_job_id``, ``sel_stage_id`` (-1 if none), ``num_exec_committed``,
            ``source_job_id``, ``num_committable``, ``n_active_jobs``, ``n_schedulable``.

        Raises:
            UserError: An action is not possible.
        """
        actions = np.ascontiguousarray(actions, np.int64)
        count = len(self.decisions)
        if actions.shape != (count, 2):
            raise UserError(f"actions have shape {actions.shape}; expected ({count}, 2): stage and executors")
        now = self.episodes.clock[:, 0].copy()
        rewards, told = np.empty(count), np.empty((count, DECISION), np.int64)
        wrong = step_all(self.episodes, self.plan, actions, rewards, told)
        if wrong:
            k, executors = actions[wrong - 1]
            seen = self.observations
            raise UserError(
                f"episode {wrong - 1}: stage {k} with {executors} executors is not possible; expected -1 to "
                f"{len(seen['stages'][wrong - 1]) - 1} and 1 to {seen['committable'][wrong - 1]}"
            )
        rewards /= 1000.0
        names = (
            "sel_job_id", "sel_stage_id", "num_exec_committed", "source_job_id", "num_committable", "n_active_jobs",
            "n_schedulable",
        )  # fmt: skip
        info: Observations = {"wall_time_ms": now} | {name: told[:, k] for k, name in enumerate(names)}
        observations = self._observe(rewards)
        return observations, rewards, self.over, info

    @property
    def over(self) -> npt.NDArray[np.bool_]:
        """Which episodes are over (N,)."""
        over: npt.NDArray[np.bool_] = self.episodes.glob[:, CHOICES] == 0
        return over

    def sample(self, observations: Observations, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw a schedulable stage and a number of executors for every episode, each with the same probability."""
        counts = np.array([max(1, len(stages)) for stages in observations["stages"]])
        return np.stack([rng.integers(counts), 1 + rng.integers(np.maximum(observations["committable"], 1))], axis=1)

    def uniforms(self) -> npt.NDArray[np.float64]:
        """Draw one number in [0, 1) from the stream of every episode that is not over (N,); 0 for the others."""
        drawn = np.zeros(len(self.decisions))
        uniforms(self.episodes, self.rules.stream == "published", drawn)
        return drawn

    def jobs(self) -> Observations:
        """Tell of all jobs of all episodes, arrays (N, J): arrival and completion, ms, size, query, stages, tasks."""
        ep, workload = self.episodes, self.workload
        template = ep.jobs[:, :, TEMPLATE]
        totals = np.add.reduceat(workload.num_tasks, workload.stage_start[:-1])
        return {
            "job_id": np.broadcast_to(np.arange(template.shape[1]), template.shape),
            "t_arrival_ms": ep.times[:, :, ARRIVAL],
            "t_completed_ms": ep.times[:, :, COMPLETED],
            "query_size": np.asarray(workload.sizes)[template],
            "query_num": workload.queries[template],
            "num_stages": ep.jobs[:, :, STAGES],
            "num_tasks": totals[template],
        }

    def tape(self, episode: int) -> Observations:
        """Tell of every start of a task of an episode so far, arrays (tasks,), if the simulator was made to."""
        rows = self.episodes.tape[episode, : self.episodes.glob[episode, STARTED]]
        whole = rows.astype(np.int64)
        return {
            "t_start_ms": rows[:, 0],
            "job_id": whole[:, 1],
            "stage_id": whole[:, 2],
            "executor_id": whole[:, 3],
            "num_local_execs": whole[:, 4],
            "level_key": whole[:, 5],
            "wave": np.array(("fresh_durations", "first_wave", "rest_wave"))[whole[:, 6]],
            "warmup_added": rows[:, 7] > 0,
            "duration_ms": rows[:, 8],
        }

    def _sequence(self, seed: int) -> tuple[list[int], list[float]]:
        """Draw templates and arrival times, ms, as Gymnasium's generator of that seed gives them."""
        rng = np.random.default_rng(seed)
        sizes, queries = self.table.shape
        templates, arrivals, now = [], [], 0.0
        for _ in range(self.rules.jobs):
            query = int(rng.integers(queries))
            templates.append(int(self.table[int(rng.integers(sizes)), query]))
            arrivals.append(now)
            now += rng.exponential(1 / self.rules.arrival_rate)
        return templates, arrivals

    def _observe(self, rewards: npt.NDArray[Any]) -> Observations:
        """Say what is seen; of an episode that is over, what was seen last."""
        count = len(rewards)
        counts = np.empty((count, 4), np.int64)
        count_all(self.episodes, self.plan, counts)
        ends = np.zeros((count + 1, 4), np.int64)
        np.cumsum(counts, axis=0, out=ends[1:])
        m, e, j, k = ends[-1]
        flat = {
            "nodes": np.empty((m, NODES), np.float32),
            "extra": np.empty((m, EXTRA), np.float32),
            "edges": np.empty((e, 2), np.int32),
            "heights": np.empty(m, np.int16),
            "job_nodes": np.empty(j, np.int16),
            "jobs": np.empty((j, JOBS), np.float32),
            "caps": np.empty(j, np.int16),
            "stages": np.empty(k, np.int16),
            "limits": np.empty(k, np.int16),
        }
        numbers = np.empty((count, 3))
        observe_all(self.episodes, self.plan, ends, *flat.values(), numbers)
        kinds = {"nodes": 0, "extra": 0, "edges": 1, "heights": 0, "job_nodes": 2, "jobs": 2, "caps": 2}
        seen: Observations = {}
        for name, values in flat.items():
            bounds = ends[:, kinds.get(name, 3)].tolist()
            seen[name] = ragged = np.empty(count, object)
            for i in range(count):
                ragged[i] = values[bounds[i] : bounds[i + 1]]
        seen["committable"], seen["source"] = numbers[:, 0].astype(np.int64), numbers[:, 1].astype(np.int64)
        seen["time_s"], seen["reward"] = numbers[:, 2] / 1000.0, rewards
        if self.adviser is not None:
            seen["advice"] = np.empty((count, 2), np.int64)
            self.adviser(self.episodes, seen["advice"])
        over = np.flatnonzero(counts[:, 3] == 0).tolist()
        for i in over if self.observations else ():
            for name in (*flat, "committable", "source"):
                seen[name][i] = self.observations[name][i]
        self.observations = seen
        return seen
