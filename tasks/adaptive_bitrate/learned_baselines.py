"""Learned baselines without a language model, trained through the same command line.

Shapes: N sessions side by side, T chunks of a session, S columns of the state, A actions.
"""

import numpy as np
import torch
from torch import Tensor, nn

from netllm_pl.data import Batch
from netllm_pl.errors import UserError, at_least
from netllm_pl.ppo import PlayingTask, advantages, clipped, standardized
from netllm_pl.rollout import Array, Observations, Policy, rollout
from netllm_pl.task import OptimizerConfig
from tasks.adaptive_bitrate.data import AdaptiveBitrateData
from tasks.adaptive_bitrate.pensieve import Pensieve as PensievePolicy
from tasks.adaptive_bitrate.pensieve import PensieveActor, pensieve_state
from tasks.adaptive_bitrate.simulator import Simulator, Video
from tasks.adaptive_bitrate.videos import PUBLISHED_LADDER


class Pensieve(PlayingTask):
    """Pensieve's network (Mao et al., SIGCOMM 2017), trained by playing: PPO (Schulman et al., 2017, arXiv:1707.06347).

    A training step plays a batch of sessions with random traces, starts and noise, and learns from them for some
    epochs. Several sessions share a trace, start and noise, and only how a session does against the others of its group
    counts: a critic cannot know the bandwidth to come, which is most of what returns differ by (Mao et al., ICLR 2019,
    arXiv:1807.02264). Set ``data.experience`` to null: then ``data.batch_size`` is the number of groups in a step, and
    ``data.sessions`` that of groups in an epoch.

    Args:
        optimizer: AdamW's settings.
        ladder_kbps: Bitrates of the video.
        hidden: Width of the layers.
        relative: Choose among down, stay and up, as published for Genet; otherwise among all levels.
        group: Sessions of the same trace, start and noise.
        epochs: Passes over the chunks of a step.
        minibatches: Parts of a pass.
        clip: Bound on the change of a probability, as a share.
        discount: Weight of a reward one chunk later.
        smoothing: Lambda of the generalised advantage estimate (Schulman et al., 2016, arXiv:1506.02438).
        entropy: Weight of the policy's entropy at the start and at the end of training; it falls geometrically.
        reward_scale: Rewards are multiplied by it for the critic.
    """

    monitor = "val/qoe"
    monitor_mode = "max"

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        ladder_kbps: tuple[int, ...] = PUBLISHED_LADDER,
        hidden: int = 128,
        relative: bool = True,
        group: int = 8,
        epochs: int = 4,
        minibatches: int = 4,
        clip: float = 0.2,
        discount: float = 0.99,
        smoothing: float = 0.95,
        entropy: tuple[float, float] = (0.1, 0.002),
        reward_scale: float = 0.1,
    ) -> None:
        optimizer = optimizer or OptimizerConfig(lr=1e-3, weight_decay=0.0)
        super().__init__(optimizer, epochs, minibatches, clip, entropy)
        at_least(2, "Pensieve: ", group=group)
        ladder = np.asarray(ladder_kbps, dtype=np.int64)
        self.video = Video("any of this ladder", ladder, np.zeros((0, len(ladder)), dtype=np.int64))
        self.net = PensieveActor(len(ladder), hidden=hidden, relative=relative, critic=True)
        self.group, self.discount, self.smoothing, self.reward_scale = group, discount, smoothing, reward_scale

    def as_policy(self) -> Policy:
        """Take the likeliest action."""
        return PensievePolicy(self.net, self.video)

    def environment(self, split: str) -> Simulator:
        """Return the split's own sessions; in training, random ones."""
        return self._data().simulator(split, "random" if split == "train" else None)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Play, then improve the policy; one step of the trainer."""
        player = _Player(self)
        played = rollout(self.environment("train"), player, np.repeat(self.sessions(batch), self.group).tolist())
        states, actions, chances = (torch.stack(part) for part in (player.states, player.actions, player.chances))
        rewards = torch.from_numpy(played.rewards).to(states) * self.reward_scale
        with torch.no_grad():
            values = self.net.value(states.flatten(0, 1)).view_as(rewards)
        gains = advantages(rewards, values, self.discount, self.smoothing)
        targets = gains + values
        gains = gains.unflatten(1, (-1, self.group))
        gains = standardized((gains - gains.mean(2, keepdim=True)).flatten(1))
        rows = [part.flatten(0, 1) for part in (states, actions, chances, gains, targets)]
        loss = self.improve(len(rows[0]), lambda part, weight: self._surrogate([row[part] for row in rows], weight))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/qoe", float(played.rewards.mean()), prog_bar=True)
        return loss

    def _surrogate(self, rows: list[Tensor], weight: float) -> Tensor:
        """PPO's clipped objective, the critic's error and the entropy, of rows (R, ...)."""
        states, actions, chances, gains, targets = rows
        logs = self.net(states).log_softmax(1)
        policy = clipped(logs.gather(1, actions[:, None])[:, 0], chances, gains, self.clip)
        entropy = -(logs.exp() * logs).sum(1).mean()
        critic = nn.functional.smooth_l1_loss(self.net.value(states), targets)
        loss: Tensor = policy + 0.5 * critic - weight * entropy
        return loss

    def _data(self) -> AdaptiveBitrateData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, AdaptiveBitrateData):
            raise UserError("Pensieve learns by playing; give it AdaptiveBitrateData")
        return data


class _Player:
    """Draws actions and keeps what training needs.

    Attributes:
        states: T tensors (N, 6, S).
        actions: T tensors (N,).
        chances: T tensors (N,), logarithms of the actions' probabilities.
    """

    def __init__(self, task: Pensieve) -> None:
        self.task = task
        self.states: list[Tensor] = []
        self.actions: list[Tensor] = []
        self.chances: list[Tensor] = []

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    @torch.no_grad()
    def act(self, observations: Observations) -> Array:
        net = self.task.net
        state = torch.from_numpy(pensieve_state(observations, self.task.video, net.length)).to(self.task.device)
        logs = net(state).log_softmax(1)
        action = torch.multinomial(logs.exp(), 1)
        for kept, new in (
            (self.states, state),
            (self.actions, action[:, 0]),
            (self.chances, logs.gather(1, action)[:, 0]),
        ):
            kept.append(new)
        return net.level_of(action[:, 0].cpu().numpy(), observations["level"])
