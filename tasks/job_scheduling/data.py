"""Episodes of a cluster and experience as a data module: jobs and rules by name or path, or generated ones.

Shapes: N episodes side by side, J jobs of an episode.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from netllm_pl.episodes import DecisionData, check_split
from netllm_pl.errors import UserError, unknown
from netllm_pl.evaluate import Metric
from netllm_pl.experience import Pool
from netllm_pl.paths import data_root, weights_folder, weights_of
from netllm_pl.recording import Experience
from netllm_pl.rollout import Rollout
from netllm_pl.timing import Work
from tasks.job_scheduling.baselines import NAMES, build
from tasks.job_scheduling.batch import EXTRA, JOBS, NODES
from tasks.job_scheduling.heuristics import adviser
from tasks.job_scheduling.planning import Lookahead, Planner, Valued
from tasks.job_scheduling.simulator import Rules, Simulator
from tasks.job_scheduling.splits import check_seeds, drawn, first_seed, named_workload, place_of
from tasks.job_scheduling.synthetic import SyntheticWorkload
from tasks.job_scheduling.tables import Logged, episode_table, job_table, step_table, task_table
from tasks.job_scheduling.workloads import Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIENCE = Experience(policies="srpt_fair:2,fair", episodes=40, eval_episodes=4, explore=0.1)


class JobSchedulingData(DecisionData):
    """Episodes in which jobs arrive at a cluster, and experience recorded in them.

    Args:
        workload: ``synthetic`` (generated; other jobs in each split); ``tpch`` (data_dir/cjs/tpch.parquet; as
            published, jobs of all splits are drawn from the same 154); or the path of a Parquet file or folder.
        rules: How the cluster runs; the number of jobs and of executors is here.
        deterministic: Task durations are medians, and idle executors go in ascending order: nothing is drawn but the
            jobs.
        test_seeds: Seeds of the test episodes: each draws the jobs, and the durations of their tasks.
        valid_seeds: Those of the validation episodes. Training episodes have other seeds, whatever `collect` draws.
        held_out: Queries of which test episodes draw all their jobs, and no other split any; empty lets all splits draw
            from all queries, as published.
        data_dir: Folder that holds cjs/; else NETLLM_DATA, else where `fetch` puts data.
        weights_dir: Folder of the published Decima weights (decima.npz); null looks for ``weights`` in and beside the
            data's folder.
        synthetic: The generator's settings.
        lookahead: How `rollout` and the values of experience look ahead.
        pool: Folder of training experience that `collect` wrote, or several; null records it as ``experience`` says.
        experience: What to record for training (without a pool), and for the losses of validation and test. Null, for
            learners that play themselves, gives numbers of episodes in place of recorded steps.
        window: Steps of a window of experience.
        stride: Steps between the beginnings of two training windows; null takes the window.
        share: Share of the recorded training episodes that is used.
        sessions: Training episodes of an epoch, for learners that play themselves.
        batch_size: Samples in a training batch, per process.
        eval_batch_size: Samples in a validation or test batch, and episodes played side by side.
        num_workers: Loader processes.
        seed: Seed of the training order.
    """

    baselines: ClassVar[dict[str, Any]] = {name: partial(build, name) for name in NAMES}  # see `policy`
    metrics = (
        Metric("jct_s", "jct_s"),
        Metric("jct_p50_s", "jct_p50_s"),
        Metric("jct_p95_s", "jct_p95_s"),
        Metric("makespan_s", "makespan_s"),
    )
    compared = ("fair", "srpt_fair")
    flags: ClassVar[dict[str, str]] = {"deterministic": "durations are medians, idle executors go in ascending order"}
    own_experience = EXPERIENCE

    def __init__(
        self,
        workload: str = "synthetic",
        rules: Rules = Rules(),  # noqa: B008  # frozen
        deterministic: bool = False,
        test_seeds: Sequence[int] = (1, 2, 3, 4, 5, 666),
        valid_seeds: Sequence[int] = (11, 12, 13, 14),
        held_out: Sequence[int] = (),
        data_dir: str | None = None,
        weights_dir: str | None = None,
        synthetic: SyntheticWorkload = SyntheticWorkload(),  # noqa: B008  # frozen
        lookahead: Lookahead = Lookahead(extra=4),  # noqa: B008  # frozen
        pool: str | list[str] | None = None,
        experience: Experience | None = EXPERIENCE,
        window: int = 20,
        stride: int | None = None,
        share: float = 1.0,
        sessions: int = 1000,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            pool, experience, window, stride, sessions, batch_size, eval_batch_size, num_workers, seed, share
        )
        check_seeds(test_seeds=test_seeds, valid_seeds=valid_seeds)
        self.lookahead, self.adviser = lookahead, adviser(lookahead.scheme)
        self.source, self.synthetic, self.held_out = workload, synthetic, held_out
        self.rules = replace(rules, stream="median", order="ascending") if deterministic else rules
        self.seeds: dict[str, Sequence[int]] = {"test": list(test_seeds), "valid": list(valid_seeds)}
        self.root, self.weights_dir = data_root(data_dir), weights_dir
        self._read: dict[str, Workload] = {}
        if workload != "synthetic":  # tell at once what is not there, before a model is built
            place_of(workload, self.root)

    def workload(self, split: str) -> Workload:
        """Return the jobs of a split, read once."""
        check_split(split)
        if split not in self._read:
            workload = named_workload(self.source, split, self.root, self.synthetic)
            self._read[split] = drawn(workload, split, self.held_out)
        return self._read[split]

    # Playing ----------------------------------------------------------------------------------------------------------

    def simulator(self, split: str, mode: str = "fixed") -> Simulator:
        """Return episodes of a split.

        Args:
            split: train, valid or test.
            mode: ``fixed`` is reset with the seeds of `numbers`; ``random``, as training always, with any numbers,
                which stand for seeds that no config names and no other split has.
        """
        if mode not in ("fixed", "random"):
            raise unknown("mode", mode, ("fixed", "random"))
        first = first_seed(split) if mode == "random" or split == "train" else 0
        return Simulator(self.workload(split), self.rules, first, adviser=self.adviser)

    def logged(self, env: Simulator) -> Simulator:
        """Let a simulator tell of its observations, too."""
        return Logged(env.workload, env.rules, env.first_seed, adviser=env.adviser)

    def policy(self, name: str, split: str = "test") -> Any:
        """Build a policy from its name: a baseline, a checkpoint's path, or a folder."""
        if name == "rollout":
            return Planner(self._planning)
        if name in NAMES:
            return build(name, weights_folder(self.weights_dir, self.root), self.seed)
        return super().policy(name, split)

    def made_of(self, names: Collection[str]) -> dict[str, str]:
        """Hashes of checkpoints and of published weights."""
        return weights_of(names, weights_folder(self.weights_dir, self.root))

    @property
    def _planning(self) -> Lookahead:
        """How `rollout` looks ahead: further candidates are of use for learning only."""
        return replace(self.lookahead, extra=0)

    def label(self, env: Any, values: str) -> Any:
        """Add values of candidate decisions to each step of a simulator."""
        if values != "lookahead":
            raise unknown("kind of action values", values, ("lookahead",))
        return Valued(env, self.lookahead)

    def benchmarks(self) -> dict[str, Work]:
        """List the simulator's speed, and what planning costs."""
        from tasks.job_scheduling.speed import works  # imported late: nothing else needs it

        return works(self.simulator("test"), self._planning)

    def numbers(self, split: str) -> Sequence[int]:
        """Seeds of the validation or test episodes; numbers of the training episodes of an epoch."""
        check_split(split)
        return self.seeds.get(split, range(self.sessions))

    def report(self, played: Rollout, env: Simulator, numbers: Sequence[int], steps: bool) -> dict[str, pd.DataFrame]:
        """Turn what happened into tables, with the column names of the published program's logs.

        Returns:
            ``episodes``: completion times in s, clustered by seed; ``jobs``: one row a job; and with steps ``steps``:
            one row a decision; and of a simulator with a tape ``tasks``: one row a task of the first episode.
        """
        tables = {"episodes": episode_table(played, env, numbers), "jobs": job_table(env, numbers)}
        tables |= {"tasks": task_table(env, numbers)} if env.taped else {}
        return tables | ({"steps": step_table(played, env, numbers)} if steps else {})

    def watching(self) -> tuple[bool, Simulator]:
        """Let `watch` tell also of every task of the first episode: ``tasks``."""
        plain = self.simulator("valid")
        return False, Simulator(plain.workload, plain.rules, plain.first_seed, tape=True, adviser=plain.adviser)

    def figures(self, watched: dict[str, dict[str, pd.DataFrame]]) -> "dict[str, Figure]":
        """Draw schedules of one episode, the jobs in the system over its time, and all completion times."""
        from tasks.job_scheduling.figures import draw_completion, draw_gantt, draw_load  # imported late: matplotlib

        jobs = {name: tables["jobs"] for name, tables in watched.items()}
        first = {name: tables["tasks"] for name, tables in watched.items()}  # of each batch, or share of a process
        schedules = draw_gantt({name: rows[rows["episode"] == rows["episode"].min()] for name, rows in first.items()})
        return {"schedule": schedules, "jobs_in_system": draw_load(jobs), "completion": draw_completion(jobs)}

    # Experience -------------------------------------------------------------------------------------------------------

    def fitting(self, pool: Pool) -> Pool:
        """Return a pool whose steps hold the features of today's observations."""
        for name, width in (("nodes", NODES), ("extra", EXTRA), ("jobs", JOBS)):
            if name not in pool.columns or pool.columns[name].inner != (width,):
                raise UserError(
                    f"the pool {pool.folder} has no column {name} of {width} features a row; collect it anew"
                )
        return pool

    def content(self, split: str) -> str:
        """Hash of what episodes, and what is looked ahead in them, depend on."""
        workload = self.workload(split)
        digest = hashlib.sha256(repr((self.rules, self.lookahead)).encode())
        for field in fields(workload):
            digest.update(np.ascontiguousarray(getattr(workload, field.name)).tobytes())
        return digest.hexdigest()
