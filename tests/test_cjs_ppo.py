"""Decima trained by playing: gains at equal times, the loss's direction, learning, processes, checkpoints."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from netllm_pl.errors import UserError
from netllm_pl.ppo import advantages, clipped
from netllm_pl.ragged import LENGTH, take
from netllm_pl.rollout import rollout
from netllm_pl.task import OptimizerConfig
from netllm_pl.testing import check_player
from tasks.job_scheduling import Decima, JobSchedulingData
from tasks.job_scheduling.decima import PUBLISHED, DecimaNet, DecimaPolicy
from tasks.job_scheduling.learned_baselines import chances_of
from tasks.job_scheduling.playing import KernelPolicy, Players, centred, joined, play
from tasks.job_scheduling.simulator import Rules, Simulator
from tasks.job_scheduling.synthetic import SyntheticWorkload, generate

JOBS = SyntheticWorkload(queries=4, sizes=("2g", "5g"))
RULES = Rules(jobs=4, executors=8, stream="counted")


def data(**arguments: Any) -> JobSchedulingData:
    small = {"synthetic": JOBS, "rules": RULES, "test_seeds": [1, 2], "valid_seeds": [3], "experience": None}
    return JobSchedulingData(**{**small, "batch_size": 2, "sessions": 4} | arguments)


@pytest.fixture(scope="module")
def env() -> Simulator:
    return Simulator(generate(JOBS), RULES)


def net(seed: int = 0) -> DecimaNet:
    torch.manual_seed(seed)
    return DecimaNet(8, 8, 16)


# Advantages -----------------------------------------------------------------------------------------------------------


def test_gains_are_compared_at_the_same_time() -> None:
    """Two episodes: one decides at 0, 1, 2 and ends at 4, the other at 0 and 2 and ends at 3."""
    times = np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 3.0], [4.0, 3.0]])
    gains = np.array([[-8.0, -6.0], [-6.0, -2.0], [-5.0, 0.0]])
    alive = np.array([[True, True], [True, True], [True, False]])
    # the other's gain at 1 lies half way between -6 and -2; the first one's at 2 is -5
    expected = [[-8 + 6, -6 + 8], [-6 + 4, -2 + 5], [-5 + 2, 0]]
    assert centred(gains, times, alive, 2).tolist() == expected
    four = [np.concatenate([part, part], axis=1) for part in (gains, times, alive)]
    assert centred(*four, 2)[:, 2:].tolist() == expected, "groups do not meet"


def test_behind_its_end_an_episode_gains_nothing() -> None:
    times = np.array([[0.0, 0.0], [1.0, 5.0], [1.0, 9.0]])
    alive = np.array([[True, True], [False, True]])
    assert centred(np.array([[-1.0, -7.0], [0.0, -4.0]]), times, alive, 2).tolist() == [[6.0, -6.0], [0.0, -4.0]]


def test_time_discounts() -> None:
    """Without a critic an advantage is the sum of later rewards, less the later they come."""
    rewards, waits = torch.tensor([[-3.0], [-2.0], [-4.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    found = advantages(rewards, torch.zeros(3, 1), (-waits / 10).exp(), 1.0)
    e = float(np.exp(-0.1))
    torch.testing.assert_close(found[:, 0], torch.tensor([-3 - 6 * e, -6.0, -4.0]))


def test_the_task_discounts_by_its_clock(env: Simulator) -> None:
    task = Decima(size=8, width=8, head_width=16, group=2, horizon_s=50.0)
    played = play(task.net, env, [5, 5], [1, 2])
    before = task._before({name: torch.from_numpy(value) for name, value in played.columns.items()}, played)
    returns = np.zeros_like(played.rewards)
    for i in range(2):
        n = played.alive[:, i].sum()
        rewards, times = played.rewards[:n, i], played.times[:n, i]
        returns[:n, i] = [(rewards * np.exp((t - times) / 50))[k:].sum() for k, t in enumerate(times)]
    wanted = centred(returns, played.times, played.alive, 2).T[played.alive.T]
    np.testing.assert_allclose(before["gain"], (wanted - wanted.mean()) / wanted.std(ddof=1), rtol=1e-3, atol=1e-4)


# Playing --------------------------------------------------------------------------------------------------------------


def test_the_same_jobs_are_played_differently(env: Simulator) -> None:
    played = play(net(), env, [5, 5, 6], [1, 2, 1])
    assert played.times.shape == (len(played.rewards) + 1, 3)
    assert (np.diff(played.times, axis=0) >= 0).all() and (played.rewards[~played.alive] == 0).all()
    nodes = np.split(played.columns["nodes"], np.cumsum(played.columns["nodes" + LENGTH])[:-1])
    first = np.cumsum([0, *played.alive.sum(0)])[:-1]
    assert np.array_equal(nodes[first[0]], nodes[first[1]]) and not np.array_equal(nodes[first[0]], nodes[first[2]])
    returns = played.rewards.sum(0)
    assert returns[0] != returns[1]
    again = play(net(), env, [5], [2])
    assert again.rewards.sum() == pytest.approx(returns[1]), "an episode depends on its seeds alone"


@pytest.mark.parametrize("linked", [True, False])
def test_compiled_decisions_are_those_of_the_network(env: Simulator, linked: bool) -> None:
    class Given:
        def uniforms(self) -> np.ndarray:
            return drawn.pop(0)

    rng, model = np.random.default_rng(0), net(2)
    policy, kernel = DecimaPolicy(model), KernelPolicy(model, Given())
    policy.env = Given()
    observations, over, seen = env.reset([1, 2, 3]), np.zeros(3, bool), 0
    while not over.all():
        told = dict(observations)
        if not linked:
            told["edges"] = np.array([*(edges[:0] for edges in told["edges"]), None], object)[:3]
            told["heights"] = np.array([*(0 * heights for heights in told["heights"]), None], object)[:3]
        both = [rng.random(3), rng.random(3)]
        drawn = [*both, *both]
        actions = policy.act(told)
        assert np.array_equal(kernel.act(told)[~over], actions[~over])
        observations, _, over, _ = env.step(actions)
        seen += int((~over).sum())
    assert seen > 100
    told["stages"][1] = told["stages"][1][:0]
    drawn = [*both]
    assert kernel.act(told)[1].tolist() == [-1, 1]


def test_rewards_are_the_jobs_in_the_system_over_time(env: Simulator) -> None:
    played = play(net(), env, [5], [1])
    counts = played.columns["job_nodes" + LENGTH]
    waits = np.diff(played.times[:, 0])
    assert (-played.rewards[:, 0] <= (counts + RULES.jobs) * waits + 1e-6).all()
    assert -played.rewards.sum() == pytest.approx(
        (env.jobs()["t_completed_ms"] - env.jobs()["t_arrival_ms"]).sum() / 1e3
    )


def test_processes_play_what_one_plays(env: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Players, "method", "fork")  # imports would take longer than all else here
    seeds, draws = [5, 5, 6], [1, 2, 3]
    players = Players(env, net(), 2)
    try:
        parts = players.play(net(1), seeds, draws)
    finally:
        players.close()
    together, alone = joined(parts), play(net(1), env, seeds, draws)
    assert len(parts) == 2
    assert np.array_equal(together.alive, alone.alive)
    np.testing.assert_allclose(together.times, alone.times)
    np.testing.assert_allclose(together.rewards, alone.rewards)
    assert all(np.array_equal(together.columns[name], value) for name, value in alone.columns.items())


# The loss -------------------------------------------------------------------------------------------------------------


def steps_of(env: Simulator, model: DecimaNet) -> dict[str, torch.Tensor]:
    played = play(model, env, [5, 6], [1, 2])
    return {name: torch.from_numpy(value) for name, value in played.columns.items()}


def test_chances_are_those_of_the_draws(env: Simulator) -> None:
    """Actions of one decision, drawn many times, are as frequent as `chances_of` says."""
    model, count = net(3), 3000
    observations = env.reset([5])
    while len(observations["stages"][0]) < 3 or observations["committable"][0] < 3:
        observations = env.step(DecimaPolicy(model).act(observations))[0]
    repeated = {name: np.repeat(values, count, axis=0) for name, values in observations.items()}
    drawn = DecimaPolicy(model, seed=1).act(repeated)
    actions, found = np.unique(drawn, axis=0, return_counts=True)
    batch = {"action": torch.from_numpy(actions)}
    for name in ("nodes", "edges", "heights", "job_nodes", "caps", "stages"):
        value = observations[name][0]
        batch[name] = torch.from_numpy(np.concatenate([value] * len(actions)))
        batch[name + LENGTH] = torch.full((len(actions),), len(value))
    chances, entropies = chances_of(model, batch)
    assert len(actions) > 5 and np.abs(chances.exp().detach().numpy() - found / count).max() < 0.03
    assert (entropies > 0).all() and chances.exp().sum() <= 1 + 1e-5


def test_steps_are_taken_whole(env: Simulator) -> None:
    model = net()
    steps = steps_of(env, model)
    every = chances_of(model, steps)[0]
    order = torch.tensor([7, 2, 2, 11])
    torch.testing.assert_close(chances_of(model, take(steps, order))[0], every[order])


def test_the_loss_makes_good_actions_likelier(env: Simulator) -> None:
    model = net()
    steps = steps_of(env, model)
    before = chances_of(model, steps)[0].detach()
    gains = torch.where(torch.arange(len(before)) % 2 == 0, 1.0, -1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    clipped(chances_of(model, steps)[0], before, gains, 0.2).backward()
    optimizer.step()
    change = (chances_of(model, steps)[0] - before).detach()
    assert (change * gains).mean() > 0


def test_far_enough_is_enough() -> None:
    """Beyond the bound nothing pulls further, but back it pulls."""
    for moved, gain, pulls in ((0.3, 1.0, False), (0.3, -1.0, True), (-0.3, -1.0, False), (-0.3, 1.0, True)):
        logs = torch.tensor([moved], requires_grad=True)
        clipped(logs, torch.zeros(1), torch.tensor([gain]), 0.2).backward()
        assert bool(logs.grad) is pulls
    assert clipped(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 2.0]), 0.2).item() == -1.5


# The task -------------------------------------------------------------------------------------------------------------


def test_it_keeps_the_contract() -> None:
    check_player(Decima(size=8, width=8, head_width=16, group=2, minibatches=2), data())


def test_it_learns() -> None:
    """Drawn actions complete jobs far earlier than those of the network it starts with."""
    pl.seed_everything(1, verbose=False)
    own = data(rules=Rules(jobs=6, executors=3, arrival_rate=1e-4), sessions=40)
    task = Decima(OptimizerConfig(lr=5e-3, weight_decay=0.0), None, 8, 8, 16, minibatches=6, entropy=(0.003, 0.0003))
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


def test_it_starts_from_published_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted = DecimaNet()
    arrays = {}
    for name, value in wanted.state_dict().items():
        part, layer, kind = name.rsplit(".", 2)
        arrays[f"{PUBLISHED[part]}.{layer}.{kind}"] = value.numpy()
    np.savez(tmp_path / "decima.npz", **arrays)
    task = Decima(start=str(tmp_path / "decima.npz"))
    task.setup("test")
    assert any(not torch.equal(value, wanted.state_dict()[name]) for name, value in task.net.state_dict().items())
    task.setup("fit")
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in task.net.state_dict().items())


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="group is 1"):
        Decima(group=1)
    with pytest.raises(UserError, match="horizon_s is 0"):
        Decima(horizon_s=0)
    with pytest.raises(UserError, match=r"set data.experience to null"):
        Decima().sessions({"action": torch.zeros(1, 1)})
