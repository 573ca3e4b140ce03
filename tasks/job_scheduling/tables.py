"""What is told of episodes that were played: tables whose columns are called as in the published program's logs."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from netllm_pl.rollout import Array, Rollout
from tasks.job_scheduling.simulator import Observations, Simulator

SUMS = ("n_nodes", "n_edges", "exec_mask_sum", "fsum0", "fsum1", "fsum2", "fsum3", "fsum4")
STEP_COLUMNS = (
    "wall_time_ms", "stage_idx", "num_exec", "num_committable", "sel_job_id", "sel_stage_id", "num_exec_committed",
    "source_job_id", "n_active_jobs", "n_schedulable", *SUMS, "reward",
)  # fmt: skip


class Logged(Simulator):
    """A simulator that also tells at every step how large the observation was, and sums over it (`SUMS`)."""

    def step(self, actions: Array) -> tuple[Observations, Array, Array, Observations]:
        """Take a decision in every episode; see `Simulator`."""
        seen = self.observations
        nodes, edges, caps = (seen[name] for name in ("nodes", "edges", "caps"))
        sums = [
            [len(nodes[i]), len(edges[i]), caps[i].sum(), *nodes[i].sum(0, dtype=np.float64)] for i in range(len(nodes))
        ]
        observations, rewards, over, info = super().step(actions)
        return observations, rewards, over, info | dict(zip(SUMS, np.array(sums).T, strict=True))


def job_table(env: Simulator, numbers: Sequence[int]) -> pd.DataFrame:
    """Tell of every job of the episodes that were played last.

    Returns:
        ``episode`` and ``seed``, and the columns of `Simulator.jobs`; times in ms.
    """
    jobs = env.jobs()
    size = jobs["job_id"].shape[1]
    where = {"episode": np.repeat(numbers, size), "seed": np.repeat(env.first["seed"], size)}
    return pd.DataFrame(where | {name: values.ravel() for name, values in jobs.items()})


def task_table(env: Simulator, numbers: Sequence[int]) -> pd.DataFrame:
    """Tell of every task of the first of the episodes played last: ``episode`` and the columns of `Simulator.tape`."""
    return pd.DataFrame({"episode": numbers[0]} | env.tape(0))


def episode_table(played: Rollout, env: Simulator, numbers: Sequence[int]) -> pd.DataFrame:
    """Tell of every episode: completion times of its jobs, their makespan, all in s; decisions; clustered by seed."""
    jobs = env.jobs()
    jct_s = (jobs["t_completed_ms"] - jobs["t_arrival_ms"]) / 1000.0
    seeds = env.first["seed"]
    return pd.DataFrame(
        {
            "episode": numbers,
            "seed": seeds,
            "cluster": seeds,
            "jct_s": jct_s.mean(1),
            "jct_p50_s": np.percentile(jct_s, 50, axis=1),
            "jct_p95_s": np.percentile(jct_s, 95, axis=1),
            "makespan_s": (jobs["t_completed_ms"].max(1) - jobs["t_arrival_ms"].min(1)) / 1000.0,
            "decisions": played.alive.sum(0),
        }
    )


def step_table(played: Rollout, env: Simulator, numbers: Sequence[int]) -> pd.DataFrame:
    """Tell of every decision: ``episode``, ``seed``, ``step`` and `STEP_COLUMNS`; the reward in ms.

    Args:
        played: N episodes that were played in a `Logged` simulator.
        env: That simulator.
        numbers: (N,) numbers of the episodes.
    """
    alive = played.alive.T
    told = {"stage_idx": played.actions[..., 0], "num_exec": played.actions[..., 1], "reward": played.rewards * 1000.0}
    told |= played.info
    counts = alive.sum(1)

    def steps(name: str) -> npt.NDArray[np.generic]:
        values = told[name].T[alive]  # episode by episode
        return values.astype(np.int64) if name in SUMS[:3] else values

    where = {"episode": np.repeat(numbers, counts), "seed": np.repeat(env.first["seed"], counts)}
    return pd.DataFrame(where | {"step": np.nonzero(alive)[1]} | {name: steps(name) for name in STEP_COLUMNS})
