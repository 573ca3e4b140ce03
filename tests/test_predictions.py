"""What `predict` writes: one row a sample or step, with what it was predicted from."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.predictions import PredictionTable, rows
from netllm_pl.data import Batch, BatchedDataset, NetDataModule
from netllm_pl.episodes import Sessions


class Numbers:
    """Samples that are their own numbers."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, indices: list[int]) -> Batch:
        return {"number": torch.tensor(indices)}


class Data(NetDataModule):
    """Nothing but numbers."""

    def __init__(self, samples: Any) -> None:
        super().__init__(eval_batch_size=2)
        self.samples = samples

    def dataset(self, split: str) -> BatchedDataset:
        return self.samples

    def episodes(self, policy: Any, split: str = "test") -> Any:
        raise NotImplementedError


class Double(LightningModule):
    """Predicts twice the number, until it does not."""

    def __init__(self, last: int = 100) -> None:
        super().__init__()
        self.last = last

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx > self.last:
            raise MemoryError
        return 2 * next(iter(batch.values()))


def predict(folder: Path, samples: Any, last: int = 100) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(callbacks=[PredictionTable(folder)], **quiet)
    trainer.predict(Double(last), datamodule=Data(samples), return_predictions=False)


def test_samples_that_nobody_knows_are_numbered_and_all_batches_are_written(tmp_path: Path) -> None:
    predict(tmp_path, Numbers())
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table.to_pydict() == {"sample": [0, 1, 2, 3, 4], "prediction": [0, 2, 4, 6, 8]}


def test_samples_that_the_data_knows_have_its_names(tmp_path: Path) -> None:
    predict(tmp_path, Sessions([7, 8, 9]))
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table.to_pydict() == {"session": [7, 8, 9], "prediction": [14, 16, 18]}


def test_a_broken_prediction_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        predict(tmp_path, Numbers(), last=0)
    assert list(tmp_path.iterdir()) == []


ABOUT = {"episode": np.array([3, 4])}
MASK = torch.tensor([[True, True], [True, False]])


def test_steps_have_a_row_each_and_padding_has_none() -> None:
    batch = {"mask": MASK, "step": torch.tensor([[5, 6], [0, 0]])}
    scores = torch.arange(12.0).view(2, 2, 3)
    assert rows(ABOUT, scores, batch, ("scores",)).to_pydict() == {
        "episode": [3, 3, 4],
        "step": [5, 6, 0],
        "scores": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]],
    }


def test_the_last_axis_has_names() -> None:
    table = rows(ABOUT, torch.arange(12).view(2, 3, 2), {}, ("roll", "yaw"))
    assert table.to_pydict() == {"episode": [3, 4], "roll": [[0, 2, 4], [6, 8, 10]], "yaw": [[1, 3, 5], [7, 9, 11]]}


def test_grids_are_lists_of_lists() -> None:
    table = rows(ABOUT, torch.arange(8).view(2, 2, 2), {}, ("prediction",))
    assert table["prediction"].to_pylist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


class Both(NamedTuple):
    """Two predictions."""

    one: Tensor
    two: Tensor


def test_each_part_of_a_prediction_is_a_column() -> None:
    parts = Both(torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6]]))
    table = rows(ABOUT, parts, {}, ("prediction",))
    assert table.to_pydict() == {"episode": [3, 4], "one": [1, 2], "two": [[3, 4], [5, 6]]}


def test_windows_of_several_pools_keep_the_order_of_the_batch() -> None:
    from netllm_pl.experience import Together

    class Part:
        """Windows of a pool, whose episodes are a hundred times its number."""

        def __init__(self, number: int, size: int) -> None:
            self.number, self.size = number, size
            self.pool = self
            self.columns = ()

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, indices: list[int]) -> Batch:
            return {"episode": 100 * self.number + torch.tensor(indices)}

        def identify(self, indices: list[int]) -> dict[str, np.ndarray]:
            return {"episode": 100 * self.number + np.array(indices)}

    parts: Any = [Part(1, 3), Part(2, 3)]
    windows, mixed = Together(parts), [4, 0, 5, 2]
    about = windows.identify(mixed)
    np.testing.assert_array_equal(about["episode"], windows[mixed]["episode"].numpy())
    np.testing.assert_array_equal(about["pool"], [0, 0, 1, 1])
    assert set(Together(parts[:1]).identify([0])) == {"episode"}
