"""Streaming data: what names and paths stand for, sessions against the published logs, recorded experience."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from netllm_pl.checkpoint import load_task
from netllm_pl.cli import main
from netllm_pl.collect import collect
from netllm_pl.errors import UserError
from netllm_pl.recording import Experience, recorded
from netllm_pl.testing import check_environment
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "abr"
CONFIGS = Path(__file__).parents[1] / "configs"
FEW = SyntheticTraces(traces=5, duration_s=60)


@pytest.fixture
def small(own_cache: Path) -> AdaptiveBitrateData:
    """Five generated traces a split, and a cache of its own."""
    return data()


def data(**arguments: Any) -> AdaptiveBitrateData:
    experience = Experience(policies="bba,rate:2", episodes=6, eval_episodes=3, explore=0.3)
    return AdaptiveBitrateData(**{"synthetic": FEW, "experience": experience, "batch_size": 4} | arguments)


def write_traces(path: Path, names: list[str], mbps: float = 3.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(name, float(second), mbps) for name in names for second in range(20)]
    pd.DataFrame(rows, columns=["trace_name", "time_s", "bandwidth_mbps"]).to_parquet(path)


# Against the published logs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "log"), [("bba", "bba"), ("genet_argmax", "genet_argmax")])
def test_steps_are_those_of_the_published_logs(policy: str, log: str, data_dir: Path, tmp_path: Path) -> None:
    """Through the command line: every column of every chunk, the first one of a session too."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no logs in {GOLDEN}")
    files = [CONFIGS / "adaptive_bitrate.yaml", CONFIGS / "overlays" / "adaptive_bitrate" / "fcc.yaml"]
    words = [*(word for file in files for word in ("--config", str(file))), "--data.data_dir", str(data_dir)]
    main(["evaluate", *words, "--policies", policy, "--steps", "--out", str(tmp_path)])
    steps, golden = pd.read_parquet(tmp_path / "steps.parquet"), pd.read_parquet(GOLDEN / f"{log}_video1.parquet")
    assert list(steps.columns) == ["policy", *golden.columns]
    for name in golden.columns.drop("trace_name"):
        np.testing.assert_allclose(steps[name], golden[name].astype(float), rtol=0, atol=1e-9, err_msg=name)
    counted = golden[golden["chunk"] > 0]
    episodes = pd.read_parquet(tmp_path / "episodes.parquet")
    np.testing.assert_allclose(episodes["qoe"], counted.groupby("trace")["reward"].mean(), atol=1e-9)
    np.testing.assert_allclose(episodes["rebuffer_s"], counted.groupby("trace")["rebuffer_s"].mean(), atol=1e-9)
    table = pd.read_csv(tmp_path / "summary.csv").set_index("metric")["mean"]
    assert table["qoe"] == pytest.approx(counted["reward"].mean(), abs=1e-9)


def test_the_protocols_are_those_of_the_reference(data_dir: Path) -> None:
    clean, leaky = (data(traces="fcc", protocol=p, data_dir=str(data_dir)) for p in ("leak_free", "published"))
    assert [len(clean.traces(split)) for split in ("train", "valid", "test")] == [62, 23, 100]
    assert [len(leaky.traces(split)) for split in ("train", "valid", "test")] == [235, 150, 100]
    assert "leaks" in leaky.note and not clean.note
    assert not data(traces="fcc", protocol="published", test_traces="fcc_synthetic", data_dir=str(data_dir)).note
    sources = [set(clean.traces(split).sources) for split in ("train", "valid", "test")]
    assert not sources[0] & sources[1] and not sources[1] & sources[2] and not sources[0] & sources[2]


def test_traces_and_video_of_the_test_can_be_others(data_dir: Path) -> None:
    other = data(traces="fcc", video="video1", test_traces="fcc_synthetic", test_video="video2", data_dir=str(data_dir))
    assert len(other.traces("train")) == 62
    assert len(other.traces("test")) == len(data(traces="fcc_synthetic", data_dir=str(data_dir)).traces("test")) == 100
    assert [other.simulator(split).video.name for split in ("train", "valid", "test")] == ["video1", "video1", "video2"]
    for split in ("train", "test"):
        np.testing.assert_array_equal(other.policy("robust_mpc", split).sizes, other.video(split).chunk_bytes)


