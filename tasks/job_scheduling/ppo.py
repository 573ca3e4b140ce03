"""Scheduling that is learned by playing, with PPO: what Decima's network and the language model share.

Shapes: N episodes, R steps of all of them together.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from netllm_pl.acting import evaluating
from netllm_pl.data import Batch, NetDataModule
from netllm_pl.errors import UserError, at_least
from netllm_pl.ppo import PlayingTask, advantages, clipped, standardized
from netllm_pl.ragged import take
from netllm_pl.timing import now
from tasks.job_scheduling.playing import Played, centred
from tasks.job_scheduling.simulator import Simulator


class PlayingScheduler(PlayingTask):
    """Learns by PPO from groups of short episodes with equal jobs and arrivals.

    Only how an episode does against its group at the same time counts: arrivals are most of what returns differ by (Mao
    et al., ICLR 2019, arXiv:1807.02264). Time is continuous: steps are discounted by the seconds between them. Set
    ``data.experience`` to null: then ``data.batch_size`` is the number of groups in a step, and ``data.sessions`` that
    of groups in an epoch. A class derives from this, calls `schedules`, and brings `play` and `chances`.

    Logged beside the rest: ``cost/playing_share``, the share of the time of a step that playing took.
    """

    monitor = "val/jct_s"

    def schedules(self, jobs: int, group: int, horizon_s: float) -> None:
        """Note what is played.

        Args:
            jobs: Jobs of a training episode; its other rules are the data's.
            group: Episodes with the same jobs and arrivals.
            horizon_s: Time in which the weight of a later reward falls to 1/e.
        """
        name = f"{type(self).__name__}: "
        at_least(1, name, jobs=jobs)
        at_least(2, name, group=group)
        if horizon_s <= 0:
            raise UserError(f"{name}horizon_s is {horizon_s}; it must be above 0")
        self.jobs, self.group, self.horizon_s = jobs, group, horizon_s

    @abstractmethod
    def play(self, seeds: Sequence[int]) -> Played:
        """Play training episodes with drawn actions; equal seeds have equal jobs and arrivals."""

    @abstractmethod
    def chances(self, steps: Batch) -> tuple[Tensor, Tensor]:
        """Logarithms of the probabilities of actions (R,), and the policy's entropies (R,).

        Args:
            steps: What was seen, as ragged columns with lengths (R,), and ``action`` (R, 2).
        """

    def environment(self, split: str) -> Simulator:
        """Return a split's simulator, with short episodes."""
        data = getattr(self.trainer, "datamodule", None)
        env = data.simulator(split) if isinstance(data, NetDataModule) else None
        if not isinstance(env, Simulator):
            raise UserError(f"{type(self).__name__} learns by playing; give it JobSchedulingData")
        stream = "counted" if env.rules.stream == "published" else env.rules.stream
        rules = replace(env.rules, jobs=min(self.jobs, env.rules.jobs), stream=stream)
        # Only language models read the advice.
        return Simulator(env.workload, rules, env.first_seed, adviser=env.adviser if self.backbone else None)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Play, then improve the policy; one step of the trainer."""
        began = now()
        told: list[Tensor] = []
        with evaluating(self):  # dropout would make the policy another one at every look
            played = self.play(np.repeat(self.sessions(batch), self.group).tolist())
            middle = now()
            columns = {name: torch.from_numpy(value).to(self.device) for name, value in played.columns.items()}
            columns |= self._before(columns, played)
            loss = self.improve(
                len(columns["action"]), lambda part, weight: self._surrogate(take(columns, part), weight, told)
            )
        jct = -played.rewards.sum() / (played.rewards.shape[1] * self.environment("train").rules.jobs)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/jct_s", jct, prog_bar=True)
        self.log("cost/playing_share", (middle - began) / (now() - began))
        means = torch.stack(told).mean(0).tolist()
        self.log_dict(dict(zip(("train/entropy", "train/kl"), means, strict=True)))
        return loss

    @torch.no_grad()
    def _before(self, columns: Batch, played: Played) -> Batch:
        """Tell what is known of each step before the policy changes: its probability and its advantage."""
        taken = played.alive.T
        parts = torch.arange(len(columns["action"]), device=self.device).chunk(self.minibatches)
        chances = torch.cat([self.chances(take(columns, part))[0] for part in parts])
        waits, rewards = torch.from_numpy(np.diff(played.times, axis=0)), torch.from_numpy(played.rewards)
        returns = advantages(rewards, torch.zeros_like(rewards), (-waits / self.horizon_s).exp(), 1.0)
        gains = centred(returns.numpy(), played.times, played.alive, self.group).T[taken]
        return {"chance": chances, "gain": standardized(torch.from_numpy(gains).float().to(self.device))}

    def _surrogate(self, steps: Batch, weight: float, told: list[Tensor]) -> Tensor:
        """PPO's clipped objective and the entropy of some steps; tells the entropy and how far the policy has moved."""
        chances, entropies = self.chances(steps)
        entropy = entropies.mean()
        change = chances.detach() - steps["chance"]
        told.append(torch.stack([entropy.detach(), (change.exp() - 1 - change).mean()]))
        return clipped(chances, steps["chance"], steps["gain"], self.clip) - weight * entropy
