"""The loop that runs policies, the tester of environments, and evaluation by rollout within training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import MetricCollection

from callbacks.rollout import RolloutEvaluation
from netllm_pl.data import Batch, NetDataModule
from netllm_pl.errors import UserError
from netllm_pl.evaluate import Metric
from netllm_pl.rollout import Array, Observations, rollout
from netllm_pl.task import NetTask
from netllm_pl.testing import check_environment


class Countdown:
    """Episode s lasts 2 + s % 3 steps; each gives the action plus a number of the seed's own."""

    def reset(self, seeds: Sequence[int]) -> Observations:
        self.seeds = np.array(seeds)
        self.left = 2 + self.seeds % 3
        self.steps = np.zeros(len(seeds), dtype=np.int64)
        self.first = {"left": self.left.copy()}
        return self.observe()

    def observe(self) -> Observations:
        return {"left": self.left.copy(), "pair": np.stack([self.seeds, self.steps], 1)}

    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        going = self.left > 0
        self.left, self.steps = self.left - going, self.steps + 1
        return self.observe(), actions + 0.1 * self.seeds, self.left == 0, {"left": self.left.copy()}


class Counter:
    """Acts with how often it was asked before; told the last observation."""

    def __init__(self, sequential: bool = False) -> None:
        self.sequential = sequential
        self.resets: list[int] = []
        self.finished: list[Array] = []

    def reset(self, n: int) -> None:
        self.resets.append(n)
        self.n, self.asked = n, 0

    def act(self, observations: Observations) -> Array:
        self.asked += 1
        return np.full(self.n, self.asked - 1.0)

    def finish(self, observations: Observations) -> None:
        self.finished.append(observations["left"])


@pytest.mark.parametrize("sequential", [False, True])
def test_episodes_of_different_lengths_are_padded(sequential: bool) -> None:
    policy = Counter(sequential)
    played = rollout(Countdown(), policy, [0, 1, 5], record=True)
    assert played.alive.T.tolist() == [[True, True, False, False], [True, True, True, False], [True] * 4]
    np.testing.assert_allclose(played.returns, [1, 3 + 0.3, 6 + 2.0])
    assert policy.resets == ([1, 1, 1] if sequential else [3])
    assert [list(left) for left in policy.finished] == ([[0]] * 3 if sequential else [[0, 0, 0]])
    assert played.start["left"].tolist() == [2, 3, 4]
    assert played.observations["pair"].shape == (4, 3, 2)
    assert played.observations["left"][:, 2].tolist() == [4, 3, 2, 1]
    assert played.info["left"][:, 2].tolist() == [3, 2, 1, 0]


def test_observations_are_kept_only_if_asked_for() -> None:
    assert rollout(Countdown(), Counter(), [0, 1]).observations == {}


# check_environment ----------------------------------------------------------------------------------------------------


def test_an_environment_that_keeps_the_contract_passes() -> None:
    check_environment(Countdown(), [3, 0, 1, 7])
    check_environment(Countdown(), [3, 0], lambda observations: observations["left"] * 2.0)


class Forgetful(Countdown):
    count = 0

    def observe(self) -> Observations:
        self.count += 1
        return super().observe() | {"left": self.left + self.count}


class Crowded(Countdown):
    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        observations, rewards, over, info = super().step(actions)
        return observations, rewards + len(actions), over, info


class Growing(Countdown):
    def observe(self) -> Observations:
        return super().observe() | {"pair": np.zeros((len(self.left), 1 + self.steps[0]))}


class Retyping(Countdown):
    def observe(self) -> Observations:
        return super().observe() | {"left": self.left.astype(np.int32 if self.steps[0] else np.int64)}


class Renaming(Countdown):
    def observe(self) -> Observations:
        return super().observe() | ({"more": self.left} if self.steps[0] else {})


class Infinite(Countdown):
    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        observations, rewards, over, info = super().step(actions)
        return observations, np.where(over, np.nan, rewards), over, info