# Sessions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fixed", "random"])
def test_the_simulator_keeps_the_contract(mode: str, small: AdaptiveBitrateData) -> None:
    """With levels that depend on all that is seen."""
    check_environment(
        small.simulator("train", mode),
        [3, 0, 7, 2**40],
        lambda o: (5 * o["chunk"] + 3 * o["level"] + (o["buffer_s"] > 9) + (o["throughput"][:, -1] > 0.4)) % 6,
    )


def test_one_row_a_session_and_one_a_chunk(small: AdaptiveBitrateData) -> None:
    tables = small.tables(small.policy("bba"), steps=True)
    episodes, steps = tables["episodes"], tables["steps"]
    assert episodes["episode"].tolist() == episodes["trace"].tolist() == list(range(5))
    assert episodes["cluster"].nunique() == 5 and episodes["cluster"].dtype.kind == "i"
    assert list(steps["trace"]) == [trace for trace in range(5) for _ in range(48)]
    assert list(steps["chunk"]) == list(range(48)) * 5
    counted = steps[steps["chunk"] > 0]
    np.testing.assert_allclose(episodes["qoe"], counted.groupby("trace")["reward"].mean())
    ladder = small.video("test").ladder_kbps / 1000
    np.testing.assert_allclose(
        episodes["bitrate_mbps"], [ladder[g].mean() for _, g in counted.groupby("trace").bitrate]
    )
    parts = episodes["bitrate_mbps"] - 4.3 * episodes["rebuffer_s"] - episodes["smoothness_mbps"]
    np.testing.assert_allclose(episodes["qoe"], parts)
    assert list(small.tables(small.policy("bba"))) == ["episodes"]
    other = small.episodes(small.policy("bba"), split="valid")
    assert other["trace_name"].str.contains("valid").all()


@pytest.mark.parametrize("name", ["robust_mpc", "robust_mpc_published", "offline_optimal"])
def test_sessions_side_by_side_do_not_change_the_answer(name: str, small: AdaptiveBitrateData) -> None:
    """Neither for a planner, nor for a policy whose errors carry over from one trace to the next."""
    narrow = data(eval_batch_size=2)
    pd.testing.assert_frame_equal(small.episodes(small.policy(name)), narrow.episodes(narrow.policy(name)))


def test_random_mode_draws_traces_and_starts(small: AdaptiveBitrateData) -> None:
    drawn = data(mode="random", synthetic=SyntheticTraces(traces=12, duration_s=60))
    frame = drawn.episodes(drawn.policy("bba"))
    assert len(frame) == 12 and frame["trace"].nunique() < 12
    pd.testing.assert_frame_equal(frame, drawn.episodes(drawn.policy("bba")))


def test_noise_changes_what_is_seen_and_not_what_happens(own_cache: Path) -> None:
    clean, noisy = data(), data(noise=0.5)
    check_environment(noisy.simulator("test"), [0, 1, 2])
    assert type(noisy.simulator("valid")) is type(clean.simulator("valid")), "test sessions only"
    seen = []
    for env in (clean.simulator("test"), noisy.simulator("test")):
        env.reset(range(5))
        for chunk in range(20):
            observations, reward, _, _ = env.step(np.full(5, chunk % 6))
        seen.append((observations, reward))
    (plain, before), (told, after) = seen
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(plain["buffer_s"], told["buffer_s"])
    factors = told["throughput"] / plain["throughput"]
    np.testing.assert_allclose(told["delay_s"] * factors, plain["delay_s"])
    assert np.std(np.log(factors)) == pytest.approx(0.5, rel=0.3)
    episodes = [one.episodes(one.policy("bba")) for one in (clean, noisy)]
    assert episodes[0].equals(episodes[1]), "it looks at the buffer only"
    assert not clean.episodes(clean.policy("rate")).equals(noisy.episodes(noisy.policy("rate")))


def test_a_share_of_the_experience_is_part_of_a_larger_one(small: AdaptiveBitrateData) -> None:
    def episodes(share: float) -> set[int]:
        found = data(share=share).dataset("train")
        return set(found.identify(list(range(len(found))))["episode"].tolist())

    assert episodes(0.1) < episodes(0.5) < episodes(1.0) == set(range(6)) and len(episodes(0.5)) == 3
    assert len(data(share=0.1).dataset("valid")) == len(small.dataset("valid"))


