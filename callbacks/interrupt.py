"""Ctrl-C and SIGTERM in training: stop where a resumed run goes on exactly, with a checkpoint of that very step."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.resume import SaveOften
from netllm_pl.errors import Terminated
from netllm_pl.progress import is_first

SIGNALS = {
    signal.SIGINT: "stopping after this step or validation; press Ctrl-C again to stop at once",
    signal.SIGTERM: "terminated: stopping after this step or validation",
}
"""What is listened for, and what is said."""


class Stopped(BaseException):
    """Training was stopped by a signal, behind a checkpoint.

    Args:
        number: The signal that this process got; None if it was another process of the run.
    """

    def __init__(self, number: int | None) -> None:
        super().__init__(number)
        self.number = number


class StopAndSave(SaveOften):
    """Finishes the step, or the validation, in which Ctrl-C or SIGTERM comes, saves, and stops with `Stopped`.

    A second signal stops at once, with the last checkpoint that there is. Of several processes all stop at the same
    step, whichever of them was told to: they ask each other at every step.
    """

    def __init__(self, **where: Any) -> None:
        super().__init__(every_n_train_steps=1, **where)
        self._number: int | None = None
        self._asked = self._saved = False
        self._before: dict[signal.Signals, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop behind a checkpoint: only now the metrics of its step are written."""
        if self._saved:
            raise Stopped(self._number)
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs."""
        if self._saved:
            raise Stopped(self._number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if asked, unless the epoch ends, a validation comes first, or gradients only add up so far."""
        if self._agreed(trainer) and trainer.global_step > self._step:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._saved = self._last_global_step_saved == trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if asked."""
        if not trainer.sanity_checking and self._agreed(trainer):
            # SaveOften waits for a validation only if it was asked before: this one may have begun earlier.
            self._waits = not trainer.is_last_batch
            super().on_validation_end(trainer, pl_module)
            self._saved = self._last_global_step_saved == trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it to the checkpoint of the end of the epoch."""
        self._saved = self._agreed(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._leave()
        if self._saved:
            raise Stopped(self._number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._leave()

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether any process of the run was asked to stop; all of them come here at the same step."""
        self._asked = trainer.strategy.reduce_boolean_decision(self._number is not None, all=False)
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self._number = number
        if is_first():
            print(SIGNALS[signal.Signals(number)], file=sys.stderr, flush=True)

    def _leave(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
