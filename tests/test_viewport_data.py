"""Viewport traces, their splits and windows."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from netllm_pl.errors import UserError
from tasks.viewport_prediction import ViewportPredictionData
from tasks.viewport_prediction.splits import PUBLISHED_SPLITS, check_splits
from tasks.viewport_prediction.synthetic import Synthetic, generate, synthetic_splits
from tasks.viewport_prediction.traces import Traces, read_traces, write_traces
from tasks.viewport_prediction.windows import disturbed, gather, make_windows

SMALL = Synthetic(videos=4, users=4, seconds=20.0, picture_height=16, picture_width=32)


@pytest.fixture(scope="session")
def frame() -> pd.DataFrame:
    """Two videos, three viewers, ten samples each, in sorted order."""
    rng = np.random.default_rng(1)
    table = pd.DataFrame(
        [(v, u, i) for v in (2, 10) for u in (1, 3, 11) for i in range(10)], columns=["video", "user", "i"]
    )
    table["t"] = (table.pop("i") * 0.2).astype("float32")
    table[["roll", "pitch", "yaw"]] = rng.uniform(-180, 180, (len(table), 3)).astype("float32")
    return table


def saved(frame: pd.DataFrame, path: Path) -> Path:
    """Write a table; NaN stays NaN and None becomes null, where pandas alone would write both as null."""
    columns = {name: pa.array(frame[name].tolist(), from_pandas=False) for name in frame if frame[name].dtype == object}
    table = pa.Table.from_pandas(frame.drop(columns=list(columns)), preserve_index=False)
    for name, values in columns.items():
        table = table.append_column(name, values)
    pq.write_table(table, path)
    return path


def same(first: Traces, second: Traces) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def csv_tree(traces: Traces, root: Path, level: str = "5Hz") -> None:
    for m, (video, user) in enumerate(zip(traces.video, traces.user, strict=True)):
        rows = slice(traces.starts[m], traces.starts[m + 1])
        folder = root / f"video{video}" / level
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f"{t},{a[0]},{a[1]},{a[2]}" for t, a in zip(traces.times[rows], traces.angles[rows], strict=True))
        (folder / f"simple_5Hz_user{user}.csv").write_text("\n".join(lines) + "\n")


def test_parquet_keeps_rows_and_sorts_labels_by_value(frame: pd.DataFrame, tmp_path: Path) -> None:
    traces = read_traces(saved(frame, tmp_path / "a.parquet"))
    assert traces.video.tolist() == ["2"] * 3 + ["10"] * 3
    assert traces.user.tolist() == ["1", "3", "11"] * 2
    assert np.array_equal(traces.angles, frame[["roll", "pitch", "yaw"]])
    assert traces.angles.dtype == np.float32
    assert traces.lengths.tolist() == [10] * 6


def test_interleaved_traces_in_shards_with_other_types_and_columns(frame: pd.DataFrame, tmp_path: Path) -> None:
    whole = read_traces(saved(frame, tmp_path / "whole.parquet"))
    by_time = frame.sort_values(["t", "user"], kind="stable").assign(extra="x")
    folder = tmp_path / "shards"
    folder.mkdir()
    saved(by_time[:25].astype({"video": "int64", "yaw": "float64"}), folder / "0.parquet")
    saved(by_time[25:].astype({"video": str, "user": str}), folder / "1.parquet")
    assert same(read_traces(folder), whole)


def test_written_traces_read_back(frame: pd.DataFrame, tmp_path: Path) -> None:
    traces = read_traces(saved(frame, tmp_path / "a.parquet"))
    write_traces(traces, tmp_path / "new" / "b.parquet")
    assert same(read_traces(tmp_path / "new"), traces)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["b.parquet"]
    assert pd.read_parquet(tmp_path / "new")["video"].dtype == np.int64


def test_labels_that_are_no_numbers_survive(frame: pd.DataFrame, tmp_path: Path) -> None:
    named = frame.assign(video=frame.video.map({2: "surf", 10: "02"}))
    traces = read_traces(saved(named, tmp_path / "a.parquet"))
    assert traces.video.tolist() == ["02"] * 3 + ["surf"] * 3
    write_traces(traces, tmp_path / "b.parquet")
    assert same(read_traces(tmp_path / "b.parquet"), traces)


@pytest.mark.parametrize("level", ["5Hz", ""])
def test_csv_equals_parquet(frame: pd.DataFrame, tmp_path: Path, level: str) -> None:
    traces = read_traces(saved(frame, tmp_path / "a.parquet"))
    csv_tree(traces, tmp_path / "tree", level)
    assert same(read_traces(tmp_path / "tree"), traces)
    one_video = read_traces(tmp_path / "tree" / "video10")
    assert (one_video.video.tolist(), one_video.user.tolist()) == (["10"] * 3, ["1", "3", "11"])
    one = read_traces(tmp_path / "tree" / "video2" / level / "simple_5Hz_user3.csv")
    assert (one.video.tolist(), one.user.tolist()) == (["2"], ["3"])
    assert np.array_equal(one.angles, traces.angles[10:20])


def test_real_csv_equals_parquet(data_dir: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(data_dir / "viewport" / "jin2022.parquet")
    traces = read_traces(saved(table[(table.video <= 2) & (table.user <= 3)], tmp_path / "a.parquet"))
    csv_tree(traces, tmp_path / "tree")
    assert same(read_traces(tmp_path / "tree"), traces)


def test_backward_time_warns_and_keeps_order(frame: pd.DataFrame, tmp_path: Path) -> None:
    swapped = frame.copy()
    swapped.loc[[3, 4, 33, 34], "t"] = swapped.loc[[4, 3, 34, 33], "t"].to_numpy()
    with pytest.warns(UserWarning, match="time stamps do not increase in 2 traces"):
        traces = read_traces(saved(swapped, tmp_path / "a.parquet"))
    assert np.array_equal(traces.angles, frame[["roll", "pitch", "yaw"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_traces(saved(frame, tmp_path / "b.parquet"))


def replaced(column: str, row: int, value: float | None) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(**{column: frame[column].astype(object).where(frame.index != row, value)})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns=["yaw", "t"]), r"missing column t, yaw; found video, user, roll, pitch"),
        (lambda f: f.assign(yaw=f.yaw.astype(str)), r"column 'yaw' is (large_)?string; expected numbers \(degrees\)"),
        (lambda f: f.assign(user=f.user + 0.5), r"column 'user' is double; expected integers or text"),
        (lambda f: f[:0], r"holds no rows"),
        (replaced("yaw", 17, np.nan), r"column 'yaw' is nan in row 17 \(video 2, user 3\)"),
        (replaced("roll", 0, np.inf), r"column 'roll' is inf in row 0 \(video 2, user 1\)"),
        (replaced("pitch", 59, None), r"column 'pitch' is null in row 59 \(video 10, user 11\)"),
    ],
)
def test_bad_tables(
    frame: pd.DataFrame, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    path = saved(change(frame), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=message) as error:
        read_traces(path)
    assert str(path) in str(error.value)


def test_bad_row_is_counted_in_its_own_shard(frame: pd.DataFrame, tmp_path: Path) -> None:
    saved(frame[:20], tmp_path / "0.parquet")
    saved(replaced("yaw", 5, np.nan)(frame[20:].reset_index(drop=True)), tmp_path / "1.parquet")
    with pytest.raises(UserError, match=r"1\.parquet: column 'yaw' is nan in row 5 "):
        read_traces(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_truncated_parquet(frame: pd.DataFrame, tmp_path: Path, keep: float) -> None:
    path = saved(frame, tmp_path / "a.parquet")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file"):
        read_traces(path)


def test_damaged_parquet_body(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = saved(frame, tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet.*cannot be read"):
        read_traces(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1,2,3\n0.2,1,2\n", r"user1\.csv, line 2: '0\.2,1,2'; expected four finite numbers"),
        ("t,roll,pitch,yaw\n0,1,2,3\n", r"line 1: 't,roll,pitch,yaw'; .* no header"),
        ("0,1,2,3,4\n0,1,2,3,4\n", r"line 1"),
        ("0,1,2,3\n\n0.2,1,nan,3\n", r"line 3"),
        (" \n", r"is empty"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "video1" / "simple_5Hz_user1.csv"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_traces(tmp_path)


def test_bad_paths(frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_traces(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds neither"):
        read_traces(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"expected \.parquet or \.csv"):
        read_traces(tmp_path / "notes.txt")
    traces = read_traces(saved(frame, tmp_path / "a.parquet"))
    csv_tree(traces, tmp_path / "tree", "5Hz")
    csv_tree(traces, tmp_path / "tree", "")
    with pytest.raises(UserError, match="both stand for video"):
        read_traces(tmp_path / "tree")


COUNTS = {
    ("jin2022", 60): (8820, 1754, 1698),
    ("jin2022", 30): (10080, 2006, 1950),
    ("wu2017", 60): (16530, 999, 1395),
    ("wu2017", 30): (16830, 1035, 1431),
}


@pytest.mark.filterwarnings("ignore:.*time stamps")
@pytest.mark.parametrize("name", ["jin2022", "wu2017"])
def test_published_window_counts(data_dir: Path, name: str) -> None:
    traces = read_traces(data_dir / "viewport" / f"{name}.parquet")
    splits = PUBLISHED_SPLITS[name]
    for history, horizon in ((10, 20), (20, 30)):
        for trim_tail in (60, 30):
            windows = [make_windows(traces, **splits[s], history=history, horizon=horizon, step=15, trim_head=30,
                                    trim_tail=trim_tail) for s in ("train", "valid", "test")]  # fmt: skip
            assert tuple(map(len, windows)) == COUNTS[name, trim_tail]


def test_a_share_of_the_training_traces_is_part_of_a_larger_one() -> None:
    generator = Synthetic(videos=4, users=8, seconds=20)
    data = {share: ViewportPredictionData(synthetic=generator, share=share) for share in (1.0, 0.5, 0.25, 0.01)}
    kept = {share: set(one.dataset("train").windows.trace.tolist()) for share, one in data.items()}
    assert kept[0.01] < kept[0.25] < kept[0.5] < kept[1.0] and len(kept[0.01]) == 1
    assert len(kept[0.5]) == -(-len(kept[1.0]) // 2)
    assert len(data[0.01].dataset("test")) == len(data[1.0].dataset("test"))
    with pytest.raises(UserError, match=r"data.share is 0"):
        ViewportPredictionData(share=0.0)


def test_noise_and_gaps_are_those_of_the_window_alone() -> None:
    random = np.random.default_rng(0)
    history = torch.from_numpy(random.uniform(-170, 170, (200, 10, 3)).astype(np.float32))
    window = torch.arange(200)
    assert disturbed(history, window, 0.0, 0.0) is history
    noisy = disturbed(history, window, 2.0, 0.0)
    assert float((noisy - history).std()) == pytest.approx(2.0, rel=0.05)
    assert torch.equal(noisy[50:60], disturbed(history[50:60], window[50:60], 2.0, 0.0))
    holed = disturbed(history, window, 0.0, 0.3)
    same = (holed == history).all(-1)
    assert float(same.float().mean()) == pytest.approx(0.7, abs=0.03)
    held = torch.where(same[:, 1:], True, (holed[:, 1:] == holed[:, :-1]).all(-1))
    assert held.all(), "a lost sample is the one before it"
    first = same.int().argmax(1)
    assert not same[:, 0].all() and torch.equal(holed[:, 0], history[window, first]), "there is none before the first"
    assert float((disturbed(torch.full((1, 4, 3), 179.9), window[:1], 1.0, 0.0)).abs().max()) <= 180


@pytest.mark.parametrize("seed", range(5))
def test_windows_and_gather_follow_the_rule_on_random_traces(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 90, 12)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    angles = rng.uniform(-180, 180, (starts[-1], 3)).astype(np.float32)
    video = np.repeat(np.array(["1", "2", "3", "4"]), 3)
    traces = Traces(angles, np.arange(len(angles)) * 0.2, video, np.array(["1", "2", "3"] * 4), starts)
    history, horizon, step, head, tail = (int(n) for n in rng.integers([1, 1, 1, 0, 0], [20, 20, 7, 30, 30]))
    expected = [
        (m, t)
        for m, length in enumerate(lengths)
        for t in range(head, length - tail, step)
        if video[m] in "123" and t >= history and t + horizon <= length
    ]
    windows = make_windows(traces, [1, "2", 3], None, history, horizon, step, head, tail)
    assert list(zip(windows.trace, windows.t, strict=True)) == expected
    pick = rng.permutation(len(windows))[:7]
    past, future = gather(traces, windows, pick, history, horizon)
    for row, index in enumerate(pick):
        m, t = expected[index]
        trace = angles[starts[m] : starts[m + 1]]
        assert np.array_equal(past[row], trace[t - history : t])
        assert np.array_equal(future[row], trace[t : t + horizon])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos": [1, 99]}, r"split 'test': videos 99 are in no trace of the data; known: 1, 2, 3, 4"),
        ({"users": ["bob"]}, r"split 'test': users bob"),
        ({"history": 500}, r"history 500 \+ horizon 20 does not fit: the longest trace has 100 samples"),
        ({"trim_tail": 80}, r"split 'test' has no window: .*trim_tail 80 leave no place"),
        ({"videos": []}, r"split 'test' is empty"),
        ({"step": 0}, r"step: 0 is too small"),
    ],
)
def test_impossible_windows(change: dict[str, object], message: str) -> None:
    traces, _, _ = generate(SMALL)
    sizes = {"videos": None, "users": None, "history": 10, "horizon": 20, "step": 5, "trim_head": 30, "trim_tail": 20}
    with pytest.raises(UserError, match=message):
        make_windows(traces, **(sizes | change), split="test")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"training": {}}, r"unknown split 'training'\. Did you mean 'train'"),
        ({"test": {"video": [1]}}, r"unknown key of split test 'video'"),
        ({"test": {"videos": []}}, r"splits\.test\.videos: is empty"),
        ({"test": {"videos": "12"}}, r"not a list"),
        (
            {"train": {"videos": [1, 2], "users": [1, 2]}, "test": {"videos": ["2"], "users": [2, 3]}},
            "share video 2, user 2",
        ),
        ({"train": {"videos": [1]}, "test": {"users": [2]}}, "splits train and test share video 1, user 2"),
        ({"train": {}, "valid": {}}, "share video"),
    ],
)
def test_bad_splits(splits: dict[str, dict[str, list[int | str]]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_splits(splits)


def test_good_splits() -> None:
    for splits in (*PUBLISHED_SPLITS.values(), synthetic_splits(SMALL), synthetic_splits(Synthetic())):
        check_splits(splits)
    check_splits({"train": {"videos": [1]}, "test": {"videos": [2]}})
    check_splits({"train": {"videos": [1], "users": [1]}, "test": {"videos": [1], "users": [2]}})
