"""The moving average of the weights: what is validated and saved, and that a resumed run goes on with it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.moving_average import MovingAverage
from netllm_pl.checkpoint import AtomicCheckpointIO, load_task, read_checkpoint, trained_names
from netllm_pl.errors import UserError
from netllm_pl.task import NetTask, OptimizerConfig
from netllm_pl.testing import tiny_backbone
from tasks.viewport_prediction import ViewportPrediction, ViewportPredictionData
from tasks.viewport_prediction.synthetic import Synthetic

DECAY = 0.8


class Record(pl.Callback):
    """Keeps the weights that learn, at the start, behind every step and in validations."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(weights(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.steps):
            self.steps.append(weights(pl_module))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.validated.append(weights(pl_module))


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.allclose(value, two[name], atol=1e-6) for name, value in one.items())


@pytest.fixture(scope="module")
def data() -> ViewportPredictionData:
    synthetic = Synthetic(videos=3, users=4, seconds=30, picture_height=8, picture_width=16)
    return ViewportPredictionData(synthetic=synthetic, batch_size=4)


def task(**optimizer: Any) -> ViewportPrediction:
    torch.manual_seed(0)
    config = OptimizerConfig(lr=1e-2, warmup=0.0, schedule="constant", **optimizer)
    return ViewportPrediction(tiny_backbone(), config, width=16)


def fitted(model: NetTask, data: ViewportPredictionData, steps: int = 6, **more: Any) -> Record:
    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, val_check_interval=3, limit_val_batches=1,
        num_sanity_val_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, plugins=[AtomicCheckpointIO()],
        callbacks=[record], **more,
    )  # fmt: skip
    torch.manual_seed(1)  # dropout and augmentation
    trainer.fit(model, datamodule=data)
    return record


def averages(steps: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The average behind every step, by its definition."""
    result = [steps[0]]
    for count, latest in enumerate(steps[1:], start=1):
        decay = min(DECAY, (1 + count) / (10 + count))
        result.append({name: decay * value + (1 - decay) * latest[name] for name, value in result[-1].items()})
    return result


def test_training_goes_on_while_the_average_is_validated(data: ViewportPredictionData) -> None:
    plain, averaged = task(), task(ema=DECAY)
    expected = fitted(plain, data)
    record = fitted(averaged, data)
    assert len(record.steps) == 7
    assert all(same(one, two) for one, two in zip(expected.steps, record.steps, strict=True))
    average = averages(record.steps)
    _, after_three, after_six = record.validated  # the first is the sanity check
    assert same(average[3], after_three) and same(average[6], after_six)
    assert not same(record.steps[6], average[6])
    assert same(average[6], weights(averaged))  # the model that `fit` leaves


def test_a_step_of_several_batches_counts_once(data: ViewportPredictionData) -> None:
    model = task(ema=DECAY)
    record = fitted(model, data, accumulate_grad_batches=2)
    assert same(averages(record.steps)[6], weights(model))


def test_a_checkpoint_holds_the_average_and_the_latest_weights(data: ViewportPredictionData, tmp_path: Path) -> None:
    class Save(pl.Callback):
        """Saves in the middle of training and of a validation."""

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "training.ckpt")

        def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "validation.ckpt")

    model = task(ema=DECAY)
    model.configure_callbacks = lambda: [MovingAverage(DECAY), Save()]  # type: ignore[method-assign]
    record = fitted(model, data)
    for name, step in (("validation", 3), ("training", 5)):
        stored = read_checkpoint(tmp_path / f"{name}.ckpt")
        assert set(stored["state_dict"]) == trained_names(model)
        assert same(averages(record.steps)[step], stored["state_dict"])
        (state,) = (value for key, value in stored["callbacks"].items() if "MovingAverage" in key)
        assert state["updates"] == step and state["learning"].keys() == record.steps[step].keys()
        assert same(record.steps[step], state["learning"])
        assert same(averages(record.steps)[step], weights(load_task(tmp_path / f"{name}.ckpt")))


def test_an_error_in_a_validation_leaves_the_latest_weights(data: ViewportPredictionData) -> None:
    class Crash(Record):
        def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise MemoryError

    model, record = task(ema=DECAY), Crash()
    model.configure_callbacks = lambda: [MovingAverage(DECAY), record]  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        fitted(model, data)
    assert same(record.steps[3], weights(model))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 99.0])
def test_an_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"optimizer\.ema is .*below 1"):
        OptimizerConfig(ema=decay)
