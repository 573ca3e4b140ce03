"""Adapting a language model by playing, with PPO: the way that the paper argues against, to compare with.

Shapes: N episodes side by side, T steps of an episode, C choices.
"""

import numpy as np
import torch
from torch import Tensor

from netllm_pl.acting import evaluating
from netllm_pl.data import Batch
from netllm_pl.decision import DecisionTask, LanguageModelPolicy
from netllm_pl.errors import UserError
from netllm_pl.ppo import PlayingTask, advantages, clipped, standardized
from netllm_pl.ragged import as_tensor
from netllm_pl.rollout import Rollout, rollout
from netllm_pl.timing import now


class OnlineTask(PlayingTask, DecisionTask):
    """A decision task, of fixed choices, that learns by playing instead of from experience.

    A training step plays a batch of groups of episodes, each group from the same start, with drawn actions; then it
    learns from them for some epochs. Only how an episode does against its group counts (Mao et al., ICLR 2019,
    arXiv:1807.02264), so there is no critic. A task derives from this and from its offline class, calls that one's
    constructor and `online`, and brings `environment`.

    Logged beside the rest: ``cost/playing_share``, the share of the time of a step that playing took, and
    ``train/reward``, the mean reward of a step of an episode.
    """

    group: int
    discount: float

    def online(
        self, group: int, discount: float, epochs: int, minibatches: int, clip: float, entropy: tuple[float, float]
    ) -> None:
        """Note how to learn.

        Args:
            group: Episodes with the same start.
            discount: Weight of a reward one step later.
            epochs: Passes over the episodes of a step.
            minibatches: Parts of a pass.
            clip: Bound on the change of a probability, as a share.
            entropy: Weight of the policy's entropy at the start and at the end of training.
        """
        self.plays(epochs, minibatches, clip, entropy)
        if self.head is None:
            raise UserError(f"{type(self).__name__} learns by playing, which takes choices that are fixed in number")
        if group < 2:
            raise UserError(f"{type(self).__name__}: group is {group}; it must be at least 2")
        self.group, self.discount = group, discount

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Play, then improve the policy; one step of the trainer."""
        began = now()
        with evaluating(self):  # dropout would make the policy another one at every look
            played = self._play(self.sessions(batch))
            middle = now()
            steps = self._steps(played)
            with torch.no_grad():
                steps["chance"] = self._chances(steps)[0]
            loss = self.improve(len(steps["action"]), lambda part, weight: self._surrogate(steps, part, weight))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/reward", float(played.rewards[played.alive].mean()), prog_bar=True)
        self.log("cost/playing_share", (middle - began) / (now() - began))
        return loss

    def _play(self, sessions: list[int]) -> Rollout:
        policy = LanguageModelPolicy(self, draw=True)
        policy.reseed(self.global_step)
        return rollout(self.environment("train"), policy, np.repeat(sessions, self.group).tolist(), record=True)

    def _steps(self, played: Rollout) -> Batch:
        """Windows of whole episodes (N, T, ...), with ``gain`` (N, T)."""
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
        return rows | {"mask": mask, "step": step, "gain": gains}

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
