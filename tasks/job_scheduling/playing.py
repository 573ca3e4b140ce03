"""Plays training episodes, for Decima in other processes too, and tells how well a step did against like episodes.

Shapes: N episodes, T steps of the longest, R steps of all together; G episodes of a group share jobs and arrivals.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_all_start_methods, get_context, set_forkserver_preload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from netllm_pl.ragged import LENGTH
from netllm_pl.rollout import Array, Observations, Policy, rollout
from tasks.job_scheduling.decima import READ, DecimaNet, Draws
from tasks.job_scheduling.decima_kernel import Layers, Weights, decide
from tasks.job_scheduling.simulator import Simulator

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Played:
    """What happened in N episodes.

    Attributes:
        columns: What was seen at the R steps that were taken, episode by episode, as ragged columns: values, and
            lengths (R,); and ``action`` (R, 2).
        times: (T + 1, N) when each step was taken, s, and last when the episode ended, also behind its end.
        rewards: (T, N) job-seconds; 0 behind the end.
        alive: (T, N) bool, which steps were taken.
    """

    columns: dict[str, Array]
    times: Floats
    rewards: Floats
    alive: npt.NDArray[np.bool_]


def weights_of(net: DecimaNet) -> Weights:
    """Copy the weights of a network for the kernels."""

    def plain(value: Tensor) -> npt.NDArray[np.float32]:
        return np.array(value.detach().cpu().numpy().T, np.float32, order="C")

    def layers(part: str) -> Layers:
        return Layers(*(plain(value) for value in net.get_submodule(part).state_dict().values()))

    names = ("passing.prep", "passing.message", "passing.update", "job", "group", "stage", "executors")
    return Weights(*map(layers, names))


class KernelPolicy:
    """Decides as a `DecimaPolicy` that draws, up to rounding.

    Args:
        net: The network; its weights are copied.
        draws: Whose ``uniforms`` are drawn from: for every episode one for the stage, then one for the executors.
    """

    def __init__(self, net: DecimaNet, draws: Draws) -> None:
        self.weights, self.draws = weights_of(net), draws

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    def act(self, observations: Observations) -> Array:
        """Choose stage and executors (N, 2); an episode without schedulable stages gets (-1, 1)."""
        of_stage, of_executors = self.draws.uniforms(), self.draws.uniforms()
        columns = [observations[name] for name in READ]
        actions = np.empty((len(of_stage), 2), np.int64)
        for i, seen in enumerate(zip(*columns, strict=True)):
            actions[i] = decide(self.weights, *seen, of_stage[i], of_executors[i])
        return actions


class _Draws:
    """Draws from streams that are not those of the environment: episodes of a group differ in nothing else."""

    def __init__(self, draws: Sequence[int]) -> None:
        self.streams = [np.random.default_rng(draw) for draw in draws]

    def uniforms(self) -> Floats:
        """Draw one number for every episode."""
        return np.array([stream.random() for stream in self.streams])


class _Clock:
    """Notes when a policy decides, and when the episodes end."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.times: list[Array] = []

    def reset(self, n: int) -> None:
        """Begin n episodes."""
        self.policy.reset(n)

    def act(self, observations: Observations) -> Array:
        """Choose stages and executors (N, 2)."""
        self.times.append(observations["time_s"])
        return self.policy.act(observations)

    def finish(self, observations: Observations) -> None:
        """See when the episodes ended."""
        self.times.append(observations["time_s"])


def play(net: DecimaNet, env: Simulator, seeds: Sequence[int], draws: Sequence[int]) -> Played:
    """Play episodes with drawn actions of Decima.

    Args:
        net: The network.
        env: The simulator.
        seeds: One episode each; equal seeds have equal jobs and arrivals.
        draws: A seed of each episode's actions.
    """
    return watched(KernelPolicy(net, _Draws(draws)), env, seeds, READ)


