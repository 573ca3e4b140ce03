"""Collecting experience: mixtures, exploration, action values, and the command."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from netllm_pl.cli import main
from netllm_pl.collect import Explore, collect, convert, parse_mixture
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError
from netllm_pl.experience import Windows, read_pool
from netllm_pl.rollout import rollout

pytestmark = pytest.mark.usefixtures("own_cache")


class Counting:
    """Counts: an action is added to the count, an episode of seed s is over after 1 + s % 5 steps."""

    def reset(self, seeds: Sequence[int]) -> dict[str, Any]:
        self.seeds = np.asarray(seeds)
        self.count, self.left = self.seeds % 7, 1 + self.seeds % 5
        return self._observe()

    def step(self, actions: Any) -> tuple[Any, ...]:
        alive = self.left > 0
        self.count, self.left = self.count + np.where(alive, actions, 0), self.left - alive
        return self._observe(), self.count.astype(float), self.left <= 0, {"seed": self.seeds}

    def sample(self, observations: dict[str, Any], rng: np.random.Generator) -> Any:
        return rng.integers(0, 100, len(observations["count"]))

    def _observe(self) -> dict[str, Any]:
        return {"count": self.count.copy(), "pair": np.stack([self.count, self.left], -1) / 2.0}


class Valued(Counting):
    """Counting that tells the values of actions 0 and 1."""

    def step(self, actions: Any) -> tuple[Any, ...]:
        values = np.stack([self.count, self.count + 1], -1)
        observations, rewards, over, info = super().step(actions)
        return observations, rewards, over, {**info, "values": values}


class Add:
    """Adds the same number each time."""

    def __init__(self, number: int) -> None:
        self.number = number

    def reset(self, n: int) -> None:
        pass

    def act(self, observations: dict[str, Any]) -> Any:
        return np.full(len(observations["count"]), self.number)


class Alone(Add):
    """Adds the number of episodes so far, and keeps what it is told at the end."""

    sequential = True

    def __init__(self) -> None:
        super().__init__(0)
        self.ends: list[int] = []
        self.watched: list[Any] = []

    def watch(self, env: Any) -> None:
        self.watched.append(env)

    def reset(self, n: int) -> None:
        assert n == 1
        self.number += 1

    def finish(self, observations: dict[str, Any]) -> None:
        self.ends.append(int(observations["count"][0]))


class CountingData(NetDataModule):
    """Data module of the toy."""

    baselines: ClassVar[dict[str, Callable[[], Any]]] = {"one": lambda: Add(1), "two": lambda: Add(2), "alone": Alone}

    def dataset(self, split: str) -> Any:
        raise NotImplementedError

    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        raise NotImplementedError

    def simulator(self, split: str, mode: str = "fixed") -> Counting:
        assert (split, mode) == ("train", "random")
        return Counting()

    def label(self, env: Any, values: str) -> Any:
        return Valued() if values == "toy" else super().label(env, values)


class SilentData(NetDataModule):
    """A task that only predicts."""

    baselines: ClassVar[dict[str, Callable[[], Any]]] = {"static": object}
    dataset = CountingData.dataset
    episodes = CountingData.episodes


def frame(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(file) for file in sorted(folder.glob("part-*.parquet"))], ignore_index=True)


# Mixtures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("bba", {"bba": 1.0}),
        ("bba:1,mpc:3", {"bba": 0.25, "mpc": 0.75}),
        (" a , b , c:2", {"a": 0.25, "b": 0.25, "c": 0.5}),
        ("runs/x:y/last.ckpt:1,b", {"runs/x:y/last.ckpt": 0.5, "b": 0.5}),
        ("runs/x:y/last.ckpt", {"runs/x:y/last.ckpt": 1.0}),
    ],
)
def test_mixtures_are_read(text: str, shares: dict[str, float]) -> None:
    assert parse_mixture(text) == shares


@pytest.mark.parametrize("text", ["", ",", "a,a", "a:0", "a:-1", "a:nan", "a:inf"])
def test_strange_mixtures_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="name"):
        parse_mixture(text)


def test_a_mixture_has_its_shares_and_is_interleaved(tmp_path: Path) -> None:
    collect(CountingData(), {"one": 0.25, "two": 0.75}, 200, tmp_path / "pool", seed=3, parallel=8)
    pool = read_pool(tmp_path / "pool", "CountingData")
    told = {name: about["episodes"] for name, about in pool.manifest["policies"].items()}
    assert told == {"one": 50, "two": 150}
    assert all((pool.episodes["policy"][i : i + 8] == "one").sum() == 2 for i in range(0, 200, 8))
    assert sorted(pool.episodes["seed"]) == list(range(3 * 2**32, 3 * 2**32 + 200))
    made_by = pool.manifest["made_by"]
    assert made_by["shares"] == {"one": 0.25, "two": 0.75} and made_by["data"]["init_args"]["batch_size"] == 64


def test_the_pool_holds_what_happened(tmp_path: Path) -> None:
    collect(CountingData(), {"one": 0.5, "two": 0.5}, 30, tmp_path / "pool", parallel=7)
    pool = read_pool(tmp_path / "pool")
    table = frame(tmp_path / "pool").merge(pool.episodes, on="episode")
    added = table["policy"].map({"one": 1, "two": 2})
    assert (table["action"] == added).all() and "values" not in table
    assert (table["count"] == table["seed"] % 7 + added * table["step"]).all()
    assert (table["reward"] == table["count"] + added).all()
    assert (table["steps"] == 1 + table["seed"] % 5).all()
    assert np.allclose(np.stack(table["pair"])[:, 1], (table["steps"] - table["step"]) / 2)
    assert (table.groupby("episode")["reward"].sum() == pool.episodes["return"]).all()


def test_the_same_seed_gives_the_same_pool_and_another_seed_another(tmp_path: Path) -> None:
    data = CountingData()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        collect(data, {"one": 1.0}, 20, tmp_path / name, explore=0.5, seed=seed)
    a, b, c = (frame(tmp_path / name) for name in "abc")
    pd.testing.assert_frame_equal(a, b)
    assert list(a["action"]) != list(c["action"])


def test_policies_that_carry_state_run_one_episode_after_the_other(tmp_path: Path) -> None:
    collect(CountingData(), {"alone": 0.5, "two": 0.5}, 24, tmp_path / "pool", parallel=6, explore=1e-9)
    table = frame(tmp_path / "pool").merge(read_pool(tmp_path / "pool").episodes, on="episode")
    own = table[table["policy"] == "alone"].groupby("episode")["action"].first()
    assert list(own) == list(range(1, 13))


def test_the_best_of_several_plays_of_an_episode_is_kept(tmp_path: Path) -> None:
    """Those of an episode differ by exploration only, and are kept whole."""
    data = CountingData()
    for name, times, parallel in (("once", 1, 8), ("best", 6, 8), ("other", 6, 100)):
        options = {"explore": 0.5, "parallel": parallel, "best_of": times}
        collect(data, {"one": 0.5, "two": 0.5}, 40, tmp_path / name, **options)  # type: ignore[arg-type]
    once, best = (read_pool(tmp_path / name).episodes for name in ("once", "best"))
    assert sorted(best["seed"]) == sorted(once["seed"]) and (best["steps"] == 1 + best["seed"] % 5).all()
    assert best["return"].mean() > 1.3 * once["return"].mean()
    for name in ("best", "other"):
        table = frame(tmp_path / name)
        assert (table.groupby("episode")["reward"].sum() == read_pool(tmp_path / name).episodes["return"]).all()
        counted = (
            table.groupby("episode")["action"].cumsum()
            + read_pool(tmp_path / name).episodes["seed"].to_numpy()[table["episode"]] % 7
        )
        assert (table["reward"] == counted).all()


def test_the_best_of_groups() -> None:
    run = rollout(Counting(), Explore(Add(1), 0.7, Counting().sample), [3, 3, 3, 0, 0, 0], record=True)
    best = run.best(3)
    assert best.returns.tolist() == [run.returns[:3].max(), run.returns[3:].max()]
    assert best.alive.sum(0).tolist() == [4, 1] and len(best.actions) == 4
    assert (best.info["seed"] == [3, 0]).all() and best.observations["pair"].shape == (4, 2, 2)


# Exploration and values -----------------------------------------------------------------------------------------------


def test_exploration_replaces_the_share_of_actions_that_was_asked_for() -> None:
    run = rollout(Counting(), Explore(Add(1000), 0.3, Counting().sample, 1), range(2000))
    random = run.actions[run.alive] != 1000
    assert abs(random.mean() - 0.3) < 0.02
    drawn = run.actions[run.alive][random]
    assert drawn.min() == 0 and drawn.max() == 99 and abs(drawn.mean() - 49.5) < 1.5
    assert (rollout(Counting(), Explore(Add(1), 0.0, Counting().sample), range(50)).actions == 1).all()


def test_exploration_shows_the_policy_the_simulator_and_the_end() -> None:
    policy, env = Alone(), Counting()
    rollout(env, Explore(policy, 0.0, env.sample), [0, 1])
    assert policy.ends == [0 + 1, 1 + 2 * 2] and policy.watched == [env, env]
    rollout(env, Explore(Add(1), 0.0, env.sample), [0, 1])  # most policies look into nothing


def test_values_of_all_actions_are_kept(tmp_path: Path) -> None:
    collect(CountingData(), {"one": 1.0}, 12, tmp_path / "pool", values="toy", explore=0.5)
    windows = Windows(read_pool(tmp_path / "pool"), 3)
    batch = windows[list(range(len(windows)))]
    expected = torch.stack([batch["count"], batch["count"] + 1], -1).float()
    assert torch.equal(batch["values"][batch["mask"]], expected[batch["mask"]])
    with pytest.raises(UserError, match="knows no action values 'hindsigth'"):
        collect(CountingData(), {"one": 1.0}, 12, tmp_path / "other", values="hindsigth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes is 0"),
        ({"explore": 1.5}, "explore is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"parallel": 0}, "parallel is 0"),
        ({"best_of": 0}, "best_of is 0"),
        ({"shares": {"thre": 1.0}}, "unknown policy 'thre'.*Known: alone, one, two"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(tmp_path: Path, options: Any, message: str) -> None:
    chosen: Any = {"shares": {"one": 1.0}, "episodes": 5, "out": tmp_path / "pool"} | options
    with pytest.raises(UserError, match=message):
        collect(CountingData(), **chosen)
    assert not (tmp_path / "pool").exists()


def test_a_task_that_does_not_act_collects_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SilentData has no simulator"):
        collect(SilentData(), {"static": 1.0}, 5, tmp_path / "pool")
    with pytest.raises(UserError, match="SilentData reads no published pools"):
        convert(SilentData(), tmp_path / "x.pkl", tmp_path / "pool")

    class Odd(CountingData):
        baselines: ClassVar[dict[str, Callable[[], Any]]] = {"odd": object}

    with pytest.raises(UserError, match="object does not act; give a policy"):
        collect(Odd(), {"odd": 1.0}, 5, tmp_path / "pool")
    assert not list(tmp_path.glob("*pool*"))


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    """Options that name a config of the toy, with parts that only `fit` uses."""
    file = tmp_path / "toy.yaml"
    data = {"class_path": "CountingData", "init_args": {"batch_size": 3}}
    file.write_text(yaml.safe_dump({"data": data, "trainer": {"max_epochs": 1}, "seed_everything": 3}))
    return ["--config", str(file), "--out", str(tmp_path / "pool")]


def test_the_command_writes_a_pool_and_says_so(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["collect", *config, "--policy", "one:3,two", "--episodes", "40", "--values", "toy", "--explore", "0.1"])
    printed = capsys.readouterr().out
    assert "one: 30 episodes" in printed and f"wrote 40 episodes, 120 steps in {tmp_path / 'pool'}" in printed
    made_by = json.loads((tmp_path / "pool" / "manifest.json").read_text())["made_by"]
    assert (made_by["explore"], made_by["values"], made_by["data"]["init_args"]["batch_size"]) == (0.1, "toy", 3)


def test_the_command_converts_a_published_pool(
    config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = rollout(Counting(), Add(1), [3, 4], record=True)
    monkeypatch.setattr(CountingData, "convert", lambda self, file: [run] if file == Path("x.pkl") else [])
    main(["collect", *config, "--convert", "x.pkl", "--policy", "genet"])
    assert "genet: 2 episodes, 9 steps" in capsys.readouterr().out
    assert list(read_pool(tmp_path / "pool").episodes["seed"]) == [-1, -1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: --policy"),
        (["--policy", "won"], "unknown policy 'won'. Did you mean"),
        (["--policy", "one", "--episodes", "many"], "episodes is 'many'; expected int"),
        (["--policy", "one", "--split", "train", "--values", "x"], "knows no action values 'x'"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["collect", *config, *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.splitlines()) <= 2
    assert not (tmp_path / "pool").exists()
