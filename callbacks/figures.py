"""Figures of what the model under training does, beside baselines, in TensorBoard."""

import time
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.events import writer_of
from callbacks.rollout import evaluation_of
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError

Tables = dict[str, pd.DataFrame]


class Figures(Callback):
    """Shows ``figures/<name>`` at the end of validations: what the data's `figures` draws, if it draws anything.

    Nothing happens between training steps. Of a task that acts, the episodes of the evaluation by rollout are drawn,
    which it plays anyway; of others, the data's `watch` predicts a part of the validation split. Baselines run once.
    The first validation of a run is drawn, the last one, and each between them for which all drawing so far, itself
    included, keeps to its share of the time since training began. Drawing changes no random numbers: a run without it
    has the same losses.

    Args:
        share: Of the time since training began, what all of this may take; 1 draws at every validation.
        baselines: Policies to compare with; null takes those of the table at the end of `fit`.
    """

    def __init__(self, share: float = 0.02, baselines: list[str] | None = None) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"Figures: share is {share}; it must lie between 0 and 1")
        self.share, self.baselines = share, baselines
        self.spent_s = 0.0
        """Seconds that this took so far."""
        self._expected = self._watching_s = 0.0
        self._began = 0.0
        self._due = False
        self._own: Tables | None = None
        self._others: dict[str, Tables] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether this validation is drawn, and tell the evaluation by rollout to keep its episodes."""
        self._own, self._watching_s = None, 0.0
        self._due = not trainer.sanity_checking and self._draws(trainer) and self._affordable(trainer)
        evaluation = evaluation_of(trainer)
        if evaluation is not None:
            evaluation.keep = self._due

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict now, while the weights are those that are validated."""
        if not self._due or evaluation_of(trainer) is not None:
            return
        start = time.perf_counter()
        with isolate_rng(), trainer.precision_plugin.val_step_context(), torch.no_grad():
            self._own = _data(trainer).watch(pl_module)
        self._watching_s = self._took(start)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        evaluation = evaluation_of(trainer)
        own = self._own if evaluation is None else evaluation.kept
        if not self._due or own is None:
            return
        from netllm_pl.drawing import pixels  # imported late: matplotlib takes a while

        start, data, writer = time.perf_counter(), _data(trainer), writer_of(trainer)
        with isolate_rng():
            if self._others is None:
                names = data.compared if self.baselines is None else self.baselines
                self._others = {name: data.watch(data.policy(name, "valid")) for name in names}
                self._took(start)
                start = time.perf_counter()
            for name, figure in data.figures({"model": own} | self._others).items():
                writer.add_image(
                    f"figures/{name}",
                    pixels(figure),
                    trainer.fit_loop.epoch_loop._batches_that_stepped,
                    dataformats="HWC",
                )
        self._expected = self._watching_s + self._took(start)

    def _draws(self, trainer: Trainer) -> bool:
        data = getattr(trainer, "datamodule", None)
        return (
            isinstance(data, NetDataModule)
            and type(data).figures is not NetDataModule.figures
            and (writer_of(trainer) is not None)
        )

    def _affordable(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit" or not self._expected or trainer.global_step >= trainer.estimated_stepping_batches:
            return True
        return self.spent_s + self._expected <= self.share * (time.perf_counter() - self._began)

    def _took(self, start: float) -> float:
        seconds = time.perf_counter() - start
        self.spent_s += seconds
        return seconds


def _data(trainer: Any) -> NetDataModule:
    data: NetDataModule = trainer.datamodule
    return data
