"""Data modules of decision tasks: they play the episodes of a split, and cut recorded experience into windows.

Shapes: N episodes side by side, B samples in a batch.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from netllm_pl.data import SPLITS, Batch, BatchedDataset, NetDataModule
from netllm_pl.errors import UserError, at_least, unknown
from netllm_pl.evaluate import joined
from netllm_pl.experience import Pool, Together, Windows, read_pool
from netllm_pl.parts import Shard
from netllm_pl.progress import progress
from netllm_pl.recording import Experience, recorded
from netllm_pl.rollout import Array, Policy, Rollout, acting, reseed, rollout


class Sessions:
    """Numbers of episodes, for learners that play themselves: what to reset a simulator with.

    Args:
        numbers: One for each episode.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = torch.tensor(numbers)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.numbers)

    def __getitem__(self, indices: list[int]) -> Batch:
        """Return ``session`` (B,)."""
        return {"session": self.numbers[indices]}

    def identify(self, indices: list[int]) -> dict[str, Array]:
        """Return ``session`` (B,)."""
        return {"session": self.numbers[indices].numpy()}


class DecisionData(NetDataModule):
    """Base of the data of decision tasks: a task overrides `simulator`, `numbers`, `report` and `content`.

    Args:
        pool: Folder of training experience that `collect` wrote, or several; null records it as ``experience`` says.
        experience: What to record for training (without a pool), and for the losses of validation and test. Null, for
            learners that play themselves, gives numbers of episodes in place of recorded steps.
        window: Steps of a window of experience.
        stride: Steps between the beginnings of two training windows; null takes the window.
        sessions: Training episodes of an epoch, for learners that play themselves.
        batch_size: Samples in a training batch, per process.
        eval_batch_size: Samples in a validation or test batch, and episodes played side by side.
        num_workers: Loader processes.
        seed: Seed of the training order.
        share: Share of the recorded training episodes that is used; a smaller one is part of a larger one.
    """

    own_experience: ClassVar[Experience] = Experience()
    """What is recorded where the config says nothing."""

    def __init__(
        self,
        pool: str | list[str] | None,
        experience: Experience | None,
        window: int,
        stride: int | None,
        sessions: int,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        share: float = 1.0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if not 0 < share <= 1:
            raise UserError(f"data.share is {share}; it must be above 0, and at most 1")
        self.train_share = share
        at_least(1, "data.", window=window, stride=stride, sessions=sessions)
        self.pools = [pool] if isinstance(pool, str) else pool
        self.experience, self.window, self.stride, self.sessions = experience, window, stride, sessions

    @abstractmethod
    def numbers(self, split: str) -> Sequence[int]:
        """Numbers of a split's own episodes: what to reset ``simulator(split)`` with."""

    @abstractmethod
    def report(self, played: Rollout, env: Any, numbers: Sequence[int], steps: bool) -> dict[str, pd.DataFrame]:
        """Turn what happened into tables.

        Args:
            played: N episodes.
            env: The simulator, which has just played them; with steps, what `logged` made of it.
            numbers: (N,) what it was reset with.
            steps: Whether steps are asked for.

        Returns:
            ``episodes``, one row an episode, as `NetDataModule.episodes` gives it; further tables of the task; and with
            steps ``steps``, one row a step.
        """

    @abstractmethod
    def content(self, split: str) -> str:
        """Hash of what the random episodes of a split depend on, beside the policy."""

    def logged(self, env: Any) -> Any:
        """Make a simulator tell all that `report` says of steps; by default it does."""
        return env

    def fitting(self, pool: Pool) -> Pool:
        """Return a pool whose observations look like those of the simulator; others are a `UserError`."""
        return pool

    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        """Play the episodes of a split.

        Returns:
            One row an episode, as `report` gives it.
        """
        return self._play(policy, split, steps=False)["episodes"]

    def tables(self, policy: Any, steps: bool = False) -> dict[str, pd.DataFrame]:
        """Play the test episodes.

        Returns:
            What `report` gives.
        """
        return self._play(policy, "test", steps)

    def fingerprint(self, split: str) -> str:
        """Hash of what episodes depend on."""
        return self.content(split)

    def batches(self) -> int:
        """Batches of test episodes."""
        return -(-len(self.numbers("test")) // self.eval_batch_size)

    def batch_tables(
        self, policy: Any, steps: bool = False, batches: range | None = None
    ) -> Iterator[tuple[int, dict[str, pd.DataFrame]]]:
        """Play batches of test episodes; a policy whose episodes depend on each other plays all with the first."""
        return self._batches(acting(policy), "test", steps, None, batches)

    def watch(self, policy: Any) -> dict[str, pd.DataFrame]:
        """Play the validation episodes, and tell what `watching` lets the simulator tell."""
        return self._play(policy, "valid", *self.watching())

    def watching(self) -> tuple[bool, Any]:
        """Say what `watch` plays: whether it tells of steps, and in which simulator; null is that of validation."""
        return True, None

    def share(self, policy: Any, split: str, watched: bool, shard: Shard) -> dict[str, pd.DataFrame]:
        """Play a share of the episodes of a split, in batches that are smaller if there are more shares than batches.

        A policy whose episodes depend on each other plays all of them in the first share.
        """
        steps, env = self.watching() if watched else (False, None)
        count = len(self.numbers(split))
        size = min(self.eval_batch_size, max(1, -(-count // shard.count)))
        own = shard.of(-(-count // size))
        if getattr(acting(policy), "sequential", False):
            own = range(int(shard.number == 1))
        return joined(tables for _, tables in self._batches(acting(policy), split, steps, env, own, size))

    def dataset(self, split: str) -> BatchedDataset:
        """Return windows of experience, or numbers of episodes."""
        if self.experience is None and not self.pools:
            return Sessions(range(self.sessions) if split == "train" else self.numbers(split))
        experience = self.experience or self.own_experience
        pools = [self.fitting(read_pool(folder, type(self).__name__)) for folder in self.pools or []]
        if pools and split != "train":
            experience = replace(experience, values=pools[0].manifest["made_by"].get("values"))
        if not pools or split != "train":
            pools = [recorded(self, experience, split, self.content(split))]
        if split != "train":
            return Together([Windows(pool, self.window) for pool in pools])
        return Together([Windows(pool, self.window, self.stride, some_of(pool, self.train_share)) for pool in pools])

    def _play(self, policy: Any, split: str, steps: bool, env: Any = None) -> dict[str, pd.DataFrame]:
        return joined(tables for _, tables in self._batches(acting(policy), split, steps, env))

    def _batches(
        self,
        policy: Policy,
        split: str,
        steps: bool,
        env: Any,
        batches: range | None = None,
        batch_size: int | None = None,
    ) -> Iterator[tuple[int, dict[str, pd.DataFrame]]]:
        numbers = self.numbers(split)
        env = self.simulator(split) if env is None else env
        env = self.logged(env) if steps else env
        # What is told of the episodes is told by the simulator, which knows those that it played last.
        sequential = getattr(policy, "sequential", False)
        together = batch_size or self.eval_batch_size
        size = 1 if sequential else together
        chosen = range(-(-len(numbers) // together)) if batches is None else batches
        played = (range(len(numbers)) if 0 in chosen else range(0)) if sequential else chosen
        parts = [numbers[size * batch : size * (batch + 1)] for batch in played]
        told = []
        with progress("episodes", sum(map(len, parts))) as advance:
            for batch, some in zip(played, parts, strict=True):
                reseed(policy, batch)
                told.append(self.report(rollout(env, policy, some, advance=advance), env, some, steps))
                if not sequential:
                    yield batch + 1, told.pop()
        if told:
            yield chosen.stop, joined(told)


def some_of(pool: Pool, share: float) -> Array | None:
    """Numbers of a share of a pool's episodes, one at least; None is all of them."""
    count = len(pool.steps)
    order = np.random.default_rng(0).permutation(count)
    return None if share == 1 else np.sort(order[: max(1, math.ceil(share * count - 1e-9))])


def check_split(split: str) -> None:
    """Refuse what is no split."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
