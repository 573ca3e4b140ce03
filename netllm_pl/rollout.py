"""Runs policies in simulated environments: the one loop behind evaluation, experience collection and validation.

Shapes: N episodes side by side, T steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from netllm_pl.errors import UserError

Array = npt.NDArray[Any]
Observations = dict[str, Array]


class Environment(Protocol):
    """A simulator that steps many episodes at once.

    For exploration it may have ``sample(observations, rng)``: possible actions (N,), all with the same probability.
    """

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start one episode for each seed; return observations, arrays (N, ...) by name."""

    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        """Take one action in every episode that is not over (others are ignored).

        Returns:
            Observations, rewards (N,), which episodes are over (N,) bool, and what else happened, arrays (N, ...).
        """


class Policy(Protocol):
    """Chooses actions for many episodes at once.

    A policy whose state must pass from one episode to the next sets ``sequential = True``: its episodes are run one
    after another, and it is told the last observation by ``finish(observations)`` if it has that method. One that looks
    into the simulator, as planners that know the future do, has ``watch(env)``: it is called before ``reset``. One that
    draws random numbers has ``reseed(number)``: what it draws from then on depends on the number alone, that of a batch
    of episodes, so that a batch is played the same whether or not the ones before it were.
    """

    def reset(self, n: int) -> None:
        """Begin n episodes."""

    def act(self, observations: Observations) -> Array:
        """Return an action (N,) for every episode."""


@dataclass(frozen=True)
class Rollout:
    """What happened in N episodes, time first; rows behind an episode's end are padding.

    Attributes:
        actions: (T, N).
        rewards: (T, N).
        alive: (T, N) bool, True at steps that were taken.
        info: What else happened at each step, (T, N, ...) by name.
        observations: What the policy saw before each action, (T, N, ...) by name; empty unless recorded.
        start: What the environment says of the first state, arrays (N, ...) by name (its attribute ``first``).
    """

    actions: Array
    rewards: npt.NDArray[np.float64]
    alive: npt.NDArray[np.bool_]
    info: dict[str, Array]
    observations: Observations
    start: dict[str, Array]

    @property
    def returns(self) -> npt.NDArray[np.float64]:
        """Sum of rewards of each episode (N,)."""
        total: npt.NDArray[np.float64] = np.where(self.alive, self.rewards, 0.0).sum(0)
        return total

    def best(self, group: int) -> "Rollout":
        """Keep of each group of neighbouring episodes the one with the highest return, the first of equals."""
        chosen = self.returns.reshape(-1, group).argmax(1) + np.arange(0, len(self.returns), group)
        length = int(self.alive[:, chosen].any(1).sum())

        def kept(table: dict[str, Array]) -> dict[str, Array]:
            return {name: values[:length, chosen] for name, values in table.items()}

        return Rollout(
            self.actions[:length, chosen],
            self.rewards[:length, chosen],
            self.alive[:length, chosen],
            kept(self.info),
            kept(self.observations),
            {name: values[chosen] for name, values in self.start.items()},
        )


def acting(policy: Any) -> Policy:
    """Return what chooses actions: a task's own policy, or the policy itself.

    Raises:
        UserError: It chooses none.
    """
    act_as: Any = getattr(policy, "as_policy", None)
    chosen: Policy = policy if act_as is None else act_as()
    if not hasattr(chosen, "act"):
        raise UserError(f"{type(policy).__name__} does not act; give a policy or a checkpoint of this task")
    return chosen


def reseed(policy: Any, number: int) -> None:
    """Let a policy draw what belongs to a batch of episodes, if it draws anything."""
    if hasattr(policy, "reseed"):
        policy.reseed(number)


def rollout(
    env: Environment,
    policy: Policy,
    seeds: Sequence[int],
    record: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Rollout:
    """Run a policy until all episodes are over.

    Args:
        env: The simulator.
        policy: Who acts.
        seeds: One episode each.
        record: Keep the observations.
        advance: Called with the number of episodes that have ended, when some have.
    """
    if getattr(policy, "sequential", False) and len(seeds) > 1:
        return _side_by_side([rollout(env, policy, [seed], record, advance) for seed in seeds])
    observations = env.reset(seeds)
    if hasattr(policy, "watch"):
        policy.watch(env)
    policy.reset(len(seeds))
    over = np.zeros(len(seeds), dtype=bool)
    seen: list[Observations] = []
    steps: list[tuple[Array, Array, Array, dict[str, Array]]] = []
    while not over.all():
        actions = np.asarray(policy.act(observations))
        if record:
            seen.append(observations)
        alive = ~over
        observations, rewards, over, info = env.step(actions)
        steps.append((actions, rewards, alive, info))
        ended = int((alive & over).sum())
        if ended and advance is not None:
            advance(ended)
    if hasattr(policy, "finish"):
        policy.finish(observations)
    actions, rewards, alive = (np.stack([step[part] for step in steps]) for part in range(3))  # type: ignore[misc]
    return Rollout(
        actions,
        rewards.astype(np.float64),
        alive,
        _stack([step[3] for step in steps]),
        _stack(seen),
        dict(getattr(env, "first", {})),
    )


def _stack(steps: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.stack([step[name] for step in steps]) for name in (steps[0] if steps else {})}


def _side_by_side(parts: list[Rollout]) -> Rollout:
    """Put episodes of different lengths side by side, padded behind their ends."""
    length = max(len(part.actions) for part in parts)

    def join(arrays: list[Array], axis: int = 1) -> Array:
        padded = [np.pad(a, [(0, length - len(a))] + [(0, 0)] * (a.ndim - 1)) if axis else a for a in arrays]
        return np.concatenate(padded, axis=axis)

    def join_all(tables: list[dict[str, Array]], axis: int = 1) -> dict[str, Array]:
        return {name: join([table[name] for table in tables], axis) for name in tables[0]}

    return Rollout(
        join([part.actions for part in parts]),
        join([part.rewards for part in parts]),
        join([part.alive for part in parts]),
        join_all([part.info for part in parts]),
        join_all([part.observations for part in parts]),
        join_all([part.start for part in parts], axis=0),
    )
