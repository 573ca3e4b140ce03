"""Evaluation in the loop: plays whole episodes with the task's own policy at the end of validation and of test."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError


class RolloutEvaluation(Callback):
    """Logs what the policy under training is worth: ``val/<metric>`` and ``test/<metric>`` of the data's metrics.

    The policy is the task's ``as_policy()``, which decides greedily; the episodes are those of the validation (or test)
    split, the same ones each time. In training the first validation plays, so that there is a best checkpoint from
    then on, and every n-th after it; whoever monitors the values sees the last ones at a validation between two. A
    sanity check plays nothing. Every process plays the same episodes and logs the mean over processes, so all of them
    agree on the best checkpoint.

    Args:
        every_n: Play at every n-th validation.
    """

    def __init__(self, every_n: int = 1) -> None:
        if every_n < 1:
            raise UserError(f"RolloutEvaluation: every_n is {every_n}; it must be at least 1")
        self.every_n = every_n
        self._validations = 0
        self._last: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a task that cannot act before anything is trained."""
        if not callable(getattr(pl_module, "as_policy", None)):
            raise UserError(
                f"{type(pl_module).__name__} has no as_policy(), so it plays no episodes; "
                "take RolloutEvaluation out of trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a resumed run know the last values, for validations that come before the next episodes."""
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._last.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Play the validation episodes."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._validations += 1
            if (self._validations - 1) % self.every_n:
                return  # Lightning keeps the last values for callbacks
        self._last = self._play(trainer, pl_module, "valid", "val")
        pl_module.log_dict(self._last, sync_dist=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Play the test episodes."""
        pl_module.log_dict(self._play(trainer, pl_module, "test", "test"), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Return how many validations there were, and the last values."""
        return {"validations": self._validations, "last": dict(self._last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations, self._last = state_dict["validations"], dict(state_dict["last"])

    @staticmethod
    def _play(trainer: Trainer, pl_module: Any, split: str, prefix: str) -> dict[str, float]:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, NetDataModule):
            raise UserError("RolloutEvaluation needs a data module that knows the episodes; give the trainer one")
        frame = data.episodes(pl_module.as_policy(), split=split)
        means = {metric: float(frame[metric.column].mean()) for metric in data.metrics}
        return {f"{prefix}/{m.name}": float(np.sqrt(mean)) if m.root else mean for m, mean in means.items()}