def test_a_policy_of_another_task_is_refused(small: AdaptiveBitrateData) -> None:
    with pytest.raises(UserError, match="object does not act"):
        small.episodes(object())
    with pytest.raises(UserError, match=r"unknown policy 'robst_mpc'. Did you mean 'robust_mpc'\?.*offline_optimal"):
        small.policy("robst_mpc")


# Names and paths ------------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "valid")):
        write_traces(tmp_path / f"{split}.parquet", [f"{split}{k}" for k in range(number + 2)])
    write_traces(tmp_path / "test" / "own.parquet", ["x"])
    (tmp_path / "test" / "own.parquet").unlink()
    (tmp_path / "test" / "one.log").write_text("0 1\n1 2\n2 2\n")
    found = data(traces=str(tmp_path))
    assert list(found.traces("train").names) == ["train0", "train1"]
    assert list(found.traces("valid").names) == ["valid0", "valid1", "valid2"]
    assert len(found.traces("test")) == 1


def test_sources_of_one_file_are_dealt_out(tmp_path: Path) -> None:
    """Whole sources, whatever the order of the file; a test set takes all."""
    names = [f"trace_{source}_site_{part}" for source in range(20) for part in range(3)]
    write_traces(tmp_path / "traces.parquet", names)
    write_traces(tmp_path / "turned.parquet", names[::-1])
    splits = [data(traces=str(tmp_path / f"{name}.parquet")).traces for name in ("traces", "turned")]
    sources = [[set(traces(split).sources) for split in ("train", "valid", "test")] for traces in splits]
    assert sources[0] == sources[1]
    assert [len(part) for part in sources[0]] == [14, 3, 3] and len(set.union(*sources[0])) == 20
    tested = data(test_traces=str(tmp_path / "traces.parquet"))
    assert len(tested.traces("test")) == 60 and len(tested.traces("train")) == 5


