"""What callbacks leave in TensorBoard: costs, figures and configuration, and that it costs no more than it may."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import Tensor, nn
from torchmetrics import MetricCollection

from callbacks import cost, figures
from callbacks.cost import CostMonitor
from callbacks.figures import Figures
from callbacks.hyperparameters import HyperParameters, flatten
from callbacks.moving_average import MovingAverage
from callbacks.rollout import RolloutEvaluation
from netllm_pl.data import Batch, NetDataModule
from netllm_pl.drawing import blank
from netllm_pl.errors import UserError
from netllm_pl.rollout import Array, Observations
from netllm_pl.task import NetTask

SCALE = {"cost/samples_per_s", "cost/peak_memory_gb", "cost/decision_ms", "cost/trainable_fraction"}


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self, wait: bool = True) -> float:
        return self.seconds

    def perf_counter(self) -> float:
        return self.seconds


class Rows:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, indices: list[int]) -> Batch:
        return {"x": torch.ones(len(indices), 1)}


class PlainData(NetDataModule):
    """Brings no figures; counts how often it is watched."""

    def __init__(self) -> None:
        super().__init__(batch_size=4, eval_batch_size=20)
        self.watched: list[Any] = []

    def dataset(self, split: str) -> Rows:
        return Rows()

    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        return pd.DataFrame({"cluster": [0]})

    def watch(self, policy: Any) -> dict[str, pd.DataFrame]:
        self.watched.append(policy)
        return super().watch(policy)


class DrawingData(PlainData):
    """Draws a figure in three seconds, of two baselines which take ten each."""

    compared = ("one", "two")

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.clock = clock or Clock()

    def policy(self, name: str, split: str = "test") -> str:
        self.clock.seconds += 10
        return name

    def figures(self, watched: dict[str, dict[str, pd.DataFrame]]) -> dict[str, Figure]:
        self.clock.seconds += 3
        torch.rand(1)  # must not change what follows
        np.random.rand()
        figure, (axes,) = blank(size=(1.0, 1.0))
        axes.set_title(" ".join(watched))
        self.title = axes.get_title()
        return {"lines": figure}


class SlowTask(NetTask):
    """A step of training takes half a second, a validation batch three."""

    def __init__(self, clock: Clock | None = None, learns: int = 3) -> None:
        super().__init__()
        self.clock = clock or Clock()
        self.weight = nn.Linear(1, 1)
        self.frozen = nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, batch: Batch) -> Tensor:
        self.clock.seconds += 0.5 if self.training else 3.0
        answer: Tensor = self.weight(batch["x"]) + torch.rand(1)
        return answer

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return prediction.square().mean()

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Batch) -> None:
        pass


class ActingTask(SlowTask):
    """Acts, 20 ms for two episodes."""

    def as_policy(self) -> "ActingTask":
        return self

    def reset(self, n: int) -> None:
        pass

    def act(self, observations: Observations) -> Array:
        self.clock.seconds += 0.02
        return np.zeros(2)


class ActingData(DrawingData):
    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        for _ in range(5):
            policy.act({})
        return super().episodes(policy, split)


def fit(folder: Path, task: NetTask, data: NetDataModule, callbacks: list[pl.Callback], **more: Any) -> None:
    """Twenty steps with a validation at every fifth."""
    pl.seed_everything(0, verbose=False)
    pl.Trainer(
        accelerator="cpu", devices=1, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
        **({
            "logger": [TensorBoardLogger(folder, "", "", default_hp_metric=False), CSVLogger(folder, "", "")],
            "max_steps": 20, "val_check_interval": 5, "log_every_n_steps": 2,
        } | more),
    ).fit(task, datamodule=data)  # fmt: skip


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


# Costs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """One clock for callbacks and tasks."""
    clock = Clock()
    monkeypatch.setattr(cost, "now", clock)
    monkeypatch.setattr("callbacks.rollout.now", clock)
    monkeypatch.setattr(figures, "time", clock)
    return clock


def test_costs_are_those_of_a_clock(clock: Clock, tmp_path: Path) -> None:
    fit(tmp_path, SlowTask(clock), PlainData(), [CostMonitor()])
    rates = scalars(tmp_path, "cost/samples_per_s")
    assert {rate for _, rate in rates} == {8.0}, "4 samples in half a second, validation left out"
    assert [step for step, _ in rates][:3] == [1, 3, 4], "every two steps, and before a validation"
    assert scalars(tmp_path, "cost/decision_ms") == [(step, 150.0) for step in (4, 9, 14, 19)]  # 3 s for 20 samples
    ((step, fraction),) = scalars(tmp_path, "cost/trainable_fraction")
    assert step == 0 and fraction == pytest.approx(2 / 8)
    assert all(0.05 < value < 100 for _, value in scalars(tmp_path, "cost/peak_memory_gb"))
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert set(table.columns) >= SCALE and set(table["cost/samples_per_s"].dropna()) == {8.0}


def test_the_time_of_a_decision_is_the_policys(clock: Clock, tmp_path: Path) -> None:
    fit(tmp_path, ActingTask(clock), ActingData(clock), [CostMonitor(), RolloutEvaluation()])
    times = [value for _, value in scalars(tmp_path, "cost/decision_ms")]
    assert times == pytest.approx([10.0] * 4)


# Figures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "drawn"),
    [
        (0.0, [19]),  # what comes out in the end
        (1.0, [4, 9, 14, 19]),
        (0.15, [14, 19]),  # 2 s are expected of the first: not that share of 11 s, but of 19.5 s
        (0.6, [9, 19]),  # 23 s the first; 26 would be more than that share of 42.5 s,
        (0.62, [9, 14, 19]),  # and less than this one
    ],
)
def test_drawing_keeps_to_its_share(share: float, drawn: list[int], clock: Clock, tmp_path: Path) -> None:
    data, callback = DrawingData(clock), Figures(share)
    fit(tmp_path, SlowTask(clock), data, [callback])
    assert [image.step for image in events(tmp_path).Images("figures/lines")] == drawn
    assert callback.spent_s == 20 + 3 * len(drawn), "baselines run once"
    assert data.title == "model one two"


class WatchedData(DrawingData):
    def watch(self, policy: Any) -> dict[str, pd.DataFrame]:
        self.clock.seconds += 4 if isinstance(policy, NetTask) else 0
        return super().watch(policy)


@pytest.mark.parametrize(("share", "drawn"), [(0.7, [9, 19]), (0.77, [9, 14, 19])])
def test_predicting_for_figures_counts_too(share: float, drawn: list[int], clock: Clock, tmp_path: Path) -> None:
    """At the third validation 27 + 7 s would be spent of 46.5 s."""
    fit(tmp_path, SlowTask(clock), WatchedData(clock), [Figures(share)])
    assert [image.step for image in events(tmp_path).Images("figures/lines")] == drawn


def test_the_end_is_drawn_where_no_validation_is_due(clock: Clock, tmp_path: Path) -> None:
    data, task = DrawingData(clock), SlowTask(clock)
    fit(tmp_path, task, data, [Figures(0.0, baselines=["one"])], max_steps=18)
    assert [image.step for image in events(tmp_path).Images("figures/lines")] == [17]
    assert data.watched == [task, "one"] and task.training
    fit(tmp_path / "none", SlowTask(clock), data, [Figures(0.0)], limit_val_batches=0)
    assert events(tmp_path / "none").Tags()["images"] == [], "who wants no validation gets no figures of it"


class WeighedData(DrawingData):
    def watch(self, policy: Any) -> dict[str, pd.DataFrame]:
        if isinstance(policy, NetTask):
            assert not policy.training
            self.weights = {name: weight.clone() for name, weight in policy.state_dict().items()}
        return super().watch(policy)


@pytest.mark.usefixtures("clock")
def test_the_end_is_that_of_the_averaged_weights(tmp_path: Path) -> None:
    data, task = WeighedData(), SlowTask()
    fit(tmp_path, task, data, [MovingAverage(), Figures(0.0)], max_steps=18)
    torch.testing.assert_close(data.weights, dict(task.state_dict()), rtol=0, atol=0)


@pytest.mark.usefixtures("clock")
def test_drawing_changes_no_losses(tmp_path: Path) -> None:
    losses = []
    for name, callbacks in (("with", [Figures(1.0)]), ("without", [])):
        pl.seed_everything(0, verbose=False)  # of the first weights
        fit(tmp_path / name, SlowTask(), DrawingData(), callbacks)  # type: ignore[arg-type]
        losses.append([scalars(tmp_path / name, tag) for tag in ("train/loss", "val/loss")])
    assert losses[0] == losses[1] and len(losses[0][1]) == 4


def test_the_episodes_of_the_rollout_are_drawn_and_not_played_again(clock: Clock, tmp_path: Path) -> None:
    data = ActingData(clock)
    evaluation = RolloutEvaluation(every_n=2)
    task = ActingTask(clock)
    fit(tmp_path, task, data, [evaluation, Figures(1.0, baselines=[])])
    assert [image.step for image in events(tmp_path).Images("figures/lines")] == [4, 14], "where episodes were played"
    assert len(data.watched) == 2 and all(policy.policy is task for policy in data.watched)
    assert data.title == "model"


def test_the_last_episodes_that_were_played_are_drawn_in_the_end(clock: Clock, tmp_path: Path) -> None:
    data = ActingData(clock)
    fit(tmp_path, ActingTask(clock), data, [RolloutEvaluation(every_n=2), Figures(0.0, baselines=[])])
    assert [image.step for image in events(tmp_path).Images("figures/lines")] == [14], "of the validation at step 14"
    assert len(data.watched) == 2, "no episode is played for a picture"


def test_data_without_figures_is_not_watched(tmp_path: Path) -> None:
    data = PlainData()
    fit(tmp_path, SlowTask(), data, [Figures(1.0)])
    assert data.watched == [] and events(tmp_path).Tags()["images"] == []


def test_without_tensorboard_nothing_is_drawn(tmp_path: Path) -> None:
    data = DrawingData()
    fit(tmp_path, SlowTask(), data, [Figures(1.0), HyperParameters({}), CostMonitor()], logger=False)
    assert data.watched == []


def test_a_share_beyond_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"Figures: share is 2; it must lie between 0 and 1"):
        Figures(2)


# Configuration --------------------------------------------------------------------------------------------------------


def test_a_configuration_is_flattened_to_what_differs() -> None:
    tree = {
        "seed": 0,
        "model": {
            "class_path": "tasks.A",
            "init_args": {"width": 2, "on": True, "none": None, "optimizer": {"lr": 0.1}},
        },
        "trainer": {"callbacks": [{"class_path": "B"}]},
    }
    assert dict(flatten(tree)) == {
        "seed": 0, "model": "A", "model.width": 2, "model.on": True, "model.optimizer.lr": 0.1,
        "trainer.callbacks": "[{'class_path': 'B'}]",
    }  # fmt: skip


class Failing(SlowTask):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        raise ValueError("on purpose")


@pytest.mark.parametrize(("task", "status"), [(SlowTask, 1), (Failing, 2)])
def test_a_session_has_hyperparameters_and_an_end(task: type[SlowTask], status: int, tmp_path: Path) -> None:
    callback = HyperParameters({"model": {"width": 2, "name": "x", "on": False}, "run_dir": "runs/a"})
    try:
        fit(tmp_path, task(), PlainData(), [callback])
    except ValueError as error:
        assert str(error) == "on purpose"
    contents = events(tmp_path).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG]).hparams
    assert start["model.width"].number_value == 2 and start["model.name"].string_value == "x"
    assert "run_dir" not in start, "it differs always and means nothing"
    assert start["model.on"].HasField("bool_value") and not start["model.on"].bool_value
    end = metadata.parse_session_end_info_plugin_data(contents[metadata.SESSION_END_INFO_TAG])
    assert end.status == status
    assert metadata.EXPERIMENT_TAG not in contents, "TensorBoard would take that of one run for all"
    text = events(tmp_path).Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    model:\n      width: 2\n      name: x\n      'on': false\n    run_dir: runs/a"
