"""Scheduling that a language model learns by playing: what is learned from is what was played, and it learns."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from netllm_pl.decision import LanguageModelPolicy
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ragged import LENGTH, take
from netllm_pl.rollout import rollout
from netllm_pl.task import OptimizerConfig
from netllm_pl.testing import tiny_backbone
from tasks.job_scheduling import JobSchedulingData, OnlineScheduling
from tasks.job_scheduling.model import COLUMNS, candidates
from tasks.job_scheduling.playing import watched
from tasks.job_scheduling.simulator import Rules, Simulator
from tasks.job_scheduling.synthetic import SyntheticWorkload

JOBS = SyntheticWorkload(queries=4, sizes=("2g", "5g"))
NAMES = (*COLUMNS, "heights")


def data(rules: Rules = Rules(jobs=4, executors=8, stream="counted")) -> JobSchedulingData:  # noqa: B008  # frozen
    return JobSchedulingData(synthetic=JOBS, rules=rules, valid_seeds=[11], experience=None, batch_size=4, sessions=64)


def task_of(**arguments: Any) -> OnlineScheduling:
    torch.manual_seed(0)
    return OnlineScheduling(tiny_backbone(), width=16, head_width=16, **arguments).eval()


@pytest.fixture(scope="module")
def env() -> Simulator:
    return data().simulator("train")


def steps_of(task: OnlineScheduling, env: Simulator) -> dict[str, torch.Tensor]:
    played = watched(LanguageModelPolicy(task, draw=True), env, [5, 6], NAMES)
    return {name: torch.from_numpy(value) for name, value in played.columns.items()}


def test_chances_are_those_of_the_draws(env: Simulator) -> None:
    """Actions of one decision, drawn many times, are as frequent as `chances` says, and there are no others."""
    task, count = task_of(), 3000
    observations = env.reset([5])
    policy = LanguageModelPolicy(task, draw=True)
    policy.reset(1)
    while len(observations["stages"][0]) < 3 or observations["committable"][0] < 3:
        observations = env.step(policy.act(observations))[0]
    drawn = policy.act({name: np.repeat(values, count, axis=0) for name, values in observations.items()})
    actions, found = np.unique(drawn, axis=0, return_counts=True)
    steps = {"action": torch.from_numpy(actions)}
    for name in NAMES:
        value = np.repeat(observations[name], len(actions), axis=0)
        steps[name] = torch.from_numpy(np.concatenate(list(value)) if value.dtype == object else value)
        if value.dtype == object:
            steps[name + LENGTH] = torch.full((len(actions),), len(value[0]))
    with torch.no_grad():
        chances, entropies = task.chances(steps)
    assert len(actions) > 5 and np.abs(chances.exp().numpy() - found / count).max() < 0.03
    assert float(chances.exp().sum()) == pytest.approx(1, abs=0.01)
    wanted = -float((chances.exp() * chances).sum())
    assert float(entropies[0]) == pytest.approx(wanted, abs=0.05)


def test_a_decision_is_one_candidate(env: Simulator) -> None:
    """Of candidates of a stage with the same number of executors one can be drawn, and the best is what it was."""
    task = task_of()
    steps = steps_of(task, env)
    ragged = [name for name in steps if name + LENGTH in steps]
    batch = {name: value if name in ragged else value[:, None] for name, value in steps.items()}
    batch["step"] = torch.zeros(len(steps["action"]), 1, dtype=torch.long)
    with torch.no_grad():
        grid = task(batch).grid
    counts = candidates(batch, grid.shape[2])
    for scores, numbers in zip(grid.flatten(0, 2), counts.flatten(0, 2), strict=True):
        kept = numbers[scores > IMPOSSIBLE / 2].tolist()
        assert len(kept) in (0, len(set(numbers.tolist()))) and len(set(kept)) == len(kept)


def test_steps_are_taken_whole(env: Simulator) -> None:
    task = task_of()
    steps = steps_of(task, env)
    order = torch.tensor([7, 2, 2, 11])
    with torch.no_grad():
        torch.testing.assert_close(task.chances(take(steps, order))[0], task.chances(steps)[0][order])


def test_it_learns() -> None:
    """Drawn decisions complete jobs earlier than those of the weights that it starts with."""
    pl.seed_everything(1, verbose=False)
    own = data(Rules(jobs=6, executors=3, arrival_rate=1e-4))
    task = task_of(optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0), jobs=6, minibatches=4)
    env = own.simulator("valid")

    def jct() -> float:
        return -float(rollout(env, task.as_policy(), range(100, 124)).returns.mean()) / 6

    before = jct()
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=6, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
                         use_distributed_sampler=False)  # fmt: skip
    trainer.fit(task, datamodule=own)
    after = jct()
    assert after < 0.9 * before, f"{before:.1f} s, then {after:.1f} s"


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="OnlineScheduling: group is 1"):
        task_of(group=1)
    with pytest.raises(UserError, match=r"set data.experience to null"):
        task_of().sessions({"action": torch.zeros(1, 1)})