def test_a_video_is_a_name_or_a_path(tmp_path: Path) -> None:
    video = {"bitrate_kbps": [300, 900], "chunk_s": 2, "chunk_bytes": [[100] * 5, [300] * 5]}
    (tmp_path / "one.json").write_text(json.dumps({"only": video}))
    (tmp_path / "two.json").write_text(json.dumps({"first": video, "second": video}))
    assert data(video=str(tmp_path / "one.json")).video("train").name == "only"
    assert data(video=f"{tmp_path / 'two.json'}:second").video("train").name == "second"
    frame = data(video=str(tmp_path / "one.json")).episodes(data(video=str(tmp_path / "one.json")).policy("bba"))
    assert len(frame) == 5
    with pytest.raises(UserError, match="holds 2 videos"):
        data(video=str(tmp_path / "two.json")).video("train")
    with pytest.raises(UserError, match="unknown video 'third'"):
        data(video=f"{tmp_path / 'two.json'}:third").video("train")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"traces": "fc"}, r"unknown traces 'fc'. Did you mean 'fcc'\?.*path"),
        ({"traces": "fcc", "data_dir": "nowhere"}, r"nowhere/abr/traces_train.parquet does not exist .*NETLLM_DATA"),
        (
            {"video": "video1", "data_dir": "nowhere"},
            r"nowhere/abr/videos.json does not exist .*--data.video generated",
        ),
        ({"video": "no/such.json"}, r"unknown video 'no/such.json'.*path"),
        ({"history": 0}, "data.history is 0; it must be at least 1"),
        ({"window": 0}, "data.window is 0"),
        ({"stride": -1}, "data.stride is -1"),
        ({"sessions": 0}, "data.sessions is 0"),
        ({"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
        ({"eval_batch_size": 0}, "data.eval_batch_size is 0"),
        ({"num_workers": -1}, "data.num_workers is -1; it must be at least 0"),
        ({"lookahead": -1}, "data.lookahead is -1; it must be at least 0"),
        ({"noise": -1.0}, "data.noise is -1"),
        ({"share": 0.0}, "data.share is 0.0; it must be above 0"),
        ({"rules": {"payload": 2.0}}, "rules.payload is 2.0"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rules = {"rules": Rules(**arguments["rules"])} if "rules" in arguments else {}
        data(**arguments | rules).simulator("train")


def test_too_few_sources_cannot_be_split(tmp_path: Path) -> None:
    write_traces(tmp_path / "traces.parquet", ["a", "b"])
    with pytest.raises(UserError, match=r"holds traces of 2 source\(s\), too few to split"):
        data(traces=str(tmp_path / "traces.parquet")).traces("train")


# Experience -----------------------------------------------------------------------------------------------------------


def test_batches_are_windows_of_recorded_sessions(small: AdaptiveBitrateData) -> None:
    assert len(small.dataset("train")) == 6 * 3 and len(small.dataset("valid")) == 3 * 3
    batch = next(iter(small.train_dataloader()))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    wide = {"throughput": (4, 20, 10), "delay_s": (4, 20, 10), "next_bytes": (4, 20, 6), "upcoming_mb": (4, 20, 5, 6)}
    plain = ("action", "reward", "return_to_go", "step", "mask", "level", "buffer_s", "chunk", "chunks_left")
    assert shapes == wide | dict.fromkeys(plain, (4, 20))
    assert batch["step"].dtype == batch["action"].dtype == torch.int64 and batch["mask"].dtype == torch.bool
    assert (batch["chunk"] == batch["step"] + 1)[batch["mask"]].all()
    # an action is the level that the next step sees
    assert torch.equal(batch["action"][:, :-1], batch["level"][:, 1:])


def test_experience_is_recorded_once_and_again_when_it_would_differ(
    small: AdaptiveBitrateData, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.dataset("train")
    folders = {folder.name for folder in (own_cache / "experience").iterdir()}
    assert len(folders) == 1
    monkeypatch.setattr("netllm_pl.recording.collect", lambda *_, **__: pytest.fail("recorded again"))
    first = data().dataset("train")[[0, 5]]
    monkeypatch.undo()
    monkeypatch.setenv("NETLLM_CACHE", str(own_cache))
    others = (
        {"rules": Rules(rtt_s=0.1)},
        {"history": 8},
        {"synthetic": SyntheticTraces(traces=5, duration_s=60, seed=1)},
        {"experience": Experience(policies="bba,rate:2", episodes=6, eval_episodes=3, explore=0.3, seed=1)},
    )
    for other in others:
        batch = data(**other).dataset("train")[[0, 5]]
        assert batch["throughput"].shape != first["throughput"].shape or not torch.equal(
            batch["reward"], first["reward"]
        )
    assert len(list((own_cache / "experience").iterdir())) == 5


def test_experience_of_published_weights_is_that_of_their_file_and_of_the_seed(
    data_dir: Path, own_cache: Path, tmp_path: Path
) -> None:
    """Another file of the same name is not the same policy; what does not draw is one for all seeds."""
    weights = data_dir.parent / "weights"
    if not weights.is_dir():
        pytest.skip(f"no weights in {weights}")

    def actions(name: str, **arguments: Any) -> torch.Tensor:
        experience = Experience(policies=name, episodes=4, eval_episodes=1, explore=0.0)
        return data(experience=experience, weights_dir=str(tmp_path), **arguments).dataset("train")[[0, 1, 2]]["action"]

    (tmp_path / "genet.npz").write_bytes((weights / "genet.npz").read_bytes())
    first = actions("genet_argmax")
    assert not torch.equal(actions("genet", seed=1), actions("genet", seed=2))
    assert torch.equal(actions("genet_argmax", seed=1), first) and len(list((own_cache / "experience").iterdir())) == 3
    (tmp_path / "genet.npz").write_bytes((weights / "udr_real.npz").read_bytes())
    assert not torch.equal(actions("genet_argmax"), first)


def test_hindsight_values_tell_what_a_level_is_worth(small: AdaptiveBitrateData) -> None:
    """On the last chunk they are the rewards themselves: that of the level that was taken."""
    valued = data(experience=Experience(policies="bba", episodes=2, eval_episodes=1, explore=0.5, values="hindsight"),
                  rules=Rules(chunks=6, noise=(1.0, 1.0)))  # fmt: skip
    batch = valued.dataset("train")[[0, 1]]
    assert batch["values"].shape == (2, 20, 6) and batch["mask"].sum(1).tolist() == [5, 5]
    taken = batch["values"].gather(-1, batch["action"][..., None])[..., 0]
    torch.testing.assert_close(taken[:, 4], batch["reward"][:, 4], rtol=1e-5, atol=1e-5)
    assert (batch["values"].amax(-1) >= batch["return_to_go"] - 1e-4)[batch["mask"]].all()
    with pytest.raises(UserError, match="unknown kind of action values 'foresight'"):
        recorded(valued, Experience(policies="bba", values="foresight"), "train", "")


def test_a_collected_pool_trains_and_its_kind_of_values_is_validated(
    small: AdaptiveBitrateData, tmp_path: Path
) -> None:
    collect(small, {"rate": 1.0}, 2, tmp_path / "pool", values="hindsight")
    own = data(pool=str(tmp_path / "pool"), window=47, rules=Rules(chunks=8))
    assert len(own.dataset("train")) == 2
    assert "values" in own.dataset("train")[[0]] and "values" in own.dataset("valid")[[0]]
    with pytest.raises(UserError, match="no experience pool"):
        data(pool=str(tmp_path)).dataset("train")


def test_a_pool_of_other_observations_is_refused(small: AdaptiveBitrateData, tmp_path: Path) -> None:
    """As validation plays sessions as the data say, no model could read both."""
    pool = str(tmp_path / "pool")
    collect(small, {"bba": 1.0}, 2, tmp_path / "pool")
    sizes = {"bitrate_kbps": [300, 900], "chunk_s": 4, "chunk_bytes": [[100] * 5, [300] * 5]}
    (tmp_path / "video.json").write_text(json.dumps({"mine": sizes}))
    for other, said in (
        (data(pool=pool, history=6), "has history 10, the data 6; set data.history and model.history to 10"),
        (data(pool=pool, lookahead=2), "has lookahead 5, the data 2; set data.lookahead and model.lookahead to 5"),
        (data(pool=pool, video=str(tmp_path / "video.json")), "has levels 6, the data 2; choose its video"),
    ):
        with pytest.raises(UserError, match=said):
            other.dataset("train")
        with pytest.raises(UserError, match=said):
            other.dataset("valid")
    assert len(data(pool=pool, lookahead=0).dataset("train")), "sizes of later chunks need not be looked at"


def test_a_model_may_look_less_far_ahead_than_its_data(own_cache: Path, tmp_path: Path, tiny_backbone: Path) -> None:
    words = ["--config", str(CONFIGS / "adaptive_bitrate.yaml"), "--config", str(CONFIGS / "overlays" / "smoke.yaml")]
    words += ["--model.init_args.backbone", str(tiny_backbone), "--model.lookahead", "0", "--data.lookahead", "5"]
    words += ["--data.experience", "{policies: bba, episodes: 8, eval_episodes: 2}", "--model.objective", "imitation"]
    words += ["--data.synthetic", "{traces: 4, duration_s: 60}", "--data.rules.chunks", "10"]
    main(["fit", *words, "--run_dir", str(tmp_path / "run"), "--debug"])
    best = load_task(tmp_path / "run" / "best.ckpt")
    assert isinstance(best, AdaptiveBitrate) and best.lookahead == 0


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    write_traces(tmp_path / "traces.parquet", ["a", "b", "c", "d"])
    with pytest.raises(UserError, match=r"unknown split 'tset'\. Did you mean 'test'"):
        data(traces=str(tmp_path / "traces.parquet")).simulator("tset")


def test_an_optimal_plan_can_be_collected(small: AdaptiveBitrateData, tmp_path: Path) -> None:
    quiet = data(rules=Rules(noise=(1.0, 1.0), chunks=10))
    collect(quiet, {"offline_optimal": 0.5, "robust_mpc": 0.5}, 8, tmp_path / "pool")
    returns = json.loads((tmp_path / "pool" / "manifest.json").read_text())["policies"]
    assert returns["offline_optimal"]["return"]["mean"] > returns["robust_mpc"]["return"]["mean"]


def test_learners_that_play_get_numbers_of_sessions() -> None:
    playing = data(experience=None, sessions=10)
    batches = list(playing.train_dataloader())
    assert len(batches) == 2 and len({int(s) for batch in batches for s in batch["session"]}) == 8
    assert next(iter(playing.val_dataloader()))["session"].tolist() == list(range(20)), "4 starts in 5 traces"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"episodes": 0}, "experience.episodes is 0"), ({"explore": 1.5}, "experience.explore is 1.5")],
)
def test_settings_that_record_nothing_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Experience(**arguments)
