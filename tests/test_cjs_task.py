"""Scheduling with a language model: its promises, what its scores depend on, and that it learns.

Shapes: N episodes, K schedulable stages, L numbers of executors.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from netllm_pl.checkpoint import load_task
from netllm_pl.cli import main
from netllm_pl.collect import collect
from netllm_pl.data import Batch
from netllm_pl.decision import LanguageModelPolicy
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ragged import select
from netllm_pl.recording import Experience
from netllm_pl.rollout import Array, Observations, rollout
from netllm_pl.testing import check_task, tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Rules as Streaming
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.job_scheduling import GraphScheduler, JobScheduling, JobSchedulingData
from tasks.job_scheduling.model import SHARES, Scores
from tasks.job_scheduling.simulator import Rules
from tasks.job_scheduling.synthetic import SyntheticWorkload

ALL: dict[str, Any] = {"returns": True, "actions": True}
EXPERIENCE = Experience(policies="srpt_fair,fair", episodes=4, eval_episodes=2, explore=0.3, values="lookahead")
TRAINER = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Experience is recorded once for all tests here, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def data(**arguments: Any) -> JobSchedulingData:
    small: dict[str, Any] = {
        "synthetic": SyntheticWorkload(queries=4, sizes=("2g", "5g")),
        "rules": Rules(jobs=5, executors=8, arrival_rate=2e-4),
        "test_seeds": [1, 2],
        "valid_seeds": [11, 12],
        "experience": EXPERIENCE,
        "batch_size": 8,
        "window": 4,
    }
    return JobSchedulingData(**small | arguments)


def make(**settings: Any) -> JobScheduling:
    """A task with random weights; LoRA's are no longer zero, as after training."""
    torch.manual_seed(0)
    task = JobScheduling(tiny_backbone(), width=16, head_width=16, **settings)
    for name, weight in task.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return task.eval()


def first(own: JobSchedulingData) -> Batch:
    batch: Batch = next(iter(own.train_dataloader()))
    return batch


@torch.no_grad()
def scores_of(task: Any, batch: Batch) -> Scores:
    scores: Scores = task.eval()(batch)
    return scores


def real_scores(scores: Tensor, stages: int) -> Tensor:
    """Scores (B, W, K, L) with 0 where there is no stage, and as many stages as asked for."""
    return F.pad(scores.where(scores > IMPOSSIBLE / 2, 0.0), (0, 0, 0, stages - scores.shape[2]))


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


# Promises -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"context": 3, "objective": "imitation", "sample": True, **ALL},
        {"stage_head": "fixed", "most_stages": 3, "both_ways": False},
    ],
)
def test_the_task_keeps_its_contract_with_settings_together(settings: dict[str, Any]) -> None:
    """tests/test_task_contract.py changes one at a time, and knows the small model and the baselines."""
    check_task(JobScheduling, data(), width=16, head_width=16, **settings)


# Decisions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executors", [5, 30])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sample": True, "context": 3, **ALL}, {"stage_head": "fixed", "most_stages": 2, "sample": True}],
)
def test_decisions_are_possible(settings: dict[str, Any], executors: int) -> None:
    """The simulator refuses others; whatever the size of the cluster, all jobs end."""
    own = data(rules=Rules(jobs=5, executors=executors, arrival_rate=2e-4))
    env = own.simulator("test")
    played = rollout(env, make(**settings).as_policy(), [1, 2, 3], record=True)
    assert np.isfinite(env.jobs()["t_completed_ms"]).all()
    number = played.actions[..., 0][played.alive]
    limits = [limits[k] for limits, k in zip(played.observations["limits"][played.alive], number, strict=True)]
    assert (number >= 0).all() and (played.actions[..., 1][played.alive] <= limits).all()
    if "most_stages" in settings:
        assert set(number.tolist()) == {0, 1}, "stages behind the end of the list are not chosen"


def test_the_small_model_decides_what_is_possible() -> None:
    for executors in (5, 30):
        env = data(rules=Rules(jobs=5, executors=executors)).simulator("test")
        rollout(env, GraphScheduler(d_model=16, width=16, head_width=16).as_policy(), [1, 2])
        assert np.isfinite(env.jobs()["t_completed_ms"]).all()


# What scores depend on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"context": 3, **ALL}, {"context": 3, "both_ways": False}, None])
def test_company_and_padding_change_nothing(settings: dict[str, Any] | None) -> None:
    """Of a batch, each window alone gives the same; None is the model without a language model."""
    torch.manual_seed(0)
    task = GraphScheduler(d_model=16, width=16, head_width=16) if settings is None else make(**settings)
    batch = first(data())
    together = scores_of(task, batch)
    stages, real = together.grid.shape[2], batch["mask"]
    assert together.grid.shape[3] == len(SHARES) + 1
    sizes, spread = set(), real_scores(together.grid, stages)[real].std(0)
    for row in range(len(real)):
        alone = scores_of(task, select(batch, slice(row, row + 1)))
        sizes.add(alone.grid.shape[2])
        close(real_scores(together.grid[row : row + 1], stages)[:, real[row]],
              real_scores(alone.grid, stages)[:, real[row]])  # fmt: skip
        tried = together.tried[row : row + 1, :, : alone.tried.shape[2]]
        known = torch.arange(tried.shape[2]) < batch["values_length"][row][:, None]
        close(tried[0][known], alone.tried[0][known])
    assert len(sizes) > 1 and spread.max() > 1e-3, "windows differ in size, and scores in value"


class Watched(LanguageModelPolicy):
    """Keeps the scores of each step."""

    def reset(self, n: int) -> None:
        super().reset(n)
        self.scores: list[Tensor] = []

    def act(self, observations: Observations) -> Array:
        self.real = [len(stages) for stages in observations["stages"]]
        return super().act(observations)

    def _choose(self, scores: Scores, batch: Batch) -> Tensor:
        self.scores += [row[0, :count] for row, count in zip(scores.grid, self.real, strict=True)]
        return super()._choose(scores, batch)


