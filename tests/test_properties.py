"""What holds for any traces, videos, jobs, rules and decisions, and for any bytes in place of a file.

``NETLLM_NIGHTLY=1 pytest tests/test_properties.py`` tries a hundred times as many examples, at random.
"""

import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fuzz_readers import Fuzzed, readers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_abr_simulator import capacity
from test_cjs_conservation import assert_executors, assert_promises, assert_stages, assert_work

from netllm_pl.errors import UserError
from netllm_pl.plain_yaml import load_yaml
from netllm_pl.unpickle import as_array, read_npy, read_pickle
from tasks.adaptive_bitrate import simulator as abr
from tasks.adaptive_bitrate.trace_text import PACKET_BITS, packets_to_bandwidth
from tasks.adaptive_bitrate.traces import check_traces, read_traces
from tasks.adaptive_bitrate.videos import make_video
from tasks.job_scheduling import simulator as cjs
from tasks.job_scheduling.batch import pick
from tasks.job_scheduling.profiles import Profiles, starts
from tasks.job_scheduling.state import ARRIVAL, ARRIVED, COMPLETED, DONE
from tasks.job_scheduling.workloads import Workload, prepare

NIGHTLY = os.environ.get("NETLLM_NIGHTLY", "0") != "0"
Test = Callable[..., None]


