"""Training stops at a loss that is not finite, names the sample, and leaves the batch behind."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import finite
from netllm_pl.checkpoint import KEY, load_failure, read_checkpoint
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from tasks.viewport_prediction.data import ViewportDataset
from tasks.viewport_prediction.learned_baselines import ViewportGRU

WORDS = [
    *("fit", "--model", "ViewportGRU", "--data", "ViewportPredictionData", "--data.synthetic.videos", "3"),
    *("--data.synthetic.users", "3", "--trainer.accelerator", "cpu", "--trainer.max_steps", "6", "--figures", "false"),
    *(
        "--trainer.log_every_n_steps",
        "1",
        "--data.batch_size",
        "8",
        "--costs",
        "false",
        "--trainer.num_sanity_val_steps",
        "0",
        "--trainer.logger",
        "false",
    ),
]


def fails(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, Path]:
    """Train until it fails; return the message and the checkpoint it names."""
    with pytest.raises(SystemExit) as stop:
        main([*WORDS, "--run_dir", str(folder), *words])
    message = capsys.readouterr().err
    message = message[message.index("error: ") :].strip()
    assert stop.value.code == 2 and len(message.splitlines()) == 2
    (path,) = folder.glob("nonfinite-*.ckpt")
    assert f"are in {path};" in message
    return message, path


def test_a_number_that_is_none_names_the_trace_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = ViewportDataset.__getitem__, []

    def getitem(self: ViewportDataset, indices: list[int]) -> dict[str, Any]:
        batch = whole(self, indices)
        if len(indices) == 8:
            broken.append(indices)
            if len(broken) == 4:
                batch["history"][5, 2, 1] = float("nan")
        return batch

    monkeypatch.setattr(ViewportDataset, "__getitem__", getitem)
    message, path = fails(tmp_path, capsys)
    assert "the loss is nan at step 3 (epoch 0, batch 3). history is not finite in window " in message
    window, video, user = re.search(r"in window (\d+), video (\d+), user (\d+), t \d+\.", message).groups()  # type: ignore[union-attr]
    saved = read_checkpoint(path)
    assert saved["samples"] == broken[3] and saved["samples"][5] == int(window) and video and user
    assert saved["global_step"] == 3 and "optimizer_states" not in saved
    monkeypatch.setattr(ViewportDataset, "__getitem__", whole)
    task, batch = load_failure(path)
    assert batch["history"][5, 2, 1].isnan() and task.training_step(batch, 0).isnan()
    batch["history"][5, 2, 1] = 0.0
    assert task.training_step(batch, 0).isfinite()  # the weights are those before the step


def test_weights_that_run_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message, path = fails(tmp_path, capsys, "--model.optimizer.lr", "1e30")
    step = int(re.search(r"the loss is (?:nan|inf) at step (\d)", message)[1])  # type: ignore[index]
    assert step > 0 and "All numbers of the batch are finite: lower optimizer.lr?" in message
    assert path.name == f"nonfinite-step{step}.ckpt" and f"load_failure('{path}')" in message
    before = torch.get_rng_state()
    task, batch = load_failure(path)
    assert isinstance(task, ViewportGRU) and task.training and not torch.equal(torch.get_rng_state(), before)
    assert not task.training_step(batch, 0).isfinite()
    assert all(value.isfinite().all() for value in batch.values())


@pytest.mark.parametrize("late", [True, False])
def test_a_loss_that_comes_late_still_stops(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, where nothing waits for it: two steps later, or when training ends."""
    ended, end = [], finite.StopAtNonFinite.on_train_end

    def on_its_way(loss: torch.Tensor) -> Any:
        asked = iter([False] * 2)
        return loss, lambda: bool(ended) or (not late and next(asked, True))

    monkeypatch.setattr(finite, "_on_its_way", on_its_way)
    monkeypatch.setattr(finite.StopAtNonFinite, "on_train_end", lambda *each: (ended.append(0), end(*each)))
    whole, count = ViewportGRU.loss, []

    def loss(self: ViewportGRU, prediction: Any, batch: Any) -> torch.Tensor:
        count.append(0)
        return whole(self, prediction, batch) * (float("inf") if len(count) == 2 else 1.0)

    monkeypatch.setattr(ViewportGRU, "loss", loss)
    message, path = fails(tmp_path, capsys, "--trainer.limit_val_batches", "0")
    assert "the loss is inf at step 1 " in message and path.name == "nonfinite-step1.ckpt"
    assert re.search(r"the weights of \d steps later \(last\.ckpt is older\) are in", message)


def test_a_checkpoint_without_a_batch_is_named(tmp_path: Path) -> None:
    torch.save({KEY: {"task": "ViewportGRU", "init_args": {}, "frozen": {}}, "state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt holds no batch; give the nonfinite-step<N>\.ckpt"):
        load_failure(tmp_path / "x.ckpt")
