"""One episode of a cluster with Gymnasium's interface."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tasks.job_scheduling.batch import EXTRA, JOBS, NODES
from tasks.job_scheduling.simulator import Observations, Rules, Simulator
from tasks.job_scheduling.workloads import Workload

KEPT = ("stages", "limits", "heights")


class JobSchedulingEnv(gymnasium.Env[dict[str, Any], dict[str, Any]]):
    """An episode of the `Simulator`: an action gives executors to a schedulable stage.

    Observations, which `Simulator` explains (M incomplete stages, E edges, J active jobs):
        graph: A `GraphInstance`: nodes (M, 13), the features `nodes` and then `extra`; edge_links (E, 2), parent and
            child; edges (E,), all 0, as edges have no features.
        jobs: (J, 10); the nodes of a job are neighbours, and its feature `incomplete` says how many there are.
        committable: Executors that are assigned.
        source: Number of the job that they leave, among the active ones; -1 if none.
        time_s, reward: Now, and the reward of the last action, job-seconds.

    An action is ``stage_idx``, -1 (rest) or a number among the K schedulable stages, and ``num_exec``, 1 to
    committable. The bounds of the action space follow the observation: whatever is drawn from it is possible. ``info``
    holds ``stages`` (K,), the schedulable stages as numbers of nodes; ``limits`` (K,), the most executors that each can
    use; ``heights`` (M,), longest paths to a sink; and after a step what was decided, as `Simulator.step` says. An
    episode ends with its last job and is never cut.

    Args:
        workload: The jobs there are.
        rules: How the cluster runs.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, workload: Workload, rules: Rules | None = None) -> None:
        self.simulator = Simulator(workload, rules)
        jobs, executors = self.simulator.rules.jobs, self.simulator.rules.executors

        def numbers(*shape: int, kind: type = np.float32) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, shape, kind)

        self._stage = spaces.Discrete(1 + jobs * int(np.diff(workload.stage_start).max()), start=-1)
        self._executors = spaces.Discrete(executors, start=1)
        self.action_space = spaces.Dict({"stage_idx": self._stage, "num_exec": self._executors})
        self.observation_space = spaces.Dict(
            {
                "graph": spaces.Graph(numbers(NODES + EXTRA), spaces.Discrete(1)),
                "jobs": spaces.Sequence(numbers(JOBS), stack=True),
                "committable": spaces.Discrete(executors + 1),
                "source": spaces.Discrete(1 + jobs, start=-1),
                "time_s": numbers(kind=np.float64),
                "reward": numbers(kind=np.float64),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Number of the episode, from which its jobs and the durations of tasks follow. Without one, the number
                is drawn from the environment's own generator.
            options: ``{"episode": number}`` starts that episode and leaves the generator as it is.

        Returns:
            What is seen at the first decision, and ``info``.
        """
        super().reset(seed=seed)
        episode = (options or {}).get("episode", seed)
        if episode is None:
            episode = int(self.np_random.integers(2**31))
        return self._alone(self.simulator.reset([episode]), self.simulator.first)

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take a decision, and let time pass until the next one.

        Args:
            action: ``stage_idx`` and ``num_exec``.

        Returns:
            Observation, reward, whether the episode is over, False, and ``info``.

        Raises:
            UserError: The action is not possible.
        """
        actions = np.array([[action["stage_idx"], action["num_exec"]]])
        observations, rewards, over, info = self.simulator.step(actions)
        observation, info = self._alone(observations, info)
        return observation, float(rewards[0]), bool(over[0]), False, info

    def _alone(self, seen: Observations, info: Observations) -> tuple[dict[str, Any], dict[str, Any]]:
        """Drop the first axis, lay out a graph, and set the bounds of actions."""
        links = seen["edges"][0]
        nodes = np.concatenate([seen["nodes"][0], seen["extra"][0]], axis=1)
        self._stage.n = np.int64(1 + len(seen["stages"][0]))
        self._executors.n = seen["committable"][0]
        observation = {
            "graph": spaces.GraphInstance(nodes, np.zeros(len(links), np.int64), links),
            "jobs": seen["jobs"][0],
            "committable": seen["committable"][0],
            "source": seen["source"][0],
            "time_s": np.array(seen["time_s"][0]),
            "reward": np.array(seen["reward"][0]),
        }
        return observation, {name: values[0] for name, values in (seen | info).items() if name in info or name in KEPT}