def watched(policy: Policy, env: Simulator, seeds: Sequence[int], names: Sequence[str]) -> Played:
    """Play episodes and keep what a policy saw.

    Args:
        policy: Who acts.
        env: The simulator.
        seeds: One episode each.
        names: Observations that are kept.
    """
    clock = _Clock(policy)
    played = rollout(env, clock, seeds, record=True)
    taken = played.alive.T
    columns: dict[str, Array] = {"action": played.actions.swapaxes(0, 1)[taken].astype(np.int16)}
    for name in names:
        values = played.observations[name].swapaxes(0, 1)[taken]
        columns[name] = values
        if values.dtype == object:
            columns[name] = np.concatenate(list(values))
            columns[name + LENGTH] = np.fromiter(map(len, values), np.int64, len(values))
    rewards = np.where(played.alive, played.rewards, 0.0)
    return Played(columns, np.stack(clock.times), rewards, played.alive)


_worker: tuple[Simulator, DecimaNet]


def _start(env: Simulator, net: DecimaNet) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = env, net


def _play(weights: dict[str, Array], seeds: Sequence[int], draws: Sequence[int]) -> Played:
    env, net = _worker
    net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return play(net, env, seeds, draws)


class Players:
    """Processes that play episodes side by side; each has a simulator and a network of its own.

    Args:
        env: The simulator.
        net: A network of the kind that will play.
        count: How many processes.
    """

    # Not forks of this process, whose threads and GPU they could not use; but imports are made once for all.
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"

    def __init__(self, env: Simulator, net: DecimaNet, count: int) -> None:
        self.count = count
        set_forkserver_preload([__name__])
        self.pool = ProcessPoolExecutor(count, get_context(self.method), _start, (env, net))

    def play(self, net: nn.Module, seeds: Sequence[int], draws: Sequence[int]) -> list[Played]:
        """Play episodes, as `play` does, dealt out to the processes in equal parts."""
        weights = {name: value.detach().cpu().numpy() for name, value in net.state_dict().items()}
        bounds = np.linspace(0, len(seeds), min(self.count, len(seeds)) + 1).round().astype(int).tolist()
        parts = [slice(*ends) for ends in pairwise(bounds)]
        waiting = [self.pool.submit(_play, weights, seeds[part], draws[part]) for part in parts]
        return [one.result() for one in waiting]

    def close(self) -> None:
        """End the processes."""
        self.pool.shutdown()


def joined(parts: Sequence[Played]) -> Played:
    """Put episodes side by side."""
    steps = max(len(part.rewards) for part in parts)

    def longer(values: Array, length: int, mode: str) -> Array:
        widths = ((0, length - len(values)), (0, 0))
        return np.pad(values, widths, mode="edge") if mode == "edge" else np.pad(values, widths)

    def side_by_side(arrays: Sequence[Array], length: int, mode: str = "constant") -> Array:
        return np.concatenate([longer(values, length, mode) for values in arrays], axis=1)

    return Played(
        {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        side_by_side([part.times for part in parts], steps + 1, "edge"),
        side_by_side([part.rewards for part in parts], steps),
        side_by_side([part.alive for part in parts], steps),
    )


def centred(gains: Floats, times: Floats, alive: npt.NDArray[np.bool_], group: int) -> Floats:
    """Subtract from each step's gain the mean gain of the other episodes of its group at the same time.

    Episodes of a group have the same jobs and arrivals, which is most of what returns differ by (input-dependent
    baselines: Mao et al., ICLR 2019, arXiv:1807.02264); but they decide at different times, and differently often.
    Between two steps of an episode its gain is interpolated; behind its end it is zero.

    Args:
        gains: (T, N) of each step.
        times: (T + 1, N) when it was taken, and when the episode ended.
        alive: (T, N) which steps were taken.
        group: Episodes of a group (G), neighbours.

    Returns:
        (T, N); 0 where no step was taken.
    """
    found = np.zeros_like(gains)
    for first in range(0, gains.shape[1], group):
        members = range(first, first + group)
        lines = [(times[: n + 1, i], np.append(gains[:n, i], 0.0)) for i in members for n in [int(alive[:, i].sum())]]
        for i in members:
            own = alive[:, i]
            others = [np.interp(times[:-1][own, i], *lines[k - first]) for k in members if k != i]
            found[own, i] = gains[own, i] - np.mean(others, axis=0)
    return found
