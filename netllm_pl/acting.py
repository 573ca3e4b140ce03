"""Tasks that act in an environment, with or without a language model, and how they learn from recorded experience.

Shapes: B batch, W steps of a window, C choices, N episodes side by side.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from netllm_pl.data import Batch
from netllm_pl.errors import UserError
from netllm_pl.ragged import observed
from netllm_pl.rollout import Array, Observations, Policy
from netllm_pl.task import NetTask

Objective = Literal["values", "imitation"]
REGRET = 20.0
"""Regrets are cut there: beyond, an action is bad, and how bad does not matter."""
HUBER = 5.0
"""Errors up to this are squared. Rare disasters must raise the mean; the absolute error would learn the median."""


class ActingTask(NetTask):
    """A task whose policy plays whole episodes after validation, so that these choose the best checkpoint.

    Attributes:
        rollout_every: Validations between two evaluations by rollout.
    """

    rollout_every = 1

    @abstractmethod
    def as_policy(self) -> Policy:
        """Act in an environment."""

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add the evaluation by rollout, unless the trainer has one of its own."""
        from callbacks.rollout import RolloutEvaluation

        trainer: Any = self.trainer  # its callbacks are not declared
        own = any(isinstance(callback, RolloutEvaluation) for callback in trainer.callbacks)
        return [*super().configure_callbacks(), *([] if own else [RolloutEvaluation(self.rollout_every)])]

    def observe(self, observations: Observations, step: int) -> Batch:
        """Turn what an environment shows at a step (N, ...) into windows of one step (N, 1, ...).

        Observations that differ in length between episodes are laid out as those of experience (`netllm_pl.ragged`).
        """
        size = len(next(iter(observations.values())))
        return observed(observations, self.device) | {"step": torch.full((size, 1), step, device=self.device)}


class OfflineTask(ActingTask):
    """An acting task that scores choices (B, W, C) at every step of recorded windows.

    Attributes:
        objective: ``values``: Huber loss between scores and the negative regrets ``values - max(values)`` of the pool.
            ``imitation``: cross-entropy with the recorded actions.
    """

    objective: Objective = "values"

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Loss over the real steps."""
        real = batch["mask"]
        if self.objective == "imitation":
            return F.cross_entropy(prediction[real], batch["action"][real])
        return F.smooth_l1_loss(prediction[real], _regrets(batch)[real], beta=HUBER)

    def build_metrics(self) -> MetricCollection:
        """``accuracy``: share of recorded actions that score best; ``regret``: lost by the best score's action."""
        return MetricCollection({"accuracy": MeanMetric(), "regret": MeanMetric()})

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Batch) -> None:
        """Feed the real steps; without action values every action but the recorded one has a regret of 1."""
        real, chosen = batch["mask"], prediction.argmax(-1)
        hit = (chosen == batch["action"])[real].float()
        metrics["accuracy"].update(hit)
        lost = -_regrets(batch).gather(-1, chosen.unsqueeze(-1))[real] if "values" in batch else 1 - hit
        metrics["regret"].update(lost)


class Greedy:
    """Takes the best choice on what is seen now; for tasks without memory.

    Args:
        task: Scores choices (N, 1, C).
    """

    def __init__(self, task: ActingTask) -> None:
        self.task = task

    def reset(self, n: int) -> None:
        """Begin n episodes."""
        self.step = 0

    @torch.inference_mode()
    def act(self, observations: Observations) -> Array:
        """Decide for every episode."""
        batch = self.task.observe(observations, self.step)
        self.step += 1
        with evaluating(self.task):
            best: Array = self.task(batch)[:, 0].argmax(-1).cpu().numpy()
        return best


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def check_columns(batch: Batch, names: Sequence[str]) -> None:
    """Refuse experience without the columns that a task reads."""
    missing = [name for name in names if name not in batch]
    if missing:
        raise UserError(f"the experience has no column {missing[0]}; there are {', '.join(batch)}")


def _regrets(batch: Batch) -> Tensor:
    if "values" not in batch:
        raise UserError("objective 'values' needs action values, which the pool does not have; collect with --values")
    values = batch["values"].float()
    return (values - values.amax(-1, keepdim=True)).clamp_min(-REGRET)
