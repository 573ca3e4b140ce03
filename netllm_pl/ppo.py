"""Learning by playing with PPO (Schulman et al., 2017, arXiv:1707.06347): what all tasks that do so share.

Shapes: N episodes side by side, T steps of an episode, R steps of all episodes together.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from netllm_pl.acting import ActingTask
from netllm_pl.data import Batch
from netllm_pl.errors import UserError
from netllm_pl.rollout import Environment, rollout
from netllm_pl.task import OptimizerConfig


class PlayingTask(ActingTask):
    """A task that learns from episodes that it plays: a training step plays some, then learns from them for a while.

    Its data gives numbers of episodes, ``session`` (B,), instead of experience. A task overrides `environment`,
    `as_policy`, and `training_step`, which plays and calls `improve`.

    Args:
        optimizer: AdamW's settings.
        epochs: Passes over the steps that were played.
        minibatches: Parts of a pass.
        clip: Bound on the change of a probability, as a share.
        entropy: Weight of the policy's entropy at the start and at the end of training; it falls geometrically.
    """

    answer_columns: ClassVar[tuple[str, ...]] = ("reward",)

    def __init__(
        self, optimizer: OptimizerConfig, epochs: int, minibatches: int, clip: float, entropy: tuple[float, float]
    ) -> None:
        super().__init__(None, optimizer)
        self.plays(epochs, minibatches, clip, entropy)

    def plays(self, epochs: int, minibatches: int, clip: float, entropy: tuple[float, float]) -> None:
        """Note how to learn; for tasks that are built in another way, arguments as above."""
        if min(epochs, minibatches) < 1 or min(entropy) <= 0:
            raise UserError(
                f"{type(self).__name__}: epochs is {epochs}, minibatches {minibatches} (at least 1), entropy "
                f"{tuple(entropy)} (both above 0)"
            )
        self.automatic_optimization = False
        self.epochs, self.minibatches, self.clip, self.entropy = epochs, minibatches, clip, entropy

    @abstractmethod
    def environment(self, split: str) -> Environment:
        """Return what training (train), validation and test episodes are played in."""

    # Evaluation -------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Play the episodes of a batch, validation or test; return the mean reward of a step of each (N,).

        A task with a language model is asked for its scores, too, for steps that were played.
        """
        if "session" not in batch and self.backbone is not None:
            scores: Tensor = super().forward(batch)
            return scores
        split = "valid" if self.trainer.validating or self.trainer.sanity_checking else "test"
        played = rollout(self.environment(split), self.as_policy(), self.sessions(batch))
        return torch.from_numpy(played.returns / played.alive.sum(0)).float().to(self.device)

    def loss(self, prediction: Any, batch: Batch) -> Tensor:
        """The negative mean reward of a step."""
        loss: Tensor = -prediction.mean()
        return loss

    def build_metrics(self) -> MetricCollection:
        """None: whole episodes are measured by `RolloutEvaluation`."""
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, prediction: Any, batch: Batch) -> None:
        """Nothing to feed."""

    # Training ---------------------------------------------------------------------------------------------------------

    def sessions(self, batch: Batch) -> list[int]:
        """Numbers of the episodes of a batch; in training others in every epoch."""
        if "session" not in batch:
            name = type(self).__name__
            raise UserError(f"{name} learns by playing, not from recorded experience; set data.experience to null")
        epoch = self.current_epoch << 32 if self.training else 0
        return [session + epoch for session in batch["session"].tolist()]

    def improve(self, count: int, loss_of: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Take the optimiser's steps, and one of the learning rate's schedule.

        Args:
            count: Steps that were played (R).
            loss_of: Gives the loss of some of them, from their numbers and the weight of the entropy.

        Returns:
            The mean loss.
        """
        optimizer: Any = self.optimizers()
        weight = self.entropy_weight()
        parts = [part for _ in range(self.epochs) for part in torch.randperm(count).chunk(self.minibatches)]
        losses = []
        for number, part in enumerate(parts):
            loss = loss_of(part.to(self.device), weight)
            optimizer.zero_grad()
            self.manual_backward(loss)
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            # The trainer counts steps of its own wrapper: one for each batch of episodes.
            (optimizer if number == len(parts) - 1 else optimizer.optimizer).step()
            losses.append(loss.detach())
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return torch.stack(losses).mean()

    def entropy_weight(self) -> float:
        """Weight of the entropy now."""
        return self.falling(*self.entropy)

    def falling(self, start: float, end: float) -> float:
        """What falls geometrically from the start to the end of training, now."""
        total = float(self.trainer.estimated_stepping_batches)
        done = 0.0 if total == float("inf") else min(self.global_step / total, 1.0)
        return float(start * (end / start) ** done)


def clipped(logs: Tensor, before: Tensor, gains: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective as a loss, a scalar.

    Args:
        logs: (R,) logarithms of the actions' probabilities.
        before: (R,) what they were when the actions were taken.
        gains: (R,) advantages.
        clip: Bound on the change of a probability, as a share.
    """
    ratio = (logs - before).exp()
    return -torch.minimum(ratio * gains, ratio.clamp(1 - clip, 1 + clip) * gains).mean()


def standardized(gains: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1."""
    return (gains - gains.mean()) / (gains.std() + 1e-6)


def advantages(rewards: Tensor, values: Tensor, discount: float | Tensor, smoothing: float | Tensor) -> Tensor:
    """Generalised advantage estimates (Schulman et al., 2016, arXiv:1506.02438) of whole episodes.

    Args:
        rewards: (T, N); 0 behind the end of an episode.
        values: (T, N) what a critic expects; 0 behind the end of an episode.
        discount: Weight of what comes one step later; (T, N) if steps last differently.
        smoothing: Lambda of the estimate; (T, N) if steps last differently.

    Returns:
        (T, N).
    """
    discounts, weights = (torch.as_tensor(value).to(rewards).expand_as(rewards) for value in (discount, smoothing))
    found = torch.zeros_like(rewards)
    after, last = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        last = rewards[t] + discounts[t] * after - values[t] + discounts[t] * weights[t] * last
        found[t], after = last, values[t]
    return found
