"""Every task, learned baseline and hand-written baseline that is discovered keeps its contract; the testers notice."""

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection

from netllm_pl.backbone import LoRA
from netllm_pl.data import Batch, NetDataModule
from netllm_pl.decision import DecisionTask
from netllm_pl.discovery import concrete_subclasses
from netllm_pl.errors import UserError
from netllm_pl.evaluate import Metric
from netllm_pl.recording import Experience
from netllm_pl.task import NetTask
from netllm_pl.testing import check_gradients, check_policy, check_predictions, check_task, tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrateData
from tasks.adaptive_bitrate.baselines import PENSIEVES as PUBLISHED
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.job_scheduling import JobSchedulingData
from tasks.job_scheduling.simulator import Rules as ClusterRules
from tasks.job_scheduling.synthetic import SyntheticWorkload
from tasks.viewport_prediction import ViewportPredictionData
from tasks.viewport_prediction.synthetic import Synthetic


def scheduling(experience: Experience | None) -> JobSchedulingData:
    return JobSchedulingData(
        synthetic=SyntheticWorkload(queries=3, sizes=("2g",)),
        rules=ClusterRules(jobs=3, executors=5, arrival_rate=2e-4),
        test_seeds=[1, 2],
        valid_seeds=[11],
        experience=experience,
        window=3,
        batch_size=2,
        sessions=4,
    )


SMALL: dict[str, Callable[[], NetDataModule]] = {
    "ViewportPredictionData": lambda: ViewportPredictionData(
        synthetic=Synthetic(videos=3, users=4, seconds=30, picture_height=8, picture_width=16),
        batch_size=6,
        eval_batch_size=16,
    ),
    "AdaptiveBitrateData": lambda: AdaptiveBitrateData(
        synthetic=SyntheticTraces(traces=4, duration_s=60),
        experience=Experience(policies="bba", episodes=4, eval_episodes=2, values="hindsight"),
        rules=Rules(chunks=10),
        window=6,
        batch_size=4,
    ),
    "Pensieve": lambda: AdaptiveBitrateData(
        synthetic=SyntheticTraces(traces=3, duration_s=60), experience=None, rules=Rules(chunks=6), batch_size=2
    ),
    "OnlineBitrate": lambda: AdaptiveBitrateData(
        synthetic=SyntheticTraces(traces=3, duration_s=60), experience=None, rules=Rules(chunks=6), batch_size=2
    ),
    "JobSchedulingData": lambda: scheduling(
        Experience(policies="srpt_fair,fair", episodes=2, eval_episodes=1, values="lookahead")
    ),
    "Decima": lambda: scheduling(None),
    "OnlineScheduling": lambda: scheduling(None),
}
"""Small data of modules whose defaults are large, and of tasks that need it otherwise; others are small by default."""


WRITER = tiny_backbone(lora=LoRA(rank=16, targets="all-linear"), config={"hidden_size": 64, "intermediate_size": 128})
ARGUMENTS: dict[str, dict[str, Any]] = {"PromptedViewport": {"history": 3, "horizon": 2, "backbone": WRITER}}
"""Of tasks that take long, or learn nothing, as they are by default."""


def of_tasks(base: type) -> list[type]:
    """The discovered classes of the task packages, not those that tests define."""
    found: dict[str, type] = concrete_subclasses(base)
    return [found[name] for name in sorted(found) if found[name].__module__.startswith("tasks.")]


def package(cls: type) -> str:
    return ".".join(cls.__module__.split(".")[:2])


@cache
def small(name: str) -> NetDataModule:
    if name in SMALL:
        return SMALL[name]()
    return {cls.__name__: cls for cls in of_tasks(NetDataModule)}[name]()


def data_of(task: type) -> NetDataModule:
    if task.__name__ in SMALL:
        return small(task.__name__)
    names = [cls.__name__ for cls in of_tasks(NetDataModule) if package(cls) == package(task)]
    assert len(names) == 1, f"{package(task)} has {len(names)} data modules"
    return small(names[0])


def variants() -> list[Any]:
    """Each class as it is by default, and with each other choice of each of its options."""
    cases = []
    for cls in of_tasks(NetTask):
        cases.append(pytest.param(cls, {}, id=cls.__name__))
        parameters, hints = inspect.signature(cls).parameters, get_type_hints(cls.__init__)
        for name, hint in hints.items():
            if get_origin(hint) is Literal:
                others = [choice for choice in get_args(hint) if choice != parameters[name].default]
                cases += [pytest.param(cls, {name: o}, id=f"{cls.__name__}-{name}-{o}") for o in others]
    return cases


