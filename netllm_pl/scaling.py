"""How cost grows with size: of a step of many episodes side by side, and of learning from large pools. It should not.

Shapes: N episodes side by side, T steps.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch

from netllm_pl.decision import DecisionTask
from netllm_pl.episodes import DecisionData
from netllm_pl.errors import UserError
from netllm_pl.experience import PoolWriter, Windows, read_pool
from netllm_pl.machine import private_memory_gb
from netllm_pl.rollout import Array, Observations, Rollout, rollout
from netllm_pl.task import NetTask
from netllm_pl.timing import Entry, now

T = TypeVar("T")

EPISODES = (100, 1_000_000)
STEPS = (10_000, 10_000_000)
"""Smallest and largest sizes, of which an option may leave out the upper ones."""
TAKEN = 20
"""Steps of a simulator, and of training, behind a median."""
RECORDED = 40
"""Episodes that are recorded; larger pools hold them again and again."""


def scaling(task: NetTask, data: Any, largest: int) -> Entry:
    """Measure sizes that grow tenfold: ``simulator`` and ``pool``, each with the growth of what should stay the same.

    Args:
        task: Trained on the pools; its weights stay as they are.
        data: Of a task that acts, whose simulator can draw actions.
        largest: Episodes side by side, and steps of a pool, that are not exceeded.

    Raises:
        UserError: Nothing can be measured at that size, or the data has no simulator.
    """
    check(data, largest)
    with TemporaryDirectory(prefix="netllm_pl-scaling-") as folder, _cache_in(Path(folder)):
        found: Entry = {"largest": largest, "simulator": _simulator(data, sizes(EPISODES, largest))}
        if isinstance(task, DecisionTask) and data.experience is not None and sizes(STEPS, largest):
            found["pool"] = _pools(task, data, sizes(STEPS, largest), Path(folder))
    return found


def check(data: Any, largest: int) -> None:
    """Refuse what cannot be measured, before anything is."""
    if not isinstance(data, DecisionData):
        raise UserError(f"{type(data).__name__} has no simulator that plays many episodes; leave out --scaling")
    if largest < EPISODES[0]:
        raise UserError(f"--scaling is {largest}; give the largest size, at least {EPISODES[0]}, such as 1000000")


def sizes(limits: tuple[int, int], largest: int) -> list[int]:
    """Powers of ten from the smallest to the largest size."""
    smallest, highest = limits
    return [10**k for k in range(20) if smallest <= 10**k <= min(highest, largest)]


def _simulator(data: DecisionData, numbers: list[int]) -> Entry:
    """Time steps of episodes side by side, with actions drawn beforehand."""
    found: Entry = {}
    rng = np.random.default_rng(0)
    for number in numbers:
        env: Any = data.simulator("test", "random")
        observations, taken = env.reset(np.arange(number)), []
        for _ in range(TAKEN):
            actions = env.sample(observations, rng)
            seconds, (observations, _, over, _) = _timed(partial(env.step, actions))
            taken.append(seconds)
            if over.any():
                break
        found[f"episodes_{number}"] = {"us_per_step": 1e6 * median(taken) / number}
    return found | _growth(found, "us_per_step")


def _pools(task: DecisionTask, data: DecisionData, numbers: list[int], folder: Path) -> Entry:
    """Write pools, read windows of them in random order, and take training steps."""
    found: Entry = {}
    played = _recorded(data)
    for number in numbers:
        place = folder / f"pool_{number}"
        writing, _ = _timed(partial(_write, place, data, played, number))
        written = private_memory_gb()
        windows = Windows(read_pool(place), data.window)
        rng, gathered, steps = np.random.default_rng(0), [], []
        for _ in range(TAKEN):
            chosen = rng.integers(0, len(windows), data.batch_size).tolist()
            gathering, batch = _timed(partial(windows.__getitem__, chosen))
            batch = {name: value.to(task.device) for name, value in batch.items()}
            gathered.append(gathering)
            steps.append(gathering + _timed(partial(_learn, task, batch))[0])
        found[f"steps_{number}"] = {
            "written_us_per_step": 1e6 * writing / len(windows.pool),
            "gather_ms": 1000 * median(gathered),
            "training_step_ms": 1000 * median(steps),
            "memory_written_gb": written,
            "memory_trained_gb": private_memory_gb(),
        }
        task.zero_grad()
    grown = {name: _growth(found, name) for name in ("gather_ms", "training_step_ms", "memory_trained_gb")}
    return found | {f"{name}_growth": entry["growth"] for name, entry in grown.items()}


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    """Call once; return the seconds it took, until the device was done too, and what it gave."""
    start = now()
    result = call()
    return now() - start, result


def _growth(found: Entry, name: str) -> Entry:
    """Divide what the largest size takes by what the smallest one does."""
    values = [entry[name] for entry in found.values() if isinstance(entry, dict)]
    return {"growth": values[-1] / values[0]}


def _learn(task: DecisionTask, batch: dict[str, torch.Tensor]) -> None:
    task.loss(task(batch), batch).backward()


def _recorded(data: DecisionData) -> Rollout:
    assert data.experience is not None
    env: Any = data.simulator("train", "random")
    drawn = _Drawn(env)
    if data.experience.values is not None:
        env = data.label(env, data.experience.values)
    return rollout(env, drawn, range(RECORDED), record=True)


def _write(folder: Path, data: DecisionData, played: Rollout, steps: int) -> None:
    own = int(played.alive.sum())
    with PoolWriter(folder, type(data).__name__) as writer:
        for _ in range(-(-steps // own)):
            writer.add(played, "random")


class _Drawn:
    """Takes any possible action."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self, n: int) -> None:
        """Begin n episodes."""
        self.rng = np.random.default_rng(0)

    def act(self, observations: Observations) -> Array:
        """Draw."""
        actions: Array = self.env.sample(observations, self.rng)
        return actions


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let copies of pools go with the pools themselves."""
    before = os.environ.get("NETLLM_CACHE")
    os.environ["NETLLM_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["NETLLM_CACHE"]
        else:
            os.environ["NETLLM_CACHE"] = before
