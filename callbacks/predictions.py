"""Writes what `predict` answers as a Parquet file, one row a sample or, of recorded episodes, a step.

Shapes: B samples in a batch, W steps of a window, R rows.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from netllm_pl.data import Batch, Loader
from netllm_pl.paths import atomic
from netllm_pl.processes import first_only
from netllm_pl.rollout import Array
from netllm_pl.run_folder import free_place


class PredictionTable(BasePredictionWriter):
    """Writes predictions.parquet batch by batch, in the order of the data.

    Its columns are what the data set's ``identify(indices)`` says of the samples (else ``sample``, their numbers),
    ``step`` for steps, and the answers under the task's ``answer_columns``. Several processes write a file each, which
    the first one joins.

    Args:
        folder: Where to write; if it holds predictions, into a new folder in it, named by the time.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder, self.path = folder, folder / "predictions.parquet"
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up which samples the batches hold."""
        loader: Any = trainer.predict_dataloaders
        assert isinstance(loader, Loader)
        self._indices, self._data = list(loader.sampler), loader.samples
        self.folder = first_only(lambda: free_place(self.folder, self.path.name, "predict"))
        self.path = self.folder / self.path.name
        own = self.path if trainer.world_size == 1 else self._part(trainer.global_rank)
        self._partial = self._open.enter_context(atomic(own))

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the rows of a batch."""
        indices = self._indices[batch_idx]
        identify = getattr(self._data, "identify", None)
        about = {"sample": np.asarray(indices)} if identify is None else identify(indices)
        table = rows(about, prediction, batch, getattr(pl_module, "answer_columns", ("prediction",)))
        if self._writer is None:
            self._writer = self._open.enter_context(pq.ParquetWriter(self._partial, table.schema))
        self._writer.write_table(table)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file; only now it has its name."""
        self._open.close()
        if trainer.world_size > 1:
            trainer.strategy.barrier("predictions")
            if trainer.is_global_zero:
                self._join([self._part(rank) for rank in range(trainer.world_size)])

    def _part(self, rank: int) -> Path:
        return self.folder / f"predictions-{rank}.parquet"

    def _join(self, parts: list[Path]) -> None:
        """Put batches in the order of the data, where the processes took turns; remove the parts."""
        with ExitStack() as stack:
            files = [stack.enter_context(pq.ParquetFile(part)) for part in parts]
            out = pq.ParquetWriter(stack.enter_context(atomic(self.path)), files[0].schema_arrow)
            with out:
                for place in range(sum(file.num_row_groups for file in files)):
                    out.write_table(files[place % len(files)].read_row_group(place // len(files)))
        for part in parts:
            part.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing half-written."""
        self._open.__exit__(type(exception), exception, exception.__traceback__)


def rows(about: dict[str, Array], prediction: Any, batch: Batch, names: tuple[str, ...]) -> pa.Table:
    """Lay out the predictions of a batch.

    Args:
        about: Columns (B,) that say what the samples are.
        prediction: Tensor (B, ...), or (B, W, ...) of steps of which ``batch["mask"]`` says which are real; or a
            NamedTuple of such.
        batch: What was predicted from.
        names: Of several, each is what a place of the last axis is called; else the one is the prediction's.

    Returns:
        (R, columns); a prediction of more than one number is a list, of lists if need be.
    """
    parts: dict[str, Tensor]
    if isinstance(prediction, Tensor):
        parts = {names[0]: prediction} if len(names) == 1 else dict(zip(names, prediction.unbind(-1), strict=True))
    else:
        parts = prediction._asdict()
    mask = batch.get("mask")
    if mask is None or any(part.shape[: mask.dim()] != mask.shape for part in parts.values()):
        found = {name: part.cpu() for name, part in parts.items()}
        return pa.table({**about, **{name: _lists(part.numpy()) for name, part in found.items()}})
    counts, real = mask.sum(1).cpu().numpy(), mask.cpu()
    repeated = {name: np.repeat(values, counts) for name, values in about.items()}
    if "step" in batch:
        repeated["step"] = batch["step"].cpu()[real].numpy()
    return pa.table({**repeated, **{name: _lists(part.cpu()[real].numpy()) for name, part in parts.items()}})


def _lists(values: Array) -> pa.Array:
    """Turn an array (R, ...) into R numbers, or lists."""
    column = pa.array(values.ravel())
    for size in values.shape[:0:-1]:
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column
