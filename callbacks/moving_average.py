"""Moving average of the weights: steadier than the weights of any one step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class MovingAverage(Callback):
    """Validates, saves and ends with an exponential moving average of the weights that learn.

    Training itself goes on with the latest weights. Frozen weights are neither copied nor averaged: it costs one copy
    of what learns. A checkpoint holds the average as the model's weights and the latest ones beside it: a resumed run
    equals an uninterrupted one, bit by bit. `OptimizerConfig.ema` adds it to any task. Checkpoints of weights only
    (`save_weights_only`), for which Lightning calls no callback, hold the latest weights.

    Args:
        decay: Share of the average that a step keeps; it rises to that from 2/11, so that the first weights are soon
            forgotten. 0.99 averages over about a hundred steps.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self._learning: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}
        self._swapped = False
        self._updates = 0
        self._step = 0
        self._resumed: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the current weights, which are the average if a checkpoint was loaded."""
        self._learning = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
        self._average = {name: weight.clone() for name, weight in self._learning.items()}
        self._step = trainer.global_step
        for name, weight in self._resumed.items():
            self._learning[name].copy_(weight)
        self._resumed = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the weights of a step; batches whose gradients only add up are none."""
        if trainer.global_step == self._step:
            return
        self._step, self._updates = trainer.global_step, self._updates + 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        learning = [self._learning[name] for name in self._average]
        torch._foreach_lerp_(list(self._average.values()), learning, 1 - decay)  # few kernels for many weights

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the latest weights."""
        self._swap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no half-done exchange behind."""
        if self._swapped:
            self._swap()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        self._swap()
        self._learning, self._average, self._swapped = {}, {}, False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights of the model."""
        checkpoint["state_dict"] |= self._learning if self._swapped else self._average

    def state_dict(self) -> dict[str, Any]:
        """Return the latest weights and how many steps the average has seen."""
        return {"updates": self._updates, "learning": dict(self._average if self._swapped else self._learning)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the latest weights until training goes on: the average, loaded as the model's, is taken first."""
        self._updates, self._resumed = state_dict["updates"], state_dict["learning"]

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._average.items():
            latest = self._learning[name].clone()
            self._learning[name].copy_(average)
            average.copy_(latest)
        self._swapped = bool(self._average) and not self._swapped


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """Let the model in training have its average, if the trainer keeps one, while the body runs."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    own = [callback for callback in callbacks if isinstance(callback, MovingAverage)]
    for callback in own:
        callback._swap()
    try:
        yield
    finally:
        for callback in own:
            callback._swap()
