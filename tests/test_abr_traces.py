"""Bandwidth traces: files, packet lists, protocols and generators."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from netllm_pl.errors import UserError
from tasks.adaptive_bitrate.simulator import Simulator, Traces
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.trace_text import packets_to_bandwidth
from tasks.adaptive_bitrate.traces import leak_free_split, published_split, read_traces, select, source_of
from tasks.adaptive_bitrate.videos import generated_video

Change = Callable[[pd.DataFrame], pd.DataFrame]


@pytest.fixture
def frame() -> pd.DataFrame:
    """Three traces of 4, 6 and 8 samples, not in the order of their names."""
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"trace_name": name, "time_s": np.arange(n) * 1.5, "bandwidth_mbps": rng.uniform(0.1, 5, n)})
        for name, n in (("b", 4), ("a", 6), ("c", 8))
    ]
    return pd.concat(parts, ignore_index=True)


def saved(frame: pd.DataFrame, path: Path) -> Path:
    """Write a table; NaN stays NaN and None becomes null, where pandas alone would write both as null."""
    columns = {name: pa.array(frame[name].tolist(), from_pandas=False) for name in frame}
    pq.write_table(pa.table(columns), path)
    return path


def same(first: Traces, second: Traces) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def text_folder(traces: Traces, folder: Path) -> Path:
    folder.mkdir()
    for k, name in enumerate(traces.names):
        rows = range(traces.starts[k], traces.starts[k + 1])
        lines = (f"{traces.time_s[row]!s} {traces.bandwidth_mbps[row]!s}" for row in rows)
        (folder / str(name)).write_text("\n".join(lines) + "\n")
    return folder


# Traces ---------------------------------------------------------------------------------------------------------------


def test_parquet_keeps_the_order_of_traces_and_rows(frame: pd.DataFrame, tmp_path: Path) -> None:
    traces = read_traces(saved(frame, tmp_path / "a.parquet"))
    assert traces.names.tolist() == traces.sources.tolist() == ["b", "a", "c"]
    assert traces.starts.tolist() == [0, 4, 10, 18] and traces.pointers.tolist() == [1, 1, 1]
    assert np.array_equal(traces.bandwidth_mbps, frame["bandwidth_mbps"])
    interleaved = frame.sort_values("time_s", kind="stable")
    assert same(read_traces(saved(interleaved, tmp_path / "b.parquet")), traces)
    assert all(a.dtype == np.int64 for a in (traces.starts, traces.pointers)) and traces.time_s.flags.writeable


def test_parquet_with_other_types_and_columns(frame: pd.DataFrame, tmp_path: Path) -> None:
    plain = read_traces(saved(frame, tmp_path / "a.parquet"))
    frame["start_ptr"] = frame["trace_name"].map({"b": 3, "a": 5, "c": 1}).astype("int16")
    frame["source"] = frame["trace_name"].map({"b": "x", "a": "y", "c": "x"})
    frame["extra"] = None
    table = pa.Table.from_pandas(frame.astype({"trace_name": "category"}))
    pq.write_table(table, tmp_path / "b.parquet")
    traces = read_traces(tmp_path / "b.parquet")
    assert traces.names.tolist() == ["b", "a", "c"] and np.array_equal(traces.time_s, plain.time_s)
    assert traces.pointers.tolist() == [3, 5, 1] and traces.sources.tolist() == ["x", "y", "x"]
    numbers = frame.assign(trace_name=frame["trace_name"].map({"b": 7, "a": 5, "c": 6}))
    assert read_traces(saved(numbers, tmp_path / "c.parquet")).names.tolist() == ["7", "5", "6"]


def test_text_folder_equals_parquet(frame: pd.DataFrame, tmp_path: Path) -> None:
    traces = read_traces(saved(frame, tmp_path / "a.parquet"))
    folder = text_folder(traces, tmp_path / "text")
    (folder / ".hidden").write_text("not a trace")
    assert same(read_traces(folder), select(traces, [1, 0, 2]))
    assert same(read_traces(folder / "c"), select(traces, [2]))
    (folder / "c").write_text((folder / "c").read_text().replace(" ", "\t").replace("\n", "\r\n\r\n"))
    assert same(read_traces(folder / "c"), select(traces, [2]))


def test_select_repeats_and_empties(frame: pd.DataFrame, tmp_path: Path) -> None:
    traces = read_traces(saved(frame, tmp_path / "a.parquet"))
    twice = select(traces, [2, 2])
    assert twice.names.tolist() == ["c", "c"] and twice.starts.tolist() == [0, 8, 16]
    assert np.array_equal(twice.bandwidth_mbps[:8], traces.bandwidth_mbps[10:])
    assert len(select(traces, [])) == 0


def put(column: str, row: int, value: object) -> Change:
    return lambda frame: frame.assign(**{column: frame[column].astype(object).where(frame.index != row, value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns=["time_s"]), r"missing column time_s; found trace_name, bandwidth_mbps"),
        (lambda f: f.assign(bandwidth_mbps="fast"), r"column 'bandwidth_mbps' is string; expected numbers \(Mbit/s\)"),
        (lambda f: f.assign(trace_name=0.5), r"column 'trace_name' is double; expected text"),
        (lambda f: f.assign(start_ptr=1.0), r"column 'start_ptr' is double; expected integers"),
        (lambda f: f[:0], r"column '\w+' is null|holds no rows"),
        (put("time_s", 5, None), r"row 5: column 'time_s' is null"),
        (put("trace_name", 3, None), r"row 3: column 'trace_name' is null"),
        (put("bandwidth_mbps", 17, np.nan), r"row 17 \(trace c\): bandwidth_mbps is nan"),
        (put("bandwidth_mbps", 4, -0.1), r"row 4 \(trace a\): bandwidth_mbps is -0.1; expected .* at least 0"),
        (put("time_s", 9, np.inf), r"row 9 \(trace a\): time_s is inf"),
        (put("time_s", 8, 4.5), r"row 8 \(trace a\): time_s 4.5 follows 4.5; time must ascend"),
        (put("time_s", 0, -1.0), r"row 0 \(trace b\): time_s is -1.0"),
        (lambda f: f.assign(time_s=f.time_s + 1.6e9), r"row 0 \(trace b\): time_s starts at 1600000000.0"),
        (lambda f: f[f.trace_name != "a"][:5], r"row 4 \(trace c\): the trace has one sample"),
        (lambda f: f.assign(bandwidth_mbps=f.bandwidth_mbps.where(f.index.isin([4, 10]) | (f.trace_name == "b"), 0)),
         r"row 4 \(trace a\): the trace carries 0 Mbit/s on average"),
        (lambda f: f.assign(bandwidth_mbps=f.bandwidth_mbps * 3e-7), r"carries .*e-07 Mbit/s .*check the unit"),
        (lambda f: f.assign(start_ptr=0), r"row 0 \(trace b\): start_ptr is 0; expected .* from 1 to 3"),
        (lambda f: f.assign(start_ptr=5), r"row 0 \(trace b\): start_ptr is 5; expected .* from 1 to 3"),
        (lambda f: f.assign(start_ptr=np.arange(18) % 3 + 1), r"row 1 \(trace b\): start_ptr is 2, but 1 in row 0"),
    ],
)  # fmt: skip
def test_bad_tables(frame: pd.DataFrame, tmp_path: Path, change: Change, message: str) -> None:
    path = saved(change(frame), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=message) as error:
        read_traces(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 300


def test_a_row_is_named_as_the_file_counts(frame: pd.DataFrame, tmp_path: Path) -> None:
    mixed = frame.sample(frac=1, random_state=0).sort_values("time_s", kind="stable").reset_index(drop=True)
    row = int(mixed.index[mixed.trace_name == "c"][5])
    with pytest.raises(UserError, match=rf"row {row} \(trace c\)"):
        read_traces(saved(put("bandwidth_mbps", row, -1.0)(mixed), tmp_path / "a.parquet"))


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_truncated_parquet(frame: pd.DataFrame, tmp_path: Path, keep: float) -> None:
    path = saved(frame, tmp_path / "a.parquet")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file"):
        read_traces(path)


def test_damaged_names_of_columns(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = saved(frame, tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes().replace(b"time_s", b"time\xff\xfe"))
    with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file"):
        read_traces(path)


def test_damaged_parquet_body(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = saved(frame, tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file"):
        read_traces(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1 2\n\n2 fast\n", r"line 4: '2 fast'; expected '<seconds> <Mbit/s>'"),
        ("0 1\n1 2 3\n", r"line 2: '1 2 3'"),
        ("0 1\n1\n", r"line 2: '1'"),
        ("time mbps\n0 1\n", r"line 1: 'time mbps'"),
        ("0 1\n1 nan\n", r"line 2 \(trace t\.log\): bandwidth_mbps is nan"),
        ("0 1\n\n2 1\n1 1\n", r"line 4 \(trace t\.log\): time_s 1.0 follows 2.0"),
        ("0 1\n", r"line 1 \(trace t\.log\): the trace has one sample"),
        (" \n", r"is empty; expected lines"),
        ("trace_name,time_s\na,0\n", r"line 1: 'trace_name,time_s'; expected '<seconds> <Mbit/s>' or whole"),
        ("0 1\n0.001 2\n", r"line 1 \(trace t\.log\): the trace lasts 0.001 s; give a longer one"),
        ("1\n1600000000000\n", r"line 2: '1600000000000'; expected whole milliseconds.* at most 9 digits"),
        ("1\n2\n2.5\n", r"line 3: '2.5'; expected whole milliseconds"),
        ("1\n2 3\n", r"line 2: '2 3'; expected whole milliseconds"),
        ("5\n\n4\n", r"line 3: 4 follows 5; times must not descend"),
        ("0\n0\n", r"all packets come at 0 ms"),
        ("60000\n", r"line 1 \(trace t\.log\): the trace carries 0.0002 Mbit/s on average"),
    ],
)
def test_bad_text(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.log").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_traces(tmp_path)
    assert str(tmp_path / "t.log") in str(error.value)


def test_bad_paths(frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_traces(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no trace"):
        read_traces(tmp_path)
    saved(frame, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"folder with a\.parquet; give the path of one Parquet file"):
        read_traces(tmp_path)
    (tmp_path / "pool.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"pool\.pkl: cannot be read as text"):
        read_traces(tmp_path / "pool.pkl")


# Packet lists of Mahimahi ---------------------------------------------------------------------------------------------


def test_packets_become_the_mean_bandwidth_of_each_second() -> None:
    times = np.array([0, 1, 1, 1000, 1001, 1700, 3250, 3250])
    samples = packets_to_bandwidth(times)
    assert samples[:, 0].tolist() == [0, 1, 2, 3, 3.25]
    np.testing.assert_allclose(samples[1:, 1], np.array([4, 2, 0, 2 / 0.25]) * 0.012)
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, 100_000, 5000))
    samples = packets_to_bandwidth(times)
    assert samples[-1, 0] == times[-1] / 1000
    assert (samples[1:, 1] * np.diff(samples[:, 0])).sum() == pytest.approx(5000 * 0.012)


@pytest.mark.parametrize("times", [[1], [0, 1], [7, 14, 21], [500, 999]])
def test_short_packet_lists_are_repeated(times: list[int]) -> None:
    samples = packets_to_bandwidth(np.array(times))
    assert 1.0 <= samples[-1, 0] < 2.0
    carried = (samples[1:, 1] * np.diff(samples[:, 0])).sum() / samples[-1, 0]
    assert carried == pytest.approx(12 * len(times) / times[-1])


def test_a_packet_list_plays(tmp_path: Path) -> None:
    (tmp_path / "link").write_text("\n".join(map(str, range(4, 20_004, 4))))  # 3 Mbit/s
    traces = read_traces(tmp_path / "link")
    assert traces.names.tolist() == ["link"] and len(traces.time_s) == 21
    np.testing.assert_allclose(traces.bandwidth_mbps, 3.0)
    simulator = Simulator(traces, generated_video())
    simulator.reset([0])
    size, delay = simulator.first["chunk_bytes"][0], simulator.first["delay_ms"][0]
    assert delay == pytest.approx(80 + size * 8 / 3e6 / 0.95 * 1000)


# Protocols ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trace_5294_http---www.youtube.com", "fcc-5294"),
        ("test_fcc_trace_10652_http---www.amazon.com_1020_0", "fcc-10652"),
        ("001_test_fcc_trace_215364_http---www.ebay.com_600_0", "fcc-215364"),
        ("098_trace_939562_http---www.google.com-mobile-_320", "fcc-939562"),
        ("bus.ljansbakken-oslo-report.2010-09-28_1407CEST.log", "hsdpa-bus.ljansbakken-oslo"),
        ("012_train.oslo-vestby-report.2011-02-14_2139CET.log", "hsdpa-train.oslo-vestby"),
        ("trace_0", "trace_0"),
        ("my.link", "my.link"),
    ],
)
def test_sources(name: str, source: str) -> None:
    assert source_of(name) == source


def test_published_splits(data_dir: Path) -> None:
    splits = {split: published_split(data_dir, split) for split in ("train", "valid", "test")}
    assert [len(traces) for traces in splits.values()] == [235, 150, 100]
    names = pd.read_parquet(data_dir / "abr" / "traces_test.parquet", columns=["trace_name"])["trace_name"].astype(str)
    assert splits["test"].names.tolist() == names.drop_duplicates().tolist()
    assert splits["test"].pointers.min() >= 1 and splits["test"].pointers[0] == 28
    assert set(splits["valid"].names.tolist()) <= set(splits["train"].names.tolist())
    lasting = [np.median(t.time_s[t.starts[1:] - 1]) for t in splits.values()]
    np.testing.assert_allclose(lasting, [319, 318, 320], atol=2)


def test_leak_free_splits(data_dir: Path) -> None:
    splits = {split: leak_free_split(data_dir, split) for split in ("train", "valid", "test")}
    assert [len(traces) for traces in splits.values()] == [62, 23, 100]
    sources = {split: set(traces.sources.tolist()) for split, traces in splits.items()}
    assert len(sources["train"] | sources["valid"]) == 27
    assert not sources["train"] & sources["test"] and not (sources["train"] | sources["test"]) & sources["valid"]
    assert sources["valid"] == {
        "fcc-10367", "fcc-10652", "fcc-13092", "fcc-213586", "fcc-806330", "fcc-9370", "hsdpa-car.snaroya-smestad",
        "hsdpa-train.oslo-vestby",
    }  # fmt: skip
    assert same(splits["test"], published_split(data_dir, "test"))
    train, valid, test = (runs(traces, 10) for traces in splits.values())
    assert not train & test and not train & valid
    # Near-constant links of 0.5 Mbit/s, measured in steps of 0.012, agree for up to 13 samples by chance.
    assert not runs(splits["valid"], 15) & runs(splits["test"], 15)


def runs(traces: Traces, length: int) -> set[bytes]:
    """All that a trace holds in so many samples one behind the other."""
    ranges = (range(a, b - length + 1) for a, b in zip(traces.starts[:-1], traces.starts[1:], strict=True))
    return {traces.bandwidth_mbps[k : k + length].tobytes() for places in ranges for k in places}


def test_unknown_splits_and_missing_data(tmp_path: Path) -> None:
    for read in (published_split, leak_free_split):
        with pytest.raises(UserError, match=r"traces_test\.parquet does not exist"):
            read(tmp_path, "test")
    with pytest.raises(UserError, match=r"unknown split 'tset'\. Did you mean 'test'"):
        published_split(tmp_path, "tset")
    with pytest.raises(UserError, match=r"unknown split 'tset'\. Did you mean 'test'"):
        leak_free_split(tmp_path, "tset")
    with pytest.raises(UserError, match=r"unknown split 'tset'\. Did you mean 'test'"):
        generate(SyntheticTraces(), "tset")


# Generated traces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["walk", "markov"])
def test_generated_traces_are_reproducible_and_apart(kind: str) -> None:
    config = SyntheticTraces(kind, traces=20, seed=5)
    splits = {split: generate(config, split) for split in ("train", "valid", "test")}
    assert all(same(generate(config, split), traces) for split, traces in splits.items())
    assert same(generate(SyntheticTraces(kind, traces=7, seed=5), "train"), select(splits["train"], range(7)))
    others = [*splits.values(), generate(SyntheticTraces(kind, traces=20, seed=6), "train")]
    values = [set(traces.bandwidth_mbps.tolist()) for traces in others]
    assert not any(values[a] & values[b] for a in range(4) for b in range(a))
    assert len({name for traces in splits.values() for name in traces.names.tolist()}) == 60
    assert len(set(splits["train"].pointers.tolist())) > 10
    ends = splits["test"].time_s[splits["test"].starts[1:] - 1]
    assert ends.min() >= config.duration_s and ends.max() < config.duration_s + 5


def test_walk_has_the_documented_parameters(data_dir: Path) -> None:
    ours = generate(SyntheticTraces(traces=100), "test")
    theirs = read_traces(data_dir / "abr" / "traces_synthetic.parquet")

    def describe(traces: Traces) -> np.ndarray:
        inside = np.ones(len(traces.time_s), dtype=bool)
        inside[traces.starts[:-1]] = False
        steps, values = np.diff(traces.time_s, prepend=0)[inside], traces.bandwidth_mbps
        held = np.diff(np.flatnonzero(np.diff(values, prepend=-1) != 0))
        shares = [(held == count).mean() for count in (1, 2, 3)]
        return np.array(
            [*np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), steps.min(), steps.mean(), steps.max(), *shares]
        )

    np.testing.assert_allclose(describe(ours), describe(theirs), atol=0.12)


def test_markov_resembles_slow_links() -> None:
    traces = generate(SyntheticTraces("markov", 300), "train")
    means, deviations, memory = [], [], []
    for start, end in zip(traces.starts[:-1] + 1, traces.starts[1:], strict=True):
        values = traces.bandwidth_mbps[start:end]
        means.append(values.mean())
        deviations.append(values.std() / values.mean())
        memory.append(np.corrcoef(values[1:], values[:-1])[0, 1])
    assert 0.1 < min(means) < 0.4 and 0.7 < np.median(means) < 1.4 and 3 < max(means) < 5
    assert min(deviations) < 0.1 and 0.15 < np.median(deviations) < 0.4 and max(deviations) > 0.8
    assert 0.6 < np.median(memory) < 0.9
    assert traces.bandwidth_mbps.min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"traces": 0}, r"synthetic\.traces: 0 is too small"),
        ({"duration_s": 1}, r"synthetic\.duration_s: 1 is too small; expected 10 or more"),
        ({"low": 0}, r"synthetic\.low: 0 is too small"),
        ({"low": 6.0}, r"synthetic\.high: 5.0 must be above synthetic\.low, 6.0"),
        ({"high": float("nan")}, r"synthetic\.high"),
        ({"kind": "markow"}, r"unknown kind of synthetic traces 'markow'. Did you mean 'markov'"),
    ],
)
def test_impossible_generators(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SyntheticTraces(**change)
