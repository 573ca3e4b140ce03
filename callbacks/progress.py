"""Progress of Lightning's loops: its Rich bars on a terminal, plain lines elsewhere."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from netllm_pl.progress import Lines, attach, is_quiet


class Bars(RichProgressBar):
    """Lightning's bars; what takes long inside its loops, such as episodes that are played, has a line among them."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bars."""
        super().on_sanity_check_start(trainer, pl_module)
        attach(self.progress, math.inf)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bars."""
        super().on_train_start(trainer, pl_module)
        attach(self.progress, math.inf)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bars."""
        super().on_validation_start(trainer, pl_module)
        attach(self.progress, math.inf)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bars."""
        super().on_test_start(trainer, pl_module)
        attach(self.progress, math.inf)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bars."""
        super().on_predict_start(trainer, pl_module)
        attach(self.progress, math.inf)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bars away."""
        attach(None)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bars away."""
        attach(None)
        super().teardown(trainer, pl_module, stage)

    def _get_train_description(self, current_epoch: int) -> str:
        """Name the epoch; Lightning counts to -2 where the steps are limited and the epochs are not."""
        if self.trainer.max_epochs == -1:
            return f"Epoch {current_epoch}".ljust(len(self.validation_description))
        return super()._get_train_description(current_epoch)


class PlainProgress(ProgressBar):
    """Lines on standard error: every few seconds how far it is and how long it will take; each validation's metrics."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._lines: Lines | None = None

    def disable(self) -> None:
        """Write nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Write again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count steps, where a resumed run had arrived."""
        self._lines = Lines("training, step", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say which step it is, and the loss."""
        if self._lines is not None and self._enabled:
            self._lines.done = trainer.global_step
            if self._lines.due:
                metrics = self.get_metrics(trainer, pl_module)
                self._lines.tell(_listed({name: value for name, value in metrics.items() if name != "v_num"}))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self._enabled or is_quiet():
            return
        metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        Lines(f"validation at step {trainer.global_step}", None).write(f": {_listed(metrics)}")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Count batches, outside training."""
        if trainer.state.fn == "validate":
            self._count("validating, batch", trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Count batches."""
        self._count("testing, batch", trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Count batches."""
        self._count("predicting, batch", trainer.num_predict_batches)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was counted."""
        self._lines = None

    def _count(self, text: str, batches: list[int | float]) -> None:
        if self._enabled:
            self._lines = self._lines or Lines(text, sum(batches))
            self._lines.advance()


def _listed(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