@pytest.mark.parametrize("both_ways", [True, False])
def test_streaming_equals_recomputation(both_ways: bool) -> None:
    """Over episodes of several times the context, one of which ends before the other."""
    task = make(context=3, both_ways=both_ways, **ALL)
    found, few = [], Rules(jobs=3, executors=6, arrival_rate=2e-4)
    for streaming in (True, False):
        policy = Watched(task, streaming)
        played = rollout(data(rules=few).simulator("test"), policy, [1, 2])
        found.append((policy.scores, played.actions))
    steps = sorted(played.alive.sum(0))
    assert np.array_equal(found[0][1], found[1][1]) and 4 * 3 < steps[0] < steps[1]
    for one, two in zip(found[0][0], found[1][0], strict=True):
        close(one, two)


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("objective", "metric"), [("values", "regret"), ("imitation", "accuracy")])
def test_it_learns_from_experience(objective: Any, metric: str, small: bool) -> None:
    """In a few steps on a few recorded ones; dropout and the rest of training as they are."""
    torch.manual_seed(0)
    task: Any = GraphScheduler(d_model=32, objective=objective) if small else make(objective=objective)
    batch = first(data(batch_size=32))
    before = measured(task, batch)[metric]
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    task.train()
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(task(batch), batch).backward()
        optimizer.step()
    after = measured(task, batch)[metric]
    wrong = (before, after) if metric == "regret" else (1 - before, 1 - after)
    assert wrong[1] < 0.75 * wrong[0], (before, after)


def measured(task: Any, batch: Batch) -> dict[str, float]:
    metrics = task.build_metrics()
    task.update_metrics(metrics, scores_of(task, batch), batch)
    return {name: float(value) for name, value in metrics.compute().items()}


def test_without_values_regret_is_for_other_actions_than_the_recorded_ones() -> None:
    batch = {name: value for name, value in first(data()).items() if not name.startswith("values")}
    found = measured(make(objective="imitation"), batch)
    assert found["regret"] == pytest.approx(1 - found["accuracy"])


@pytest.mark.parametrize("objective", ["values", "imitation"])
@pytest.mark.parametrize("settings", [{}, {"stage_head": "fixed", "most_stages": 1}])
def test_the_loss_of_nothing_to_learn_is_zero(objective: Any, settings: dict[str, Any]) -> None:
    """Such as a batch whose recorded decisions are to leave executors where they are; it still has gradients."""
    task = make(objective=objective, **settings)
    batch = first(data())
    nothing = torch.full_like(batch["action"], -1)
    batch |= {"action": nothing, "advice": nothing}
    loss = task.loss(task(batch), batch)
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_stages_behind_the_end_of_a_fixed_list_are_not_learned() -> None:
    batch = first(data(batch_size=16))
    assert int(batch["stages_length"].max()) > 1
    for objective in ("values", "imitation"):
        task = make(objective=objective, stage_head="fixed", most_stages=1)
        assert float(task.loss(task(batch), batch).detach()) < 100, "a score out of reach counts as an error"


# Mistakes, and the command line ---------------------------------------------------------------------------------------


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="most_stages is 0"):
        make(stage_head="fixed", most_stages=0)
    streaming = AdaptiveBitrateData(synthetic=SyntheticTraces(traces=2, duration_s=60), rules=Streaming(chunks=4))
    collect(streaming, {"bba": 1.0}, 2, tmp_path / "streaming")
    with pytest.raises(UserError, match="AdaptiveBitrateData"):
        data(pool=str(tmp_path / "streaming")).dataset("train")
    collect(data(), {"fair": 1.0}, 2, tmp_path / "plain")
    batch = first(data(pool=str(tmp_path / "plain")))
    for task in (make(), GraphScheduler(d_model=16)):
        with pytest.raises(UserError, match="needs action values, which the pool does not have"):
            task.loss(task(batch), batch)
    del batch["advice"]
    with pytest.raises(UserError, match="the experience, has no column advice"):
        task(batch)


@pytest.mark.parametrize("name", ["JobScheduling", "GraphScheduler"])
def test_what_is_fitted_can_be_loaded_and_played(name: str, tmp_path: Path) -> None:
    init: dict[str, Any] = {"width": 16, "head_width": 16}
    if name == "JobScheduling":
        init["backbone"] = str(Path(__file__).parents[1] / "configs" / "llm" / "tiny_random.yaml")
    experience = {"policies": "srpt_fair,fair", "episodes": 4, "eval_episodes": 2, "explore": 0.3,
                  "values": "lookahead"}  # fmt: skip
    own = {
        "synthetic": {"queries": 4, "sizes": ["2g", "5g"]}, "rules": {"jobs": 5, "executors": 8, "arrival_rate": 2e-4},
        "test_seeds": [1, 2], "valid_seeds": [11, 12], "experience": experience, "batch_size": 8, "window": 4,
    }  # fmt: skip
    tree = {
        "model": {"class_path": name, "init_args": init},
        "data": {"class_path": "JobSchedulingData", "init_args": own},
        "trainer": {**TRAINER, "enable_progress_bar": False, "enable_model_summary": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    main(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run"), "--debug"])
    task = load_task(tmp_path / "run" / "best.ckpt")
    assert type(task).__name__ == name
    played = data().episodes(task)
    assert np.isfinite(played["jct_s"]).all() and played["seed"].tolist() == [1, 2]
    again = data().episodes(load_task(tmp_path / "run" / "best.ckpt"))
    assert played.equals(again)
