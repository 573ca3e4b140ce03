"""Where TensorBoard's events go."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def writer_of(trainer: Trainer) -> Any:
    """Return the trainer's `torch.utils.tensorboard.SummaryWriter`; None without one, and in all processes but one."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
