"""`evaluate`: intervals, signs, mistakes, files, table."""

import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from netllm_pl.errors import UserError
from netllm_pl.evaluate import Evaluation, Metric, compare_pairs, print_table, summarise

ERROR = Metric("error", "error")
RMSE = Metric("rmse", "square", root=True)
REWARD = Metric("reward", "reward", better="max")


def episodes(seed: int, policies: dict[str, float], clusters: int = 30, spread: float = 1.0) -> pd.DataFrame:
    """Clusters of unequal size share an offset; a policy adds its own shift and noise to each row."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(clusters), rng.integers(3, 12, clusters))
    base = rng.normal(0, spread, clusters)[cluster] + rng.normal(0, 0.5, len(cluster))
    frames = []
    for name, shift in policies.items():
        error = base + shift + rng.normal(0, 0.1, len(cluster))
        columns = {"policy": name, "window": np.arange(len(cluster)), "cluster": cluster, "error": error}
        frames.append(pd.DataFrame({**columns, "square": error**2, "reward": -error}))
    return pd.concat(frames, ignore_index=True)


def slow_interval(values: np.ndarray, cluster: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """The same bootstrap, written out: draw clusters, pool their rows, average."""
    rng = np.random.default_rng(seed)
    rows = [values[cluster == name] for name in np.unique(cluster)]
    means = [np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("seed", [1, 2])
def test_intervals_equal_those_of_a_slow_implementation(seed: int) -> None:
    frame = episodes(seed, {"a": 0.0, "b": -0.3})
    summary = summarise(frame, [ERROR], ["a", "b"], resamples=4000).set_index("policy")
    a, b = (frame[frame["policy"] == name].reset_index() for name in "ab")
    low, high = slow_interval(b["error"].to_numpy(), b["cluster"].to_numpy(), 99, 4000)
    assert summary.loc["b", ["low", "high"]].to_list() == pytest.approx([low, high], abs=0.06 * (high - low))
    low, high = slow_interval((a["error"] - b["error"]).to_numpy(), b["cluster"].to_numpy(), 99, 4000)
    found = summary.loc["b", ["paired_low", "paired_high"]].to_list()
    assert found == pytest.approx([low, high], abs=0.06 * (high - low))
    assert summary.loc["b", "paired_mean"] == pytest.approx((a["error"] - b["error"]).mean())


def test_intervals_cover_the_truth_and_ignoring_clusters_would_not() -> None:
    """Over 200 data sets about 95 % of the intervals hold the true mean; per-row resampling is far too sure."""
    hits, naive = 0, 0
    for seed in range(200):
        frame = episodes(seed, {"a": 0.0}, clusters=60)
        row = summarise(frame, [ERROR], ["a"], resamples=300).iloc[0]
        hits += row["low"] <= 0 <= row["high"]
        row = summarise(frame.assign(cluster=frame["window"]), [ERROR], ["a"], resamples=300).iloc[0]
        naive += row["low"] <= 0 <= row["high"]
    assert 178 <= hits <= 199
    assert naive < 150


def test_positive_paired_differences_are_better_whatever_the_direction() -> None:
    frame = episodes(3, {"first": 0.0, "good": -1.0, "bad": 1.0})
    summary = summarise(frame, [ERROR, REWARD], ["first", "good", "bad"]).set_index(["policy", "metric"])
    for metric in ("error", "reward"):
        assert summary.loc[("first", metric), ["paired_mean", "paired_low", "paired_high"]].to_list() == [0, 0, 0]
        assert summary.loc[("good", metric), "paired_low"] > 0.9
        assert summary.loc[("bad", metric), "paired_high"] < -0.9


def test_summary_has_the_promised_columns_and_order() -> None:
    frame = episodes(4, {"a": 0.0, "b": 1.0})
    summary = summarise(frame, [ERROR, RMSE], ["b", "a"])
    assert ",".join(summary.columns) == "policy,metric,mean,low,high,paired_mean,paired_low,paired_high,n"
    assert summary[["policy", "metric"]].agg("/".join, axis=1).to_list() == ["b/error", "b/rmse", "a/error", "a/rmse"]
    assert set(summary["n"]) == {len(frame) // 2}


def test_root_metrics_take_the_root_of_the_mean() -> None:
    frame = episodes(5, {"a": 0.0, "b": 2.0})
    square = summarise(frame, [Metric("mse", "square")], ["a", "b"])
    root = summarise(frame, [RMSE], ["a", "b"])
    for column in ("mean", "low", "high"):
        np.testing.assert_allclose(root[column], np.sqrt(square[column]))
    assert root["paired_mean"][1] == pytest.approx(root["mean"][0] - root["mean"][1])


def test_pairs_are_all_ordered_pairs_and_mirror_each_other() -> None:
    frame = episodes(6, {"a": 0.0, "b": 0.4, "c": -0.2})
    pairs = compare_pairs(frame, [ERROR], ["a", "b", "c"]).set_index(["policy", "other"])
    assert len(pairs) == 6
    forward, backward = pairs.loc[("c", "b")], pairs.loc[("b", "c")]
    for one, other in (("mean", "mean"), ("low", "high"), ("high", "low")):
        assert forward[one] == pytest.approx(-backward[other])
    summary = summarise(frame, [ERROR], ["a", "b", "c"]).set_index("policy")
    mirrored = summary.loc["c", ["paired_mean", "paired_low", "paired_high"]].to_list()
    assert pairs.loc[("c", "a"), ["mean", "low", "high"]].to_list() == mirrored


def test_same_seed_same_result_and_row_labels_do_not_matter() -> None:
    frame = episodes(7, {"a": 0.0, "b": 0.4})
    relabelled = frame.assign(cluster=frame["cluster"] * 7 - 100).set_index(np.arange(len(frame))[::-1])
    pd.testing.assert_frame_equal(
        summarise(frame, [ERROR], ["a", "b"], seed=3), summarise(relabelled, [ERROR], ["a", "b"], seed=3)
    )
    other = summarise(frame, [ERROR], ["a", "b"], seed=4)
    assert not other["low"].equals(summarise(frame, [ERROR], ["a", "b"], seed=3)["low"])


def test_one_cluster_gives_no_interval() -> None:
    row = summarise(episodes(8, {"a": 0.0}, clusters=1), [ERROR], ["a"]).iloc[0]
    assert np.isfinite(row["mean"]) and np.isnan(row["low"]) and np.isnan(row["high"])


@pytest.mark.parametrize("change", ["fewer", "other windows", "other clusters"])
def test_policies_measured_on_different_episodes_are_refused(change: str) -> None:
    frame = episodes(9, {"a": 0.0, "b": 0.0})
    b = frame["policy"] == "b"
    if change == "fewer":
        frame = frame.iloc[:-1]
    elif change == "other windows":
        frame.loc[b, "window"] = frame.loc[b, "window"].to_numpy()[::-1]
    else:
        frame.loc[b, "cluster"] += 1
    with pytest.raises(UserError, match=r"'b'.*not measured on the same episodes as 'a'"):
        summarise(frame, [ERROR], ["a", "b"])


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    frame = episodes(10, {"a": 0.0, "b": 0.0})
    frame.loc[frame.index[-1], "error"] = np.nan
    with pytest.raises(UserError, match=r"'b'.*error"):
        summarise(frame, [ERROR, REWARD], ["a", "b"])


class Data:
    """The least that `Evaluation` asks of a data module."""

    metrics = (ERROR, RMSE)
    note = ""

    def policy(self, name: str) -> float:
        if name not in ("static", "[linear]"):
            raise UserError(f"unknown policy '{name}'")
        return {"static": 0.0, "[linear]": 1.0}[name]

    def made_of(self, names: Collection[str]) -> dict[str, str]:
        return {}

    def fingerprint(self, split: str) -> str:
        return split

    def batches(self) -> int:
        return 5

    def batch_tables(self, policy: float, steps: bool = False, batches: range | None = None) -> Any:
        frame = episodes(0, {"": policy}).drop(columns="policy").astype({"error": "float32"})
        tables = {"episodes": frame} | ({"steps": frame.assign(step=1)} if steps else {})
        size = -(-len(frame) // 5)
        for number in range(5) if batches is None else batches:
            yield number + 1, {name: table[number * size : (number + 1) * size] for name, table in tables.items()}


def test_run_writes_the_steps_if_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Evaluation(Data(), ["[linear]", "static"], tmp_path, steps=True).run()
    steps, table = (pd.read_parquet(tmp_path / name) for name in ("steps.parquet", "episodes.parquet"))
    assert steps.columns[0] == "policy" and list(steps["policy"].unique()) == ["[linear]", "static"]
    assert len(steps) == len(table) and steps["error"].dtype == np.float64
    assert "steps.parquet" in capsys.readouterr().out


def test_run_writes_three_files_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = Evaluation(Data(), ["[linear]", "static"], tmp_path / "new" / "out").run()
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["episodes.parquet", "paired.csv", "summary.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(out / "summary.csv"), summary, check_dtype=False)
    assert list(pd.read_csv(out / "paired.csv").columns) == ["policy", "other", "metric", "mean", "low", "high"]
    table = pd.read_parquet(out / "episodes.parquet")
    assert table.columns[0] == "policy" and list(table["policy"].unique()) == ["[linear]", "static"]
    assert table["error"].dtype == np.float64 and len(table) == 2 * summary["n"][0]
    printed = capsys.readouterr().out
    assert "static is better than [linear] by 1.0" in printed and str(out) in printed.replace("\n", "")


def test_what_must_be_known_stands_above_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Data()
    data.note = "the splits leak"
    Evaluation(data, ["static"], tmp_path).run()
    assert "interval]; the splits leak" in " ".join(capsys.readouterr().out.split())


def test_results_of_a_command_are_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Evaluation(Data(), ["static"], tmp_path).run(command="evaluate")
    first = (tmp_path / "summary.csv").read_text()
    Evaluation(Data(), ["[linear]"], tmp_path).run(command="evaluate")
    assert (tmp_path / "summary.csv").read_text() == first
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name.startswith("evaluate-") and f"in {folder}\n" in capsys.readouterr().out
    assert pd.read_csv(folder / "summary.csv")["policy"].unique().tolist() == ["[linear]"]


def test_the_table_says_what_is_counted_and_that_one_cluster_is_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Evaluation(Data(), ["static"], tmp_path).run()
    ((_, whole),) = Data().batch_tables(0.0, batches=range(1))
    counted = "windows" if "window" in whole["episodes"] else "episodes"
    assert f"test {counted}, mean [95 % interval]" in " ".join(capsys.readouterr().out.split())
    one = whole["episodes"].assign(cluster=0).rename(columns={"window": "episode"})
    monkeypatch.setattr(Data, "batch_tables", lambda *_: [(5, {"episodes": one})])
    Evaluation(Data(), ["static"], tmp_path).run()
    text = " ".join(capsys.readouterr().out.split())
    assert "test episodes, mean (a 95 % interval needs two clusters at least)" in text and "nan" not in text


@pytest.mark.parametrize("names", [["static", "static"], []])
def test_policies_are_named_once(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="each once"):
        Evaluation(Data(), names, tmp_path / "out").run()


def test_an_unknown_policy_stops_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Data, "batch_tables", lambda *_: pytest.fail("a policy ran"))
    with pytest.raises(UserError, match="unknown policy 'statc'"):
        Evaluation(Data(), ["static", "statc"], tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def test_the_table_shows_each_number_with_its_interval() -> None:
    frame, names = episodes(11, {"[a]": 0.0, "b": -1.0}), ["[a]", "b"]
    summary, pairs = summarise(frame, [ERROR], names), compare_pairs(frame, [ERROR], names)
    text = printed(summary, pairs)
    for row in summary.itertuples():
        assert f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" in text
    row = summary.iloc[1]
    better = f"{row['paired_mean']:.3f} [{row['paired_low']:.3f}, {row['paired_high']:.3f}]"
    assert f"b is better than [a] by {better} error" in text and text.count(better) == 2
    assert text.count("[a]") == 3  # its row, the heading of the last column, the line below


def test_a_policy_that_is_worse_is_called_so() -> None:
    """With a positive difference and its interval, turned round."""
    frame, names = episodes(12, {"a": 0.0, "b": 1.0}), ["a", "b"]
    summary, pairs = summarise(frame, [ERROR], names), compare_pairs(frame, [ERROR], names)
    text = printed(summary, pairs)
    low, mean, high = (-summary.iloc[1][f"paired_{name}"] for name in ("high", "mean", "low"))
    assert 0 < low < mean < high
    assert f"b is worse than a by {mean:.3f} [{low:.3f}, {high:.3f}] error" in text and "b is better" not in text


def test_one_cluster_is_shown_without_intervals() -> None:
    frame, names = episodes(13, {"a": 0.0, "b": 1.0}, clusters=1), ["a", "b"]
    summary, pairs = summarise(frame, [ERROR], names), compare_pairs(frame, [ERROR], names)
    text = printed(summary, pairs)
    assert "nan" not in text and f"b is worse than a by {-pairs.iloc[-1]['mean']:.3f} error" in text


def printed(summary: pd.DataFrame, pairs: pd.DataFrame) -> str:
    console = Console(record=True, width=150, file=io.StringIO())
    print_table(summary, pairs, [ERROR], "test", console)
    return console.export_text()
