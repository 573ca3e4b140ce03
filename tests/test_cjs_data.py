"""Scheduling data: what names and paths stand for, episodes against the published logs, seeds, recorded experience."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from netllm_pl.cli import main
from netllm_pl.collect import collect
from netllm_pl.errors import UserError
from netllm_pl.experience import read_pool
from netllm_pl.recording import Experience
from netllm_pl.rollout import Observations
from netllm_pl.testing import check_environment
from tasks.job_scheduling import JobSchedulingData
from tasks.job_scheduling.planning import Lookahead
from tasks.job_scheduling.simulator import Rules
from tasks.job_scheduling.synthetic import SyntheticWorkload

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG, OVERLAYS = CONFIGS / "job_scheduling.yaml", CONFIGS / "overlays" / "job_scheduling"
TINY = ["--config", str(CONFIG), "--data.synthetic", "{queries: 4, sizes: [2g, 5g]}", "--data.rules",
        "{jobs: 5, executors: 8}", "--data.test_seeds", "[1, 2]"]  # fmt: skip


def data(**arguments: Any) -> JobSchedulingData:
    """Small episodes."""
    experience = Experience(policies="fair,fifo", episodes=6, eval_episodes=3, explore=0.3)
    small = {"synthetic": SyntheticWorkload(queries=4, sizes=("2g", "5g")), "rules": Rules(jobs=5, executors=8)}
    return JobSchedulingData(
        **{**small, "test_seeds": [1, 2, 7], "experience": experience, "batch_size": 4} | arguments
    )


def act(observations: Observations) -> Any:
    """Decide by all that is seen."""
    seen = [
        nodes.sum() + extra.sum() for nodes, extra in zip(observations["nodes"], observations["extra"], strict=True)
    ]
    most = [len(stages) for stages in observations["stages"]]
    wanted = np.array(seen).astype(np.int64)
    return np.stack([wanted % most, 1 + wanted % observations["committable"]], axis=1)


# Against the published logs -------------------------------------------------------------------------------------------


def same(found: pd.DataFrame, log: pd.DataFrame) -> None:
    for name in log.columns:
        # Logs round sums of float32 features, and rewards to a millionth of a ms.
        close = (
            {"rtol": 1e-6, "atol": 1e-5} if name == "fsum4" else {"rtol": 0, "atol": 1e-6 if name == "reward" else 0}
        )
        if log[name].dtype.kind in "if":
            np.testing.assert_allclose(found[name], log[name], err_msg=name, **close)
        else:
            assert found[name].tolist() == log[name].tolist()


def test_decisions_and_jobs_are_those_of_the_published_logs(data_dir: Path, cjs_logs: Path, tmp_path: Path) -> None:
    """Through the command line, without random durations: every column of every decision and job."""
    words = ["--config", str(CONFIG), "--config", str(OVERLAYS / "tpch.yaml"), "--data.data_dir", str(data_dir)]
    words += ["--policies", "fair,fifo", "--deterministic", "--steps", "--data.test_seeds", "[1]"]
    main(["evaluate", *words, "--out", str(tmp_path)])
    for name, table in (("decisions", "steps"), ("jobs", "jobs")):
        found = pd.read_parquet(tmp_path / f"{table}.parquet")
        for policy in ("fair", "fifo"):
            log = pd.read_parquet(cjs_logs / f"det_{policy}_seed1_{name}.parquet")
            assert list(found.columns) == ["policy", "episode", "seed", *log.columns]
            same(found[found["policy"] == policy], log)
    episodes = pd.read_parquet(tmp_path / "episodes.parquet").set_index("policy")
    log = pd.read_parquet(cjs_logs / "det_fair_seed1_jobs.parquet")
    jct_s = (log["t_completed_ms"] - log["t_arrival_ms"]) / 1000
    assert episodes.loc["fair", "jct_s"] == pytest.approx(jct_s.mean(), abs=1e-9)
    assert episodes.loc["fair", "jct_p95_s"] == pytest.approx(jct_s.quantile(0.95), abs=1e-9)


def test_random_durations_are_those_of_the_published_streams(data_dir: Path, cjs_logs: Path) -> None:
    """Seed 1 decision by decision; and means of seeds 1 to 5 as the reference gives them, with one digit."""
    own = JobSchedulingData(workload="tpch", data_dir=str(data_dir), test_seeds=[1, 2, 3, 4, 5])
    tables = own.tables(own.policy("fair"), steps=True)
    for name, table in (("decisions", "steps"), ("jobs", "jobs")):
        found = tables[table]
        same(found[found["seed"] == 1], pd.read_parquet(cjs_logs / f"fair_seed1_{name}.parquet"))
    assert tables["episodes"]["jct_s"].round(1).tolist() == [42.8, 57.7, 65.0, 75.5, 52.7]


# Episodes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fixed", "random"])
def test_the_simulator_keeps_the_contract(mode: str) -> None:
    check_environment(data().simulator("valid", mode), [3, 0, 7, 2**40], act)


def test_one_row_an_episode_one_a_job_and_one_a_decision() -> None:
    own = data()
    tables = own.tables(own.policy("fair"), steps=True)
    episodes, jobs, steps = tables["episodes"], tables["jobs"], tables["steps"]
    assert episodes["seed"].tolist() == episodes["cluster"].tolist() == [1, 2, 7]
    assert jobs["seed"].tolist() == [seed for seed in (1, 2, 7) for _ in range(5)]
    waited_s = (jobs["t_completed_ms"] - jobs["t_arrival_ms"]).groupby(jobs["seed"]).mean() / 1000
    np.testing.assert_allclose(episodes["jct_s"], waited_s)
    np.testing.assert_allclose(steps.groupby("seed")["reward"].sum(), -5000 * waited_s)
    np.testing.assert_allclose(jobs.groupby("seed")["t_completed_ms"].max() / 1000, episodes["makespan_s"])
    assert steps.groupby("seed").size().tolist() == episodes["decisions"].tolist()
    assert all(group["step"].tolist() == list(range(len(group))) for _, group in steps.groupby("seed"))
    assert list(own.tables(own.policy("fair"))) == ["episodes", "jobs"]
    assert own.episodes(own.policy("fair"), "valid")["seed"].tolist() == [11, 12, 13, 14]


@pytest.mark.parametrize("name", ["fair", "random", "rollout"])
def test_episodes_side_by_side_do_not_change_the_answer(name: str) -> None:
    wide, narrow = data(), data(eval_batch_size=2)
    found = wide.tables(wide.policy(name), steps=True)
    for key, table in narrow.tables(narrow.policy(name), steps=True).items():
        pd.testing.assert_frame_equal(found[key], table)


def test_a_sequential_policy_is_told_of_every_episode() -> None:
    own = data()
    policy = own.policy("fair")
    expected = own.tables(policy)
    policy.sequential = True
    for key, table in own.tables(policy).items():
        pd.testing.assert_frame_equal(expected[key], table)


def test_random_decisions_are_many() -> None:
    own = data()
    steps = own.tables(own.policy("random"), steps=True)["steps"]
    several = steps[steps["n_schedulable"] > 1]
    assert several["stage_idx"].nunique() > 1 and steps["stage_idx"].min() == 0
    assert (steps["stage_idx"] < steps["n_schedulable"]).all()
    assert steps["num_exec"].between(1, steps["num_committable"]).all() and steps["num_exec"].nunique() > 3


def test_the_deterministic_switch_is_an_argument_of_the_data(tmp_path: Path) -> None:
    tables = []
    for number, switch in enumerate((["--deterministic"], ["--data.deterministic", "true"], [])):
        main(["evaluate", *TINY, "--policies", "fair,fifo,random", *switch, "--out", str(tmp_path / str(number))])
        tables.append(pd.read_parquet(tmp_path / str(number) / "jobs.parquet"))
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0].equals(tables[2])
    assert list(pd.read_csv(tmp_path / "0" / "summary.csv")["metric"].unique()) == [
        "jct_s", "jct_p50_s", "jct_p95_s", "makespan_s",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["evaluate", "--config", str(CONFIGS / "adaptive_bitrate.yaml"), "--policies", "bba", "--deterministic"])


# Names, paths and seeds -----------------------------------------------------------------------------------------------


def test_generated_splits_share_no_job_and_profiles_do(data_dir: Path) -> None:
    own = data()
    assert len({own.content(split) for split in ("train", "valid", "test")}) == 3
    published = data(workload="tpch", data_dir=str(data_dir))
    assert [len(published.workload(split)) for split in ("train", "valid", "test")] == [154] * 3
    by_path = data(workload=str(data_dir / "cjs" / "tpch.parquet"))
    assert by_path.content("train") == published.content("train") != own.content("train")


def test_no_seed_of_a_drawn_episode_is_that_of_another_split() -> None:
    """Whatever is drawn; what `collect` and learners reset simulators with are numbers like these."""
    own, taken = data(), []
    numbers = [0, 1, 7, 11, 2**29 - 1, 2**32 + 1, 2**63 - 2**32]
    for split, mode in (("train", "fixed"), ("valid", "random"), ("test", "random")):
        env = own.simulator(split, mode)
        env.reset(numbers)
        taken += env.first["seed"].tolist()
    assert len(set(taken)) == len(taken) and min(taken) >= 2**31
    named = own.simulator("valid")
    named.reset([11])
    assert named.first["seed"].tolist() == [11]


def test_held_out_queries_are_drawn_in_tests_and_no_others_there() -> None:
    own = data(held_out=[2, 3], rules=Rules(jobs=40, executors=8))
    drawn = {}
    for split in ("train", "valid", "test"):
        env = own.simulator(split, "random")
        env.reset([0, 1])
        drawn[split] = set(env.jobs()["query_num"].ravel().tolist())
    assert drawn == {"train": {1, 4}, "valid": {1, 4}, "test": {2, 3}}


def test_overlays_change_the_size_of_the_cluster_only(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for name in ("unseen1", "unseen2", "unseen3"):
        words = [word for part in ("tpch", name) for word in ("--config", str(OVERLAYS / f"{part}.yaml"))]
        with pytest.raises(SystemExit):
            main(["evaluate", "--config", str(CONFIG), *words, "--policies", "fair", "--print_config"])
        built = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
        sizes[name] = built["workload"], built["rules"]["jobs"], built["rules"]["executors"]
    assert sizes == {"unseen1": ("tpch", 200, 30), "unseen2": ("tpch", 450, 50), "unseen3": ("tpch", 450, 30)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"workload": "tpcj"}, "unknown workload 'tpcj'. Did you mean 'tpch'"),
        ({"workload": "tpch", "data_dir": "/none"}, "/none/cjs/tpch.parquet does not exist; run .* fetch tpch"),
        ({"held_out": [9]}, "held_out: there is no query 9; the workload has 1, 2, 3, 4"),
        ({"held_out": [1, 2, 3, 4]}, "held_out names all queries"),
        ({"test_seeds": []}, "data.test_seeds is empty"),
        ({"test_seeds": [-1]}, "data.test_seeds: seed -1 must lie between 0"),
        ({"test_seeds": [2**31]}, "data.test_seeds: seed 2147483648 must lie"),
        ({"test_seeds": [3, 3]}, "seed 3 of data.test_seeds is one of data.test_seeds already"),
        ({"valid_seeds": [7]}, "seed 7 of data.valid_seeds is one of data.test_seeds already"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        data(**arguments).simulator("test")


def test_wrong_names_are_named(tmp_path: Path) -> None:
    own = data(data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"unknown policy 'fare'. Did you mean 'fair'\?.*decima_argmax"):
        own.policy("fare")
    with pytest.raises(UserError, match=r"Decima needs the published weights: set data\.weights_dir"):
        own.policy("decima")
    with pytest.raises(UserError, match=r"unknown split 'tset'"):
        own.simulator("tset")
    with pytest.raises(UserError, match=r"unknown mode 'drawn'"):
        own.simulator("test", "drawn")
    with pytest.raises(UserError, match="object does not act"):
        own.episodes(object())


# Experience -----------------------------------------------------------------------------------------------------------


def test_recorded_experience_comes_in_windows(own_cache: Path) -> None:
    own = data(window=5)
    batch = own.dataset("train")[[0, 1]]
    assert batch["action"].shape == (2, 5, 2) and batch["nodes"].shape == (int(batch["nodes_length"].sum()), 5)
    assert batch["stages_length"].min() > 0 and len(own.dataset("valid")) > 3
    folders = sorted((own_cache / "experience").iterdir())
    assert sorted(len(read_pool(folder).episodes) for folder in folders) == [3, 6]
    again = data(window=5).dataset("train")[[0, 1]]
    assert (again["action"] == batch["action"]).all() and len(list((own_cache / "experience").iterdir())) == 2
    for number, other in enumerate(({"rules": Rules(jobs=5, executors=7)}, {"lookahead": Lookahead(horizon_s=30.0)})):
        data(window=5, **other).dataset("train")
        assert len(list((own_cache / "experience").iterdir())) == 3 + number


def test_a_pool_of_other_observations_is_refused(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(data(), {"fair": 1.0}, 2, tmp_path / "pool")
    assert len(data(pool=str(tmp_path / "pool"), experience=None, rules=Rules(jobs=3, executors=9)).dataset("train"))
    monkeypatch.setattr("tasks.job_scheduling.data.EXTRA", 99)
    with pytest.raises(UserError, match="has no column extra of 99 features a row"):
        data(pool=str(tmp_path / "pool")).dataset("train")


def test_learners_that_play_get_numbers_and_seeds() -> None:
    playing = data(experience=None, sessions=10)
    batches = list(playing.train_dataloader())
    assert len(batches) == 2 and {int(s) for batch in batches for s in batch["session"]} < set(range(10))
    assert next(iter(playing.val_dataloader()))["session"].tolist() == [11, 12, 13, 14]
