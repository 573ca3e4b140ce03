"""Ctrl-C in training: stop where a resumed run goes on exactly, with a checkpoint of that very step."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.resume import SaveOften


class Stopped(BaseException):
    """Training was stopped by the user, behind a checkpoint."""


class StopAndSave(SaveOften):
    """Finishes the step, or the validation, in which Ctrl-C comes, saves, and stops with `Stopped`.

    A second Ctrl-C stops at once, with the last checkpoint that there is. Where several processes train, each of which
    may be in another step, Ctrl-C stops at once, too.
    """

    def __init__(self, **where: Any) -> None:
        super().__init__(every_n_train_steps=1, **where)
        self._asked = self._saved = False
        self._before: Any = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for Ctrl-C."""
        super().on_train_start(trainer, pl_module)
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop behind a checkpoint: only now the metrics of its step are written."""
        if self._saved:
            raise Stopped
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs."""
        if self._saved:
            raise Stopped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if asked, unless the epoch ends, a validation comes first, or gradients only add up so far."""
        if self._asked and trainer.global_step > self._step:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._saved = self._last_global_step_saved == trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if asked."""
        if self._asked and not trainer.sanity_checking:
            # SaveOften waits for a validation only if it was asked before: this one may have begun earlier.
            self._waits = not trainer.is_last_batch
            super().on_validation_end(trainer, pl_module)
            self._saved = self._last_global_step_saved == trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it to the checkpoint of the end of the epoch."""
        self._saved = self._asked

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._leave()
        if self._saved:
            raise Stopped

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._leave()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("stopping after this step or validation; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def _leave(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