class Endless(Countdown):
    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        observations, rewards, over, info = super().step(actions)
        return observations, rewards, over & False, info


class Undead(Countdown):
    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        observations, rewards, over, info = super().step(actions)
        return observations, rewards, over & (self.steps != 3), info


class Leaky(Countdown):
    def observe(self) -> Observations:
        return super().observe() | {"steps": self.steps}

    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        self.steps += 1
        return super().step(actions)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (Forgetful(), "observation left differs when the same episodes are run again"),
        (Crowded(), "reward of seed 3 differs when the episode is run alone"),
        (Growing(), r"observation pair is float64 \(4, 2\) at step 1"),
        (Retyping(), r"observation left is int32 \(4,\) at step 1"),
        (Renaming(), "step 1 has other names: observation more"),
        (Infinite(), "reward is not finite at step 1"),
        (Endless(), "after 50 steps 4 episodes are not over"),
        (Undead(), "was over and goes on at step 2"),
        (Leaky(), "observation steps changed after it was handed out"),
    ],
    ids=lambda case: type(case).__name__ if not isinstance(case, str) else "",
)
def test_each_broken_promise_is_noticed(env: Countdown, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_environment(env, [3, 0, 1, 7], limit=50)


# RolloutEvaluation ----------------------------------------------------------------------------------------------------


class CountdownRows:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, indices: list[int]) -> Batch:
        return {"x": torch.ones(len(indices), 1)}


class CountdownData(NetDataModule):
    """Counts how often each split is played; the score of episode e of policy p is p + e, its cost 4 (p + 1)^2."""

    metrics: ClassVar = (Metric("score", "score", better="max"), Metric("rms_cost", "cost", root=True))

    def __init__(self) -> None:
        super().__init__(batch_size=4)
        self.played: list[str] = []

    def dataset(self, split: str) -> CountdownRows:
        return CountdownRows()

    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        self.played.append(split)
        cost = np.full(2, 4.0 * (policy + 1) ** 2)
        return pd.DataFrame({"episode": [0, 1], "cluster": [0, 1], "score": policy + np.arange(2.0), "cost": cost})


class ScriptedTask(NetTask):
    """Its policy scores what a script says for the number of steps trained."""

    monitor = "val/score"
    monitor_mode = "max"

    def __init__(self, script: dict[int, float] | None = None) -> None:
        super().__init__()
        self.script = script or {}
        self.weight = nn.Linear(1, 1)

    def forward(self, batch: Batch) -> Tensor:
        answer: Tensor = self.weight(batch["x"])
        return answer

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return prediction.square().mean()

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Batch) -> None:
        pass

    def as_policy(self) -> float:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return self.script.get(self.global_step, 0.0) + 10 * rank


SCRIPT = {2: 1.0, 4: 9.0, 6: 3.0, 8: 9.0, 10: 2.0}
"""Scores at the validations of five epochs of two steps."""


