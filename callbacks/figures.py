"""Figures of what the model under training does, beside baselines, in TensorBoard."""

import time
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.events import writer_of
from callbacks.moving_average import averaged
from callbacks.rollout import evaluation_of
from netllm_pl.backbone import is_sharded
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError

Tables = dict[str, pd.DataFrame]

FIRST_S = 2.0
"""Seconds that the first figures of a run are expected to take, with the baselines."""


class Figures(Callback):
    """Shows ``figures/<name>`` at the end of validations: what the data's `figures` draws, if it draws anything.

    Nothing happens between training steps. Of a task that acts, the episodes of the evaluation by rollout are drawn,
    which it plays anyway; of others, the data's `watch` predicts a part of the validation split. Baselines run once.
    A validation is drawn if all drawing so far, itself included, keeps to its share of the time since training began;
    `FIRST_S` is set aside for the first, of which nobody knows what it takes. What the model does in the end is drawn
    when training is over: no step waits for it, and a run too short for its share to hold a drawing shows one all the
    same. Where layers are shared out over processes (`netllm_pl.sharded`), only tasks that act are drawn. Drawing
    changes no random numbers: a run without it has the same losses.

    Args:
        share: Of the time since training began, what drawing may keep it waiting; 1 draws at every validation.
        baselines: Policies to compare with; null takes those of the table at the end of `fit`.
    """

    def __init__(self, share: float = 0.02, baselines: list[str] | None = None) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"Figures: share is {share}; it must lie between 0 and 1")
        self.share, self.baselines = share, baselines
        self.spent_s = 0.0
        """Seconds that this took so far."""
        self._expected, self._watching_s = FIRST_S, 0.0
        self._began = 0.0
        self._due = False
        self._shown = -1  # training steps behind the last figures
        self._own: Tables | None = None
        self._undrawn: tuple[Tables, int, int] | None = None  # episodes, and after how many steps and batches
        self._others: dict[str, Tables] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began, self._shown, self._undrawn = time.perf_counter(), trainer.global_step, None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether this validation is drawn, and tell the evaluation by rollout to keep its episodes."""
        self._own, self._watching_s = None, 0.0
        draws = not trainer.sanity_checking and _draws(trainer, pl_module)
        self._due = draws and self._affordable(trainer)
        evaluation = evaluation_of(trainer)
        if evaluation is not None:
            evaluation.keep = draws

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict now, while the weights are those that are validated."""
        if self._due and evaluation_of(trainer) is None:
            self._watching_s = self._watch(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, or keep for the end of training what was played."""
        evaluation = evaluation_of(trainer)
        own = self._own if evaluation is None else evaluation.kept
        if own is None:
            return
        if self._due:
            self._draw(trainer, own, trainer.global_step, _batches(trainer))
        else:
            self._undrawn = own, trainer.global_step, _batches(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the model does in the end, unless a validation after the last step was drawn."""
        if trainer.global_step == self._shown or not trainer.enable_validation or not _draws(trainer, pl_module):
            return
        if evaluation_of(trainer) is None:
            modes = {module: module.training for module in pl_module.modules()}
            with averaged(trainer):
                self._watching_s = self._watch(trainer, pl_module.eval())
            for module, learns in modes.items():
                module.training = learns
            assert self._own is not None
            self._undrawn = self._own, trainer.global_step, _batches(trainer) - 1
        if self._undrawn is not None:
            self._draw(trainer, *self._undrawn)

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> float:
        start = time.perf_counter()
        with isolate_rng(), trainer.precision_plugin.val_step_context(), torch.no_grad():
            self._own = _data(trainer).watch(pl_module)
        return self._took(start)

    def _draw(self, trainer: Trainer, own: Tables, step: int, batches: int) -> None:
        from netllm_pl.drawing import pixels  # imported late: matplotlib takes a while

        start, data, writer = time.perf_counter(), _data(trainer), writer_of(trainer)
        with isolate_rng():
            if self._others is None:
                names = data.compared if self.baselines is None else self.baselines
                self._others = {name: data.watch(data.policy(name, "valid")) for name in names}
                self._took(start)
                start = time.perf_counter()
            for name, figure in data.figures({"model": own} | self._others).items():
                writer.add_image(f"figures/{name}", pixels(figure), batches, dataformats="HWC")
        self._expected = self._watching_s + self._took(start)
        self._shown, self._undrawn = step, None

    def _affordable(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit" or self.share == 1:
            return True
        return self.spent_s + self._expected <= self.share * (time.perf_counter() - self._began)

    def _took(self, start: float) -> float:
        seconds = time.perf_counter() - start
        self.spent_s += seconds
        return seconds


def _draws(trainer: Trainer, task: LightningModule) -> bool:
    if is_sharded(task) and evaluation_of(trainer) is None:
        return False  # only the first process would predict, and it cannot alone
    data = getattr(trainer, "datamodule", None)
    draws = isinstance(data, NetDataModule) and type(data).figures is not NetDataModule.figures
    return draws and writer_of(trainer) is not None


def _batches(trainer: Trainer) -> int:
    """Return the step at which Lightning writes the metrics of now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _data(trainer: Any) -> NetDataModule:
    data: NetDataModule = trainer.datamodule
    return data