@pytest.mark.parametrize(("task", "init_args"), variants())
def test_every_task_keeps_the_contract(task: type[NetTask], init_args: dict[str, Any]) -> None:
    check_task(task, data_of(task), **ARGUMENTS.get(task.__name__, {}), **init_args)


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_tasks_keep_the_contract_on_other_backbones(architecture: str) -> None:
    for task in of_tasks(NetTask):
        if "backbone" not in inspect.signature(task).parameters or task.__name__ in ARGUMENTS:
            continue
        if architecture == "t5" and issubclass(task, DecisionTask):
            with pytest.raises(UserError, match="needs a causal model"):
                task(backbone=tiny_backbone(architecture))
        else:
            check_task(task, data_of(task), backbone=tiny_backbone(architecture))


@pytest.mark.parametrize(
    ("data", "name"), [(cls.__name__, name) for cls in of_tasks(NetDataModule) for name in cls.baselines]
)
def test_every_baseline_keeps_the_contract(data: str, name: str) -> None:
    if name.startswith((*PUBLISHED, "decima")):
        weights = Path(__file__).parents[2] / "shared" / "weights"
        if not weights.is_dir():
            pytest.skip(f"no published weights in {weights}")
        small(data).weights_dir = str(weights)
    check_policy(small(data), name)


class _Toy(NetTask):
    """A linear model, to be broken in one way a test."""

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.broken = broken
        self.layer, self.unused = nn.Linear(3, 1), nn.Parameter(torch.zeros(2))
        self.unused.requires_grad_(broken == "unused")
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, batch: Batch) -> Tensor:
        if self.broken == "frozen":
            self.frozen.data += 1
        value: Tensor = self.layer(batch["x"])
        if self.broken == "batch":
            return value - value.mean()
        return value / 0 if self.broken == "finite" else value

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        error = (prediction - batch["y"]).square()
        return error if self.broken == "scalar" else error.mean()

    def build_metrics(self) -> MetricCollection:
        return MetricCollection({"mse": MeanSquaredError()})

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Batch) -> None:
        metrics.update(prediction, batch["y"])


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("", None),
        ("batch", "other samples in the batch"),
        ("finite", "not finite"),
        ("unused", "no gradient reaches the trainable weight unused"),
        ("frozen", "the frozen weight frozen changed"),
        ("scalar", "must be a scalar"),
    ],
)
def test_the_tester_notices_a_broken_task(broken: str, text: str | None) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(6, 3), "y": torch.randn(6, 1)}

    def check() -> None:
        task = _Toy(broken)
        check_predictions(task, batch)
        check_gradients(task, batch)

    if text is None:
        check()
        return
    with pytest.raises(AssertionError, match=text):
        check()


class _Rows(NetDataModule):
    """Data whose policies give the frames that a test hands over."""

    metrics = (Metric("error", "error"),)

    def __init__(self, frames: list[pd.DataFrame]) -> None:
        super().__init__()
        self.frames = frames

    def dataset(self, split: str) -> Any:
        return [0, 1]

    def policy(self, name: str) -> str:
        return name

    def episodes(self, policy: Any) -> pd.DataFrame:
        return self.frames.pop(0)


def frame(**changes: Any) -> pd.DataFrame:
    return pd.DataFrame({"window": [0, 1], "cluster": [0, 1], "error": [1.0, 2.0]} | changes)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (frame(), frame(error=[1.0, 3.0]), "other answers"),
        (frame(window=[0, 0]), None, "more than one row"),
        (frame().drop(columns="error"), None, "column error is missing"),
        (frame(error=[1.0, float("nan")]), None, "not finite"),
        (frame(cluster=["a", "b"]), None, "no integer"),
        (frame().head(1), None, "1 rows for the 2 windows"),
    ],
)
def test_the_tester_notices_a_broken_policy(first: pd.DataFrame, second: pd.DataFrame | None, text: str) -> None:
    check_policy(_Rows([frame(), frame()]), "good")
    with pytest.raises(AssertionError, match=text):
        check_policy(_Rows([first, first if second is None else second]), "broken")