def examples(count: int) -> Callable[[Test], Test]:
    """So many examples, always the same ones; nightly a hundred times as many, and others every night."""
    return settings(
        max_examples=100 * count if NIGHTLY else count, derandomize=not NIGHTLY, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of some digits, so that sums of them are not dominated by rounding."""
    return st.integers(round(low * 1000), round(high * 1000)).map(lambda thousandths: thousandths / 1000)


# Streaming ------------------------------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> abr.Traces:
    """One to three traces of two to eight samples, with outages."""
    parts, flat = draw(st.integers(1, 3)), []
    for _ in range(parts):
        steps = draw(st.lists(numbers(0.01, 9), min_size=1, max_size=7))
        begin = draw(st.sampled_from([0.0, 0.0, steps[0] / 2]))
        rates = draw(st.lists(st.one_of(st.just(0.0), numbers(0.05, 40)), min_size=len(steps), max_size=len(steps)))
        rates[-1] = max(rates[-1], 0.3)
        flat.append(np.stack([np.cumsum([begin, *steps]), [0.0, *rates]]))
    lengths = [part.shape[1] for part in flat]
    pointers = np.array([draw(st.integers(1, length - 1)) for length in lengths])
    names, (times, rates) = np.array([f"t{k}" for k in range(parts)]), np.concatenate(flat, axis=1)
    return check_traces(abr.Traces(names, names, starts(lengths), times, rates, pointers), str)


@st.composite
def sessions(draw: st.DrawFn) -> tuple[abr.Simulator, int]:
    """A simulator, and a seed of decisions."""
    levels, chunks = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    ladder = np.cumsum(draw(st.lists(st.integers(1, 2000), min_size=levels, max_size=levels)))
    sizes = draw(st.lists(st.integers(1, 3_000_000), min_size=levels * chunks, max_size=levels * chunks))
    video = make_video("v", ladder, np.array(sizes).reshape(levels, chunks), draw(numbers(0.5, 8)))
    low, limit = draw(numbers(0.3, 1)), draw(numbers(0.01, 20))
    rules = abr.Rules(
        chunks=draw(st.one_of(st.none(), st.integers(2, 9))), first_level=draw(st.integers(0, levels - 1)),
        buffer_limit_s=limit, drain_s=draw(numbers(0.01, min(limit, 3))), rtt_s=draw(numbers(0, 1)),
        payload=draw(numbers(0.1, 1)), rebuffer_weight=draw(numbers(0, 9)), smoothness_weight=draw(numbers(0, 9)),
        noise=(low, draw(numbers(low, 2))), scale=draw(numbers(0, 1)),
    )  # fmt: skip
    mode = draw(st.sampled_from(["fixed", "random"]))
    lookahead = draw(st.integers(0, 3))
    return abr.Simulator(draw(traces()), video, rules, mode, lookahead=lookahead), draw(st.integers(0, 99))


@examples(40)
@given(sessions())
def test_a_session_conserves_bytes_time_and_rewards(session: tuple[abr.Simulator, int]) -> None:
    simulator, seed = session
    video, rules, n = simulator.video, simulator.rules, 4
    rng, seeds = np.random.default_rng(seed), seed + np.arange(n)
    seen = simulator.reset(seeds)
    own = simulator.traces
    clock = own.time_s[own.starts[simulator.trace] + own.pointers[simulator.trace] - 1]
    buffer, level, total, told = np.zeros(n), np.full(n, rules.first_level), np.zeros(n), np.zeros(n)
    ladder = video.ladder_kbps / 1000
    info, reward = simulator.first, simulator.first["reward"]
    for chunk in range(simulator.chunks):
        if chunk:
            clock, chosen = simulator.clock.copy(), simulator.sample(seen, rng)
            seen, reward, over, info = simulator.step(chosen)
            assert (seen["reward"] == reward).all() and over.all() == over.any() == (chunk == simulator.chunks - 1)
        delay, taken = info["delay_ms"] / 1000, info["bitrate"]
        assert (info["chunk"] == chunk).all() and (info["chunk_bytes"] == video.chunk_bytes[chunk, taken]).all()
        assert (delay >= 0).all() and (info["rebuffer_s"] >= 0).all() and (info["sleep_ms"] >= 0).all()
        np.testing.assert_allclose(info["rebuffer_s"], np.maximum(delay - buffer, 0), atol=1e-9)
        slept = np.maximum(buffer - delay, 0) + video.chunk_s - info["buffer_s"]  # what is missing was waited for
        assert (slept >= -1e-9).all() and (info["buffer_s"] >= -1e-9).all()
        assert (info["buffer_s"] <= rules.buffer_limit_s + 1e-9).all()
        expected = ladder[taken] - rules.rebuffer_weight * info["rebuffer_s"]
        expected -= rules.smoothness_weight * np.abs(ladder[taken] - ladder[level])
        np.testing.assert_allclose(reward, expected, atol=1e-9)
        if simulator.mode == "fixed":
            for k in range(n):
                network = delay[k] - rules.rtt_s
                ends = np.array([clock[k], clock[k] + network])
                sent = np.diff(capacity(own, int(simulator.trace[k]), rules.payload, ends))
                np.testing.assert_allclose(sent, info["chunk_bytes"][k], rtol=1e-6, atol=1e-3)
        buffer, level = info["buffer_s"], taken
        total, told = total + expected, told + reward
    np.testing.assert_allclose(told, total, atol=1e-7)
    assert (seen["chunks_left"] == 0).all()


@examples(60)
@given(st.lists(st.integers(0, 4000), min_size=1, max_size=40).map(sorted).filter(lambda times: times[-1] > 0))
def test_packets_become_their_bits(times: list[int]) -> None:
    samples = packets_to_bandwidth(np.array(times))
    assert (np.diff(samples[:, 0]) > 0).all() and np.isclose(samples[-1, 0] * 1000 % times[-1], [0, times[-1]]).any()
    repeats = round(samples[-1, 0] * 1000 / times[-1])
    megabits = (samples[1:, 1] * np.diff(samples[:, 0])).sum()
    assert megabits == pytest.approx(repeats * len(times) * PACKET_BITS / 1e6)


@examples(30)
@given(traces())
def test_traces_come_back_from_files(whole: abr.Traces) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for k, name in enumerate(whole.names):
            own = slice(whole.starts[k], whole.starts[k + 1])
            rows = zip(whole.time_s[own].tolist(), whole.bandwidth_mbps[own].tolist(), strict=True)
            (Path(folder) / str(name)).write_text("".join(f"{time!r} {rate!r}\n" for time, rate in rows))
        back = read_traces(Path(folder))
        file, lengths = Path(folder) / "x.parquet", np.diff(whole.starts)
        columns = {"trace_name": np.repeat(whole.names, lengths), "start_ptr": np.repeat(whole.pointers, lengths)}
        columns |= {"time_s": whole.time_s, "bandwidth_mbps": whole.bandwidth_mbps}
        pq.write_table(pa.table({name: pa.array(values.tolist()) for name, values in columns.items()}), file)
        again = read_traces(file)
    for other in (back, again):
        assert np.array_equal(other.time_s, whole.time_s) and np.array_equal(other.starts, whole.starts)
        assert np.array_equal(other.bandwidth_mbps, whole.bandwidth_mbps)
    assert np.array_equal(again.pointers, whole.pointers)


# Scheduling -----------------------------------------------------------------------------------------------------------


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """One to three jobs of one to five stages, each measured at one to three levels."""
    children, levels, sizes = [], [], []
    stages = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    for count in stages:
        for stage in range(count):
            later = list(range(stage + 1, count))
            children.append(sorted(draw(st.sets(st.sampled_from(later)))) if later else [])
            levels.append(draw(st.lists(st.sampled_from([1, 5, 7, 10, 20, 50]), min_size=1, max_size=3, unique=True)))
            tasks = draw(st.integers(0, 4))  # as many at every level
            sizes += [[draw(st.integers(0, 2)), draw(st.integers(1, 3)), tasks] for _ in levels[-1]]
    lists = np.array(sizes)
    durations = np.random.default_rng(draw(st.integers(0, 99))).integers(1, 3000, lists.sum()).astype(np.float64)
    return prepare(
        Profiles(
            np.array(["2g"] * len(stages)), np.arange(len(stages)), starts(stages),
            starts([len(part) for part in children]), np.array([c for part in children for c in part], np.int64),
            starts([len(part) for part in levels]), np.concatenate(levels).astype(np.int64),
            starts(lists.ravel())[:-1].reshape(-1, 3), lists, durations,
        ),
        "drawn",
    )  # fmt: skip


@st.composite
def clusters(draw: st.DrawFn) -> cjs.Simulator:
    """A simulator with whatever rules."""
    switches = {field.name: draw(st.booleans()) for field in fields(cjs.Rules) if field.type in ("bool", bool)}
    rules = cjs.Rules(
        jobs=draw(st.integers(1, 6)), executors=draw(st.integers(1, 9)), moving_delay_ms=draw(numbers(0, 3)) * 1000,
        arrival_rate=10.0 ** -draw(st.integers(2, 5)), warmup_ms=draw(numbers(0, 2)) * 1000,
        stream=draw(st.sampled_from(["published", "counted", "median"])),
        order=draw(st.sampled_from(["hash", "ascending"])), **switches,
    )  # fmt: skip
    return cjs.Simulator(draw(workloads()), rules, draw(st.integers(0, 2**40)), tape=True)


@examples(40)
@given(clusters(), st.integers(0, 99), st.sampled_from([0.0, 0.2]))
def test_a_cluster_conserves_executors_tasks_time_and_rewards(simulator: cjs.Simulator, seed: int, rest: float) -> None:
    rules, n, rng = simulator.rules, 2, np.random.default_rng(seed)
    seen, total, clock = simulator.reset([seed, seed + 1]), np.zeros(2), np.zeros(2)
    for _ in range(5000):
        if simulator.over.all():
            break
        actions = simulator.sample(seen, rng)
        actions[rng.random(n) < rest, 0] = -1
        seen, rewards, _, _ = simulator.step(actions)
        assert (rewards <= 0).all() and (simulator.episodes.clock[:, 0] >= clock).all()
        total, clock = total + rewards, simulator.episodes.clock[:, 0].copy()
        if rng.random() < 0.3:
            for k in range(n):
                ep = pick(simulator.episodes, k)
                assert ep.glob[DONE] == np.isfinite(ep.times[:, COMPLETED]).sum() <= ep.glob[ARRIVED]
                assert_executors(ep, rules)
                assert_promises(ep, rules)
                if not simulator.over[k]:
                    assert_stages(ep, simulator.workload, rules)
    assert simulator.over.all()
    times = simulator.episodes.times
    ended = np.isfinite(times).all((1, 2))
    assert rest > 0 or ended.all()
    spent = (times[:, :, COMPLETED] - times[:, :, ARRIVAL]).sum(1) / 1000
    np.testing.assert_allclose(total[ended], -spent[ended], rtol=1e-9, atol=1e-9)
    for k in np.flatnonzero(ended).tolist():
        assert_work(simulator, k)


# Readers --------------------------------------------------------------------------------------------------------------

READERS = readers()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fuzzed]:
    """All readers with valid files of their own; the cache that they use is another one."""
    folder = tmp_path_factory.mktemp("fuzzed")
    patch = pytest.MonkeyPatch()
    patch.setenv("NETLLM_CACHE", str(folder / "cache"))
    made = {name: Fuzzed(name, reader, folder) for name, reader in READERS.items()}
    yield made
    patch.undo()


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_gives_data_or_the_error(name: str, fuzzed: dict[str, Fuzzed]) -> None:
    """Mutations of valid files, which are read themselves; `fuzz_readers.py` does a million."""
    with warnings.catch_warnings(action="ignore"):
        for path, _ in fuzzed[name].valid:
            READERS[name].read(path)
    found = [fuzzed[name].check(number) for number in range(20_000 if NIGHTLY else 40)]
    assert set(found) == {"data", "refused"}, next(what for what in found if what not in ("data", "refused"))


@examples(120)
@given(st.sampled_from(list(READERS)), st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)))
def test_any_bytes_give_data_or_the_error(fuzzed: dict[str, Fuzzed], name: str, body: bytes) -> None:
    path, files = fuzzed[name].valid[0]
    file, whole = files[0]
    file.write_bytes(body)
    try:
        with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
            READERS[name].read(path)
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
    finally:
        file.write_bytes(whole)


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=20,
)
"""What JSON can hold."""


@examples(60)
@given(PLAIN, st.binary(), st.dictionaries(st.integers(0, 2**40), PLAIN), st.integers(0, 5))
def test_plain_pickles_come_back(
    fuzzed: dict[str, Fuzzed], plain: Any, text: bytes, table: dict[int, Any], protocol: int
) -> None:
    file = fuzzed["experience_pickle"].valid[0][0].with_name("plain.pkl")
    file.write_bytes(pickle.dumps((plain, text, table), protocol))
    assert read_pickle(file) == (plain, text, table)


@examples(40)
@given(
    st.sampled_from(["<f8", ">f4", "<i8", "|u1", "|b1", "<u2"]), st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 5), st.booleans(),
)  # fmt: skip
def test_arrays_come_back(fuzzed: dict[str, Fuzzed], kind: str, shape: list[int], protocol: int, fortran: bool) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(kind, order="F" if fortran else "C")
    folder = fuzzed["experience_pickle"].valid[0][0].parent
    (folder / "array.pkl").write_bytes(pickle.dumps([values], protocol))
    np.save(folder / "array.npy", values)
    (back,) = read_pickle(folder / "array.pkl")
    for array in (as_array(back), read_npy(folder / "array.npy")):
        assert np.array_equal(array, values) and array.shape == values.shape


@examples(40)
@given(PLAIN)
def test_yaml_comes_back(value: Any) -> None:
    assert load_yaml(yaml.safe_dump(value)) == value
