"""Tasks that act in an environment, with or without a language model, and how they learn from recorded experience.

Shapes: B batch, W steps of a window, C choices, N episodes side by side.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from netllm_pl.data import Batch
from netllm_pl.encoders import padded
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.processes import mean
from netllm_pl.ragged import LENGTH, observed, real_of
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
    answer_columns: ClassVar[tuple[str, ...]] = ("scores",)

    def choose(self, scores: Any, batch: Batch, generator: np.random.Generator | None = None) -> Tensor:
        """Turn the scores of steps into actions (B, W, ...).

        Args:
            scores: What `forward` gives, (B, W, ...); of candidates there may be more than in the batch, masked.
            batch: The observations.
            generator: Draws actions, each as likely as the softmax of the scores says; None takes the best.
        """
        return pick(scores, generator)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Scores of a batch; actions where not all steps have the same choices."""
        scores: Any = self(batch)
        ragged = any(name + LENGTH in batch for name in batch)
        prediction: Tensor = self.choose(scores, batch) if ragged else scores
        return prediction

    def loss(self, prediction: Any, batch: Batch) -> Tensor:
        """Loss over the real steps."""
        real = batch["mask"]
        if self.objective == "imitation":
            scores, action = torch.where(real.unsqueeze(-1), prediction, 0), torch.where(real, batch["action"], 0)
            each = F.cross_entropy(scores.flatten(0, 1), action.flatten().long(), reduction="none")
            return mean(each, real.flatten())
        regrets, known = _regrets(batch)
        known = known & real.unsqueeze(-1)
        # Neither padding nor choices that are not allowed have a say, whatever their scores are.
        scores, regrets = torch.where(known, prediction, 0), torch.where(known, regrets, 0)
        return mean(F.smooth_l1_loss(scores, regrets, beta=HUBER, reduction="none"), known)

    def build_metrics(self) -> MetricCollection:
        """``accuracy``: share of recorded actions that score best; ``regret``: lost by the best score's action."""
        return MetricCollection({"accuracy": RealMean(), "regret": RealMean()})

    def update_metrics(self, metrics: MetricCollection, prediction: Any, batch: Batch) -> None:
        """Feed the real steps; without action values every action but the recorded one has a regret of 1."""
        real, chosen = batch["mask"], prediction.argmax(-1)
        hit = (chosen == batch["action"]).float()
        metrics["accuracy"].update(hit, real)
        lost = -_regrets(batch)[0].gather(-1, chosen.unsqueeze(-1)).squeeze(-1) if "values" in batch else 1 - hit
        metrics["regret"].update(lost, real)


class RealMean(Metric):
    """Mean of what is real; torchmetrics' own waits for the GPU at each update."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, real: Tensor | None = None) -> None:
        """Add values of any shape, and which of them are real, if not all are."""
        self.total += (values if real is None else torch.where(real, values, 0)).double().sum()
        self.count += values.numel() if real is None else real.sum()

    def compute(self) -> Tensor:
        """Return the mean so far."""
        return (self.total / self.count).float()


class Greedy:
    """Takes the best choice on what is seen now; for tasks without memory.

    Args:
        task: Scores the choices of a step.
    """

    def __init__(self, task: OfflineTask) -> None:
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
            best: Array = self.task.choose(self.task(batch), batch)[:, 0].cpu().numpy()
        return best


def pick(scores: Tensor, generator: np.random.Generator | None = None) -> Tensor:
    """Choose along the last axis of scores (..., C): the best (...), or one drawn from their softmax."""
    if generator is None:
        return scores.argmax(-1)
    # Gumbel-max: the softmax need not be computed.
    values = scores.float().cpu().numpy()
    noise = generator.gumbel(size=values.shape)
    drawn = np.where(values > IMPOSSIBLE / 2, values + noise, values).argmax(-1)
    return torch.from_numpy(drawn).to(scores.device)


def chosen_of(values: Tensor, number: Tensor) -> Tensor:
    """Take what belongs to the chosen candidate (B, W), number 0 or above, out of values (B, W, K, ...)."""
    rows, steps = (torch.arange(size, device=number.device) for size in number.shape)
    return values[rows[:, None], steps, number]


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while."""
    if not module.training:  # a large model has thousands of parts, and this is asked at every decision
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()


def _regrets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative regrets (B, W, C), and which of them there are (B, W, C) bool."""
    if "values" not in batch:
        raise UserError("objective 'values' needs action values, which the pool does not have; collect with --values")
    values = batch["values"].float()
    known = torch.ones_like(values, dtype=torch.bool)
    lengths = batch.get("values" + LENGTH)
    if lengths is not None:
        lines = padded(values, lengths.flatten()).values
        known = real_of(lengths, lines.shape[1])
        values = lines.view(known.shape).masked_fill(~known, IMPOSSIBLE)
    return (values - values.amax(-1, keepdim=True)).clamp_min(-REGRET), known
