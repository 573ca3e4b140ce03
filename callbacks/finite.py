"""Training stops at a loss that is no number, with the batch saved that gave it."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from netllm_pl.data import Loader
from netllm_pl.errors import UserError
from netllm_pl.paths import atomic
from netllm_pl.sharded import Sharded

NAME = "nonfinite-step{step}.ckpt"


class _Seen(NamedTuple):
    """A loss on its way to the host, and what it came from.

    Attributes:
        loss: (), on the host once it is ready.
        ready: Says whether it is, without waiting.
        batch: What was trained on.
        number: Of the batch in the epoch.
        step: Of the optimiser, that was to follow.
        random: State of torch's generator before the batch.
    """

    loss: Tensor
    ready: Callable[[], bool]
    batch: Any
    number: int
    step: int
    random: Tensor


class StopAtNonFinite(Callback):
    """Looks at the loss before each backward pass, and raises a `UserError` if it is not finite.

    The message names the samples with numbers that are not finite, if there are any, and the checkpoint with the batch:
    `netllm_pl.checkpoint.load_failure` reads it. On a GPU nothing waits for the loss: it is looked at when it has
    arrived, a step later or two.

    Args:
        folder: Where the checkpoint goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: deque[_Seen] = deque()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what is trained on."""
        self._batch, self._number, self._random = batch, batch_idx, torch.get_rng_state()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the losses that have arrived: on a CPU at this one."""
        host, ready = _on_its_way(loss.detach())
        self._waiting.append(_Seen(host, ready, self._batch, self._number, trainer.global_step, self._random))
        self._look(trainer, pl_module, wait=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last ones."""
        self._look(trainer, pl_module, wait=True)

    def _look(self, trainer: Trainer, pl_module: LightningModule, wait: bool) -> None:
        if wait and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        while self._waiting and self._waiting[0].ready():
            seen = self._waiting.popleft()
            if not seen.loss.isfinite().all():
                raise UserError(self._stop(trainer, pl_module, seen))

    def _stop(self, trainer: Trainer, task: LightningModule, seen: _Seen) -> str:
        """Save what there is, and say what to do."""
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.folder / NAME.format(step=f"{seen.step}{rank}")
        # Others would gather what learns from processes that go on with training.
        whole = isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy | Sharded)
        saved: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=True) if whole else {}
        cpu = torch.device("cpu")
        indices = _indices(trainer, seen.number)
        saved |= {"batch": move_data_to_device(seen.batch, cpu), "samples": indices, "random": seen.random}
        with atomic(path) as partial:
            torch.save(saved, partial)
        late = trainer.global_step - seen.step
        weights = "the weights before it" if not late else f"the weights of {late} steps later (last.ckpt is older)"
        causes = [*_causes(trainer, saved["batch"], indices)]
        cause = f" {'; '.join(causes[:2])}." if causes else " All numbers of the batch are finite: lower optimizer.lr?"
        again = f"task, batch = load_failure('{path}'); task.training_step(batch, 0)"
        return (
            f"the loss is {seen.loss.item()} at step {seen.step} (epoch {trainer.current_epoch}, batch {seen.number})."
            f"{cause}\nThe batch and {weights} are in {path}; again, with load_failure of netllm_pl.checkpoint: {again}"
        )


def _on_its_way(loss: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """Start to bring a loss to the host; return where it arrives, and what says whether it has."""
    if not loss.is_cuda:
        return loss, lambda: True
    host = torch.empty_like(loss, device="cpu", pin_memory=True)
    host.copy_(loss, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.query


def _indices(trainer: Trainer, number: int) -> list[int]:
    """Numbers of the samples of a batch of this epoch; none where the loader is not ours."""
    loader = trainer.train_dataloader
    if not isinstance(loader, Loader):
        return []
    order = copy.copy(loader.sampler)
    order.begin = 0  # a resumed epoch begins in its middle
    return next((batch for place, batch in enumerate(order) if place == number), [])


def _causes(trainer: Trainer, batch: Any, indices: list[int]) -> Iterator[str]:
    """Name entries of a batch, and its samples, that hold numbers which are not finite."""
    for name, values in batch.items() if isinstance(batch, dict) else ():
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.isfinite().all():
            continue
        if not values.dim() or len(values) != len(indices):  # of several samples, one behind the other
            yield f"{name} of the batch is not finite"
            continue
        row = int((~values.isfinite()).reshape(len(values), -1).any(1).nonzero()[0])
        loader: Any = trainer.train_dataloader
        identify = getattr(loader.samples, "identify", None)
        about = {"sample": np.asarray(indices)} if identify is None else identify(indices)
        yield f"{name} is not finite in {', '.join(f'{key} {value[row]}' for key, value in about.items())}"