class Seen(pl.Callback):
    """Records at each validation's end what a callback can see, and what goes to the loggers."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.logged: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.scores.append(float(trainer.callback_metrics["val/score"]))


class Log(pl.loggers.Logger):
    """Keeps what is logged."""

    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "val/score" in metrics:
            self.rows.append((step or 0, metrics["val/score"]))


def trainer(folder: Path, callbacks: list[pl.Callback], epochs: int = 5, **more: Any) -> pl.Trainer:
    best = ModelCheckpoint(folder, filename="best", monitor="val/score", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    return pl.Trainer(
        accelerator="cpu", devices=more.pop("devices", 1), max_epochs=epochs, use_distributed_sampler=False,
        callbacks=[best, last, *callbacks], enable_progress_bar=False, enable_model_summary=False,
        **({"logger": False} | more),
    )  # fmt: skip


def best_of(folder: Path) -> tuple[int, float]:
    """Step and score of the best checkpoint."""
    checkpoint = torch.load(folder / "best.ckpt", weights_only=True)
    scores = [s["best_model_score"] for s in checkpoint["callbacks"].values() if s.get("monitor") == "val/score"]
    return checkpoint["global_step"], float(scores[0])


@pytest.mark.parametrize(
    ("every_n", "seen", "logged", "best"),
    [
        (1, [1.5, 9.5, 3.5, 9.5, 2.5], [2, 4, 6, 8, 10], (4, 9.5)),
        (2, [1.5, 1.5, 3.5, 3.5, 2.5], [2, 6, 10], (6, 3.5)),
        (7, [1.5] * 5, [2], (2, 1.5)),
    ],
)
def test_the_best_checkpoint_is_the_best_of_those_played(
    every_n: int, seen: list[float], logged: list[int], best: tuple[int, float], tmp_path: Path
) -> None:
    data, watch, log = CountdownData(), Seen(), Log()
    trainer(tmp_path, [RolloutEvaluation(every_n), watch], logger=log).fit(ScriptedTask(SCRIPT), datamodule=data)
    assert watch.scores == seen
    assert [(step + 1, score) for step, score in log.rows] == [(step, SCRIPT[step] + 0.5) for step in logged]
    assert data.played == ["valid"] * len(logged), "and none in the sanity check"
    assert best_of(tmp_path) == best


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_plays_and_chooses_as_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    trainer(tmp_path, [RolloutEvaluation(3)], epochs=stop).fit(ScriptedTask(SCRIPT), datamodule=CountdownData())
    data, watch = CountdownData(), Seen()
    resumed = trainer(tmp_path, [RolloutEvaluation(3), watch])
    resumed.fit(ScriptedTask(SCRIPT), datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert watch.scores == [1.5, 1.5, 1.5, 9.5, 9.5][stop:]
    assert data.played == ["valid"] * (stop < 4)
    assert best_of(tmp_path) == (8, 9.5)


def test_validate_and_test_play_whatever_every_n_says(tmp_path: Path) -> None:
    data, task = CountdownData(), ScriptedTask({0: 2.0})
    run = trainer(tmp_path, [RolloutEvaluation(5)])
    for _ in range(2):
        logged = run.validate(task, datamodule=data, verbose=False)[0]
        assert (logged["val/score"], logged["val/rms_cost"]) == (2.5, 6.0)
    tested = run.test(task, datamodule=data, verbose=False)[0]
    assert (tested["test/score"], tested["test/rms_cost"]) == (2.5, 6.0)
    assert "val/score" not in tested
    assert data.played == ["valid", "valid", "test"]


def test_processes_agree_on_the_best_checkpoint(tmp_path: Path) -> None:
    """Their scores would differ by ten here: what cannot be divided the first one plays, and all know the result."""
    run = trainer(tmp_path, [RolloutEvaluation(2)], devices=2, strategy="ddp_fork")
    run.fit(ScriptedTask({1: 1.0, 2: 9.0, 3: 3.0, 5: 2.0}), datamodule=CountdownData())
    assert best_of(tmp_path) == (3, 3.5)  # an epoch is one step of each process


class PlainTask(ScriptedTask):
    as_policy = None  # type: ignore[assignment]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"PlainTask has no as_policy\(\).*take RolloutEvaluation out"):
        trainer(tmp_path, [RolloutEvaluation()]).fit(PlainTask(), datamodule=CountdownData())
    with pytest.raises(UserError, match="every_n is 0"):
        RolloutEvaluation(0)
    loader = CountdownData().val_dataloader()
    with pytest.raises(UserError, match="needs a data module"):
        trainer(tmp_path, [RolloutEvaluation()]).validate(ScriptedTask(), loader, verbose=False)


def test_a_task_without_steps_says_so() -> None:
    with pytest.raises(UserError, match=r"CountdownData has no steps.*leave out --steps"):
        CountdownData().tables(0.0, steps=True)
    assert list(CountdownData().tables(0.0)) == ["episodes"]


def test_a_config_names_the_callback_by_its_class() -> None:
    from netllm_pl.discovery import concrete_subclasses

    assert concrete_subclasses(pl.Callback)["RolloutEvaluation"] is RolloutEvaluation
