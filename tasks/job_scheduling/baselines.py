"""Hand-written, planning and published schedulers by name.

Shapes: N episodes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError, unknown
from netllm_pl.rollout import Policy
from tasks.job_scheduling.heuristics import SCHEMES, Heuristic
from tasks.job_scheduling.planning import Planner
from tasks.job_scheduling.simulator import Observations

NAMES = (*SCHEMES, "random", "rollout", "decima", "decima_argmax")


class Random:
    """A random schedulable stage and number of executors, drawn from the episodes' own streams."""

    def watch(self, env: Any) -> None:
        """Draw from a simulator's streams from now on."""
        self.env = env

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    def act(self, observations: Observations) -> npt.NDArray[np.int64]:
        """Return stage and executors (N, 2)."""
        counts = np.stack([[len(stages) for stages in observations["stages"]], observations["committable"]], axis=1)
        drawn = np.stack([self.env.uniforms(), self.env.uniforms()], axis=1)
        return np.asarray((drawn * counts).astype(np.int64) + np.array([0, 1]))


def build(name: str, weights_dir: Path | None = None, seed: int = 0) -> Policy:
    """Make a policy.

    Args:
        name: One of `NAMES`; ``decima`` draws its actions, ``decima_argmax`` takes the likeliest.
        weights_dir: Folder with ``decima.npz``.
        seed: Of what is drawn, where the simulator has no stream to draw from.

    Raises:
        UserError: The name is unknown, or weights are missing or broken.
    """
    policies: dict[str, Callable[[], Policy]] = {
        "random": Random,
        "rollout": Planner,
        "decima": lambda: _decima(weights_dir, True, seed),
        "decima_argmax": lambda: _decima(weights_dir, False, seed),
    }
    if name in SCHEMES:
        return Heuristic(SCHEMES[name])
    if name not in policies:
        raise unknown("policy", name, NAMES)
    return policies[name]()


def _decima(weights_dir: Path | None, sample: bool, seed: int) -> Policy:
    from tasks.job_scheduling.decima import DecimaPolicy, load_decima  # imported late: torch takes seconds

    if weights_dir is None:
        raise UserError("Decima needs the published weights: set data.weights_dir to the folder with decima.npz")
    return DecimaPolicy(load_decima(weights_dir / "decima.npz"), sample, seed)
