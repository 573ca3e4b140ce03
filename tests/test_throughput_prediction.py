"""The fourth task: its traces, splits, windows and baselines; and that it is one folder and one YAML, and short."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.testing import tiny_backbone
from tasks.throughput_prediction import ThroughputPrediction, ThroughputPredictionData
from tasks.throughput_prediction.data import COLUMNS, harmonic, last, linear, read_traces, source_of
from tasks.throughput_prediction.task import HISTORY, HORIZON

ROOT = Path(__file__).parents[1]
NAME = "throughput_prediction"
SHORT = ThroughputPredictionData()


def table(name: str, mbps: list[float], step: float = 5.0) -> pd.DataFrame:
    """A trace whose k-th bandwidth holds on the k-th interval; the value at time 0 holds on nothing."""
    time = step * np.arange(len(mbps) + 1)
    return pd.DataFrame({"trace_name": name, "time_s": time, "bandwidth_mbps": [99.0, *mbps]})


def saved(path: Path, *traces: pd.DataFrame) -> Path:
    pd.concat(traces).to_parquet(path)
    return path


# The promise ----------------------------------------------------------------------------------------------------------


def test_the_task_is_short_and_nothing_else_knows_it() -> None:
    lines = sum(len(file.read_text().splitlines()) for file in (ROOT / "tasks" / NAME).glob("*.py"))
    assert lines < 200
    others = [
        file
        for package in ("netllm_pl", "tasks", "callbacks")
        for file in (ROOT / package).rglob("*.py")
        if NAME not in file.parts and (NAME in file.read_text() or "ThroughputPrediction" in file.read_text())
    ]
    assert not others


# Traces ---------------------------------------------------------------------------------------------------------------


def test_bandwidth_is_averaged_over_intervals_of_any_sampling(tmp_path: Path) -> None:
    uneven = pd.DataFrame({"trace_name": "b", "time_s": [1.0, 3.0, 6.0, 13.0], "bandwidth_mbps": [9.0, 1.0, 2.0, 4.0]})
    found = read_traces(saved(tmp_path / "t.parquet", table("a", [1, 2, 3]), table("c", [1, 3, 5, 7, 9], 1), uneven))
    assert {name: row.tolist() for name, row in found.items()} == {
        "a": [1, 2, 3],
        "c": [5],
        "b": pytest.approx([(2 * 1 + 3 * 2) / 5, 4]),
    }


def test_text_files_hold_the_same_as_parquet(tmp_path: Path) -> None:
    traces = [table("a", [1, 2, 3]), table("b", [4, 5])]
    (tmp_path / "texts").mkdir()
    for trace in traces:
        lines = trace[COLUMNS].to_csv(sep=" ", header=False, index=False)
        (tmp_path / "texts" / trace["trace_name"][0]).write_text(lines)
    one, two = read_traces(tmp_path / "texts"), read_traces(saved(tmp_path / "t.parquet", *traces))
    assert {name: row.tolist() for name, row in one.items()} == {name: row.tolist() for name, row in two.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth_mbps": [1.0, np.nan]}, "trace a: expected ascending"),
        ({"bandwidth_mbps": [1.0, -1.0]}, "trace a: expected ascending"),
        ({"bandwidth_mbps": [1.0, np.inf]}, "trace a: expected ascending"),
        ({"time_s": [1.0, 1.0]}, "trace a: expected ascending"),
        ({"time_s": ["x", "y"]}, "cannot be read"),
    ],
)
def test_a_broken_trace_is_named(change: dict[str, list[float]], message: str, tmp_path: Path) -> None:
    rows = pd.DataFrame({"trace_name": "a", "time_s": [0.0, 1.0], "bandwidth_mbps": [1.0, 1.0]} | change)
    with pytest.raises(UserError, match=message):
        read_traces(saved(tmp_path / "t.parquet", rows))


@pytest.mark.parametrize("path", ["nowhere.parquet", "nowhere", "empty", "text.parquet", "columns.parquet"])
def test_what_is_no_trace_is_an_error_of_one_line(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no table")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "columns.parquet")
    with pytest.raises(UserError, match=f"{path} cannot be read as bandwidth traces") as caught:
        read_traces(tmp_path / path)
    assert "\n" not in str(caught.value)


# Splits and windows ---------------------------------------------------------------------------------------------------


def sources(data: ThroughputPredictionData) -> dict[str, set[int]]:
    return {split: {source_of(name) for name in traces} for split, traces in data.splits().items()}


def disjoint(data: ThroughputPredictionData) -> bool:
    found = list(sources(data).values())
    return all(found) and sum(map(len, found)) == len(set.union(*found))


def test_cuts_of_one_measurement_are_one_source() -> None:
    one = {source_of(name) for name in ("012_trace_10652_http---ebay_0", "test_fcc_trace_10652_http---amazon_1_2")}
    route = {source_of(name) for name in ("bus.oslo-report.2010.log", "003_bus.oslo-report.2011.log")}
    assert len(one) == len(route) == 1 and one != route
    assert source_of("trace_106_x") != source_of("trace_1065_x")


def test_no_source_is_in_two_splits(tmp_path: Path) -> None:
    assert disjoint(SHORT)
    names = [f"{prefix}trace_{k}_x" for k in range(40) for prefix in ("", "test_fcc_")]
    pool = saved(tmp_path / "pool.parquet", *(table(name, [1.0] * 20) for name in names))
    test = saved(tmp_path / "test.parquet", *(table(f"{k:03d}_trace_{k}_y", [1.0] * 20) for k in range(0, 40, 3)))
    dealt, given = ThroughputPredictionData(str(pool)), ThroughputPredictionData(str(pool), str(test))
    assert disjoint(dealt) and disjoint(given)
    assert sum(map(len, dealt.splits().values())) == 80
    assert set(given.splits()["test"]) == {f"{k:03d}_trace_{k}_y" for k in range(0, 40, 3)}
    assert sum(map(len, given.splits().values())) == 14 + 2 * (40 - 14)


def test_the_public_traces_are_split_without_leaks(data_dir: Path) -> None:
    files = [str(data_dir / "abr" / f"traces_{split}.parquet") for split in ("train", "test")]
    data = ThroughputPredictionData(*files)
    assert disjoint(data)
    assert {split: len(traces) for split, traces in data.splits().items()} == {"train": 75, "valid": 10, "test": 100}


def test_windows_are_stretches_of_one_trace(tmp_path: Path) -> None:
    length = HISTORY + HORIZON
    ramps = [table(f"r{k}", list(np.arange(1000.0 * k, 1000 * k + length + 2))) for k in range(30)]
    path = saved(tmp_path / "t.parquet", *ramps, table("too-short", [1.0] * (length - 1)))
    data = ThroughputPredictionData(str(path))
    count = 0
    for split in ("train", "valid", "test"):
        rows = data.dataset(split)[:]
        values = torch.cat([rows["history"], rows["future"]], dim=1)
        assert values.shape[1] == length and (values.diff(dim=1) == 1).all()
        assert len(set(zip(rows["source"].tolist(), (values[:, 0] // 1000).tolist(), strict=True))) == len(values) // 3
        count += len(values)
    assert count == 30 * 3


def test_a_split_without_windows_is_an_error(tmp_path: Path) -> None:
    data = ThroughputPredictionData(str(saved(tmp_path / "t.parquet", table("a", [1.0] * 3))))
    with pytest.raises(UserError, match="split 'test' is empty"):
        data.test_dataloader()


# Policies -------------------------------------------------------------------------------------------------------------


def batch(history: list[float]) -> dict[str, torch.Tensor]:
    return {"history": torch.tensor([history]), "future": torch.zeros(1, HORIZON)}


def test_last_and_harmonic_hold_a_value() -> None:
    rising = batch([1.0, 1, 1, 1, 1, 2, 4, 4])
    assert last(rising).tolist() == [[4.0] * HORIZON]
    assert harmonic(rising)[0].tolist() == pytest.approx([5 / (1 + 1 + 1 / 2 + 1 / 4 + 1 / 4)] * HORIZON)
    assert harmonic(batch([0.0] * HISTORY)).isfinite().all()


def test_linear_has_the_least_absolute_error_on_training_windows() -> None:
    rng = np.random.default_rng(0)
    history = torch.tensor(rng.uniform(1, 5, (400, HISTORY)), dtype=torch.float32)
    future = (0.5 + 0.3 * history[:, -1:] + 0.4 * history[:, :1]).repeat(1, HORIZON)
    future[::10] += 50  # least squares would follow them
    policy = linear({"history": history, "future": future})
    error = (policy({"history": history, "future": future}) - future).abs()
    assert error[torch.arange(400) % 10 != 0].max() < 1e-2
    assert (policy(batch([-100.0] * HISTORY)) == 0).all(), "throughput is never negative"


def test_errors_are_those_of_the_windows() -> None:
    rows, found = SHORT.dataset("test")[:], SHORT.episodes(SHORT.policy("last"))
    error = rows["history"][:, -1:] - rows["future"]
    assert found["mae_mbps"].to_numpy() == pytest.approx(error.abs().mean(1).numpy())
    assert found["mse"].to_numpy() == pytest.approx(error.square().mean(1).numpy())
    assert found["cluster"].tolist() == rows["source"].tolist()


def test_the_task_starts_from_the_last_value_and_never_goes_below_zero() -> None:
    task = ThroughputPrediction(tiny_backbone()).eval()
    rows = SHORT.dataset("test")[:16]
    assert torch.allclose(task(rows), last(rows))
    torch.nn.init.constant_(task.head.layers[-1].bias, -9.0)
    assert (task(rows) == 0).all() and (task.train()(rows) < 0).any(), "in training the loss needs a gradient"


def test_it_beats_the_baselines_after_a_short_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(ROOT / "configs" / f"{NAME}.yaml")]
    tiny = ["--model.init_args.backbone", str(ROOT / "configs" / "llm" / "tiny_random.yaml")]
    steps = ["--trainer.max_steps", "120", "--trainer.accelerator", "cpu", "--model.init_args.optimizer.lr", "3e-3"]
    main(["fit", *config, *tiny, *steps, "--run_dir", str(tmp_path)])
    found = pd.read_csv(tmp_path / "paired.csv").set_index(["policy", "other", "metric"])
    assert found.loc[(str(tmp_path / "best.ckpt"), "linear", "mae_mbps"), "low"] > 0
    assert "linear" in capsys.readouterr().out


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    config = ["--config", str(ROOT / "configs" / "baselines" / "viewport_prediction_gru.yaml")]
    small = ["--config", str(ROOT / "configs" / "overlays" / "smoke.yaml"), "--data.init_args.synthetic.videos=4"]
    main(["fit", *config, *small, "--run_dir", str(tmp_path)])
    with pytest.raises(UserError, match="holds a ViewportGRU, which predicts no throughput"):
        SHORT.policy(str(tmp_path / "best.ckpt"))
