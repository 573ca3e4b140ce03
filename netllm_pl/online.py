"""Adapting a language model by playing, with PPO or DQN: the way that the paper argues against, to compare with.

Shapes: N episodes side by side, T steps of an episode, C choices.
"""

from collections import deque
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from netllm_pl.acting import HUBER, REGRET, evaluating
from netllm_pl.collect import Explore
from netllm_pl.data import Batch
from netllm_pl.decision import DecisionTask, LanguageModelPolicy
from netllm_pl.errors import UserError, at_least
from netllm_pl.ppo import PlayingTask, advantages, clipped, standardized
from netllm_pl.ragged import as_tensor
from netllm_pl.rollout import Policy, Rollout, reseed, rollout
from netllm_pl.timing import now

Method = Literal["ppo", "dqn"]


class OnlineTask(PlayingTask, DecisionTask):
    """A decision task, of fixed choices, that learns by playing instead of from experience.

    A training step plays a batch of groups of episodes, each group from the same start; then it learns for some epochs.
    With PPO actions are drawn, and what is learned from is how an episode does against its group (Mao et al., ICLR
    2019, arXiv:1807.02264), so there is no critic. With DQN (Mnih et al., 2015, doi:10.1038/nature14236) scores are
    values: the best action is taken, or one at random, and what is learned from is drawn from the episodes of the last
    steps, with the weights at the beginning of the step in the place of a target network. A task derives from this and
    from its offline class, calls that one's constructor and `online`, and brings `environment`.

    Logged beside the rest: ``cost/playing_share``, the share of the time of a step that playing took, and
    ``train/reward``, the mean reward of a step of an episode.
    """

    group: int
    discount: float

    def online(
        self,
        group: int,
        discount: float,
        epochs: int,
        minibatches: int,
        clip: float,
        entropy: tuple[float, float],
        method: Method = "ppo",
        explore: tuple[float, float] = (0.5, 0.02),
        remembered: int = 8,
    ) -> None:
        """Note how to learn.

        Args:
            group: Episodes with the same start.
            discount: Weight of a reward one step later.
            epochs: Passes over the episodes of a step.
            minibatches: Parts of a pass.
            clip: Bound on the change of a probability, as a share.
            entropy: Weight of the policy's entropy at the start and at the end of training.
            method: ``ppo`` or ``dqn``.
            explore: Of DQN, the share of random actions at the start and at the end; it falls geometrically.
            remembered: Of DQN, the steps whose episodes are remembered; these must be of the same length.
        """
        self.plays(epochs, minibatches, clip, entropy)
        if self.head is None:
            raise UserError(f"{type(self).__name__} learns by playing, which takes choices that are fixed in number")
        at_least(2, f"{type(self).__name__}: ", group=group)
        if remembered < 1 or not all(0 < share <= 1 for share in explore):
            raise UserError(
                f"{type(self).__name__}: remembered is {remembered} (at least 1), explore {tuple(explore)} (both above "
                "0, at most 1)"
            )
        self.group, self.discount, self.method, self.explore = group, discount, method, explore
        self.memory: deque[Batch] = deque(maxlen=remembered)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Play, then improve the policy; one step of the trainer."""
        began = now()
        with evaluating(self):  # dropout would make the policy another one at every look
            played = self._play(self.sessions(batch))
            middle = now()
            learn = self._learn_policy if self.method == "ppo" else self._learn_values
            loss = learn(self._steps(played))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/reward", float(played.rewards[played.alive].mean()), prog_bar=True)
        self.log("cost/playing_share", (middle - began) / (now() - began))
        return loss

    def _play(self, sessions: list[int]) -> Rollout:
        env: Any = self.environment("train")
        policy: Policy = LanguageModelPolicy(self, draw=self.method == "ppo")
        if self.method == "dqn":
            policy = Explore(policy, self.falling(*self.explore), env.sample)
        reseed(policy, self.global_step)
        return rollout(env, policy, np.repeat(sessions, self.group).tolist(), record=True)

    def _steps(self, played: Rollout) -> Batch:
        """Windows of whole episodes (N, T, ...), with ``gain`` and ``paid``, the reward, (N, T)."""
        rows: Batch = {
            name: as_tensor(np.ascontiguousarray(values.swapaxes(0, 1))).to(self.device)
            for name, values in (played.observations | {"action": played.actions}).items()
        }
        mask = torch.from_numpy(played.alive.T.copy()).to(self.device)
        rewards = torch.from_numpy(np.where(played.alive, played.rewards, 0.0)).float().to(self.device)
        returns = advantages(rewards, torch.zeros_like(rewards), self.discount, 1.0).unflatten(1, (-1, self.group))
        gains = (returns - returns.mean(2, keepdim=True)).flatten(1).T
        gains[mask] = standardized(gains[mask])
        step = torch.arange(mask.shape[1], device=self.device).expand_as(mask)
        return rows | {"mask": mask, "step": step, "gain": gains, "paid": rewards.T}

    def _learn_policy(self, steps: Batch) -> Tensor:
        with torch.no_grad():
            steps["chance"] = self._chances(steps)[0]
        return self.improve(len(steps["action"]), lambda part, weight: self._surrogate(steps, part, weight))

    def _learn_values(self, steps: Batch) -> Tensor:
        steps = self._remember(steps)
        with torch.no_grad():
            steps["target"] = self._targets(steps)
        return self.improve(len(steps["action"]), lambda part, _: self._error(steps, part))

    def _chances(self, steps: Batch) -> tuple[Tensor, Tensor]:
        """Logarithms of the probabilities of the actions (N, T), and entropies (N, T)."""
        logs = self(steps).log_softmax(-1)
        return logs.gather(-1, steps["action"].unsqueeze(-1))[..., 0], -(logs.exp() * logs).sum(-1)

    def _surrogate(self, steps: Batch, part: Tensor, weight: float) -> Tensor:
        """PPO's clipped objective and the entropy of some episodes."""
        some = {name: value[part] for name, value in steps.items()}
        chances, entropies = self._chances(some)
        real = some["mask"]
        policy = clipped(chances[real], some["chance"][real], some["gain"][real], self.clip)
        return policy - weight * entropies[real].mean()

    def _remember(self, steps: Batch) -> Batch:
        """Add episodes to those that are remembered; draw as many from all of these."""
        self.memory.append(steps)
        drawn = torch.randperm(len(self.memory) * len(steps["action"]))[: len(steps["action"])].to(self.device)
        return {name: torch.cat([one[name].to(self.device) for one in self.memory])[drawn] for name in steps}

    def _targets(self, steps: Batch) -> Tensor:
        """What the values of the actions should be (N, T): the reward, and the best value of the next step."""
        best = self(steps).amax(-1) * steps["mask"]
        after = F.pad(best[:, 1:], (0, 1))
        # A long outage costs thousands; how many does not matter.
        return steps["paid"].clamp_min(-REGRET) + self.discount * after

    def _error(self, steps: Batch, part: Tensor) -> Tensor:
        """Huber loss of the values of the actions that were taken in some episodes."""
        some = {name: value[part] for name, value in steps.items()}
        values = self(some).gather(-1, some["action"].unsqueeze(-1))[..., 0]
        return F.smooth_l1_loss(values[some["mask"]], some["target"][some["mask"]], beta=HUBER)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is remembered, too: a run that is resumed learns from the same episodes."""
        super().on_save_checkpoint(checkpoint)
        if self.memory:
            checkpoint["memory"] = [{name: value.cpu() for name, value in one.items()} for one in self.memory]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what was remembered."""
        super().on_load_checkpoint(checkpoint)
        self.memory.extend(checkpoint.get("memory", ()))
