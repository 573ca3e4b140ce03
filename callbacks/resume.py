"""Exact resume: a run that was interrupted goes on with the same random numbers."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from netllm_pl.data import NetDataModule
from netllm_pl.processes import gathered


class ExactResume(Callback):
    """Saves the states of all random generators in checkpoints and restores them before the next training batch.

    Together with a loader that knows its place (`netllm_pl.data.Loader`) the losses of a resumed run equal those of an
    uninterrupted one. Each of several processes draws numbers of its own in training. Another number of processes goes
    on with the samples that are left, and with other random numbers.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the first process, and under ``others`` those of the other ones."""
        first, *others = gathered(self._states())
        return {**first, "others": others}

    @staticmethod
    def _states() -> dict[str, Any]:
        """Return the states of torch, CUDA, numpy and Python generators."""
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        version, internal, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
            "python": [version, list(internal), gauss],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training goes on: set-up and sanity checks draw random numbers too."""
        self._pending = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint of an epoch's end go on with the next epoch.

        Lightning would otherwise train one more batch in the old epoch, and then skip an epoch's order.
        """
        fit = checkpoint["loops"]["fit_loop"]
        epoch, batch = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
        if epoch["total"]["completed"] == epoch["total"]["processed"] - 1 and batch["is_last_batch"]:
            for count in (epoch["total"], epoch["current"]):
                count["completed"] = count["processed"]
            batch["current"] = dict.fromkeys(batch["current"], 0)
            batch["is_last_batch"] = False
        elif not batch["is_last_batch"]:
            _count_in_own_batches(trainer, fit, batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let each process draw numbers of its own: dropout and variations of other samples are other ones."""
        if trainer.global_rank and self._pending is None:
            _seed(torch.initial_seed() + trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the generators once."""
        if self._pending is None:
            return
        state, self._pending = self._pending, None
        others, rank = state.get("others", []), trainer.global_rank
        if rank:
            if len(others) + 1 != trainer.world_size:
                _seed(torch.initial_seed() + trainer.global_step * trainer.world_size + rank)
                return
            state = others[rank - 1]
        torch.set_rng_state(state["torch"].cpu())
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _count_in_own_batches(trainer: Trainer, fit: dict[str, Any], progress: dict[str, Any]) -> None:
    """Let batches of an epoch that another number of processes has done, or of another size, count as those of now."""
    loaders, data = fit["state_dict"].get("combined_loader", []), getattr(trainer, "datamodule", None)
    if len(loaders) == 1 and "samples" in loaders[0] and isinstance(data, NetDataModule):
        state, step = loaders[0], trainer.world_size * data.batch_size
        last = max(1, state["size"] // step) - 1  # of an epoch that is not over a batch is left
        more = min(state["samples"] // step, last) - progress["current"]["ready"]
        progress["current"] = {name: count + more for name, count in progress["current"].items()}


class SaveOften(ModelCheckpoint):
    """Saves every few steps, but only where a resumed run goes on exactly.

    Lightning resumes without the validation that was due at the step of a checkpoint, and trains on the wrong batch
    if that step was the last of an epoch. So a save waits for the end of the validation, and the last step of an epoch
    is left to the checkpoint at the end of the epoch, which must be there too. Give it `every_n_train_steps`.
    """

    _waits = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save now, unless the epoch ends or a validation comes first."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if trainer.is_last_batch or fetcher is None:
            return
        self._waits = loop._should_check_val_fx(fetcher)
        if not self._waits:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited."""
        if self._waits:
            self._waits = False
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
