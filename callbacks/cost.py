"""What a run costs, in every logger."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.rollout import evaluation_of
from netllm_pl.machine import peak_memory
from netllm_pl.quantize import weight_count
from netllm_pl.timing import now


class CostMonitor(Callback):
    """Logs ``cost/samples_per_s``, ``cost/peak_memory_gb``, ``cost/decision_ms`` and ``cost/trainable_fraction``.

    Samples a second are those of training since the last such log, of all processes, without the first batch of a run,
    in which things warm up, and without validation; every ``log_every_n_steps`` and before each validation. The peak
    of memory is that of the GPU's tensors, or of the process on a CPU. The time of a decision is that of validation, in
    which many are made at once: of a task that acts, the policy's own time in the episodes that it plays; of others,
    that of validation batches, loading and metrics included. The trainable fraction is that of all weights, frozen
    ones included. A step costs two additions; the device is not waited for.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._since: float | None = None
        self._rest = 0.0
        self._validated = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what does not change."""
        self._since, self._samples = None, 0
        weights = list(pl_module.parameters())
        learning = sum(weight_count(weight) for weight in weights if weight.requires_grad)
        _log(trainer, {"trainable_fraction": learning / sum(map(weight_count, weights))})
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; log now and then."""
        if self._since is None:
            self._since = now(wait=False)
            return
        self._samples += trainer.world_size * _size(batch)
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_rate(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log_rate(trainer)
        self._rest, self._validated = now(), 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *more: Any
    ) -> None:
        """Count predictions."""
        self._validated += _size(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long predictions took."""
        self._predicting = now() - self._rest

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the cost of decisions, and memory; go on with training."""
        if not trainer.sanity_checking:
            evaluation = evaluation_of(trainer)
            each = 1000 * self._predicting / max(1, self._validated) if evaluation is None else evaluation.decision_ms
            memory = {"peak_memory_gb": peak_memory(pl_module.device)["peak_memory_gb"]}
            _log(trainer, memory | ({} if each is None else {"decision_ms": each}))
        if self._since is not None:
            self._since += now(wait=False) - self._rest

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the memory of trainings without a validation, too."""
        _log(trainer, {"peak_memory_gb": peak_memory(pl_module.device)["peak_memory_gb"]})

    def _log_rate(self, trainer: Trainer) -> None:
        if self._since is None or not self._samples:
            return
        time = now(wait=False)
        _log(trainer, {"samples_per_s": self._samples / (time - self._since)})
        self._since, self._samples = time, 0


def _log(trainer: Trainer, costs: dict[str, float]) -> None:
    """Write to all loggers, at the step at which Lightning writes the metrics of now."""
    if trainer.is_global_zero:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({f"cost/{name}": value for name, value in costs.items()}, step)


def _size(batch: Any) -> int:
    first = next(iter(batch.values()))
    # Of several tasks that train together there is a batch of each.
    return sum(map(_size, batch.values())) if isinstance(first, dict) else len(first)
