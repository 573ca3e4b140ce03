"""Plans that see the future: equal to trying all plans with the plain simulator, and to the published optimum.

Shapes: N sessions, L levels.
"""

import os
from copy import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from netllm_pl.rollout import rollout
from netllm_pl.testing import check_environment
from tasks.adaptive_bitrate import AdaptiveBitrateData
from tasks.adaptive_bitrate.plain import PlainSession, plain_session
from tasks.adaptive_bitrate.planning import Hindsight, OfflineOptimal, hindsight_values
from tasks.adaptive_bitrate.simulator import Rules, Simulator, Traces, Video
from tasks.adaptive_bitrate.splits import named_video
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.traces import published_split, select, with_starts
from tasks.adaptive_bitrate.videos import generated_video, make_video

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "abr" / "offline_opt_video1.parquet"
LADDER, CLOSE = [300, 1000, 2500], [900, 1000, 1100]
SESSIONS = 8


def link(*intervals: tuple[float, float]) -> Traces:
    """One trace from seconds and Mbit/s of its intervals."""
    seconds, mbps = np.array(intervals).T
    name = np.array(["link"])
    time = np.concatenate([[0.0], seconds.cumsum()])
    bandwidth = np.concatenate([mbps[:1], mbps])
    return Traces(name, name, np.array([0, len(time)]), time, bandwidth, np.ones(1, np.int64))


def rough(seed: int) -> Traces:
    """Traces that jump between next to nothing and plenty, shorter than a session, with starts within them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 30, SESSIONS)
    time = np.concatenate([np.append(0.0, rng.uniform(0.5, 4, n - 1).cumsum()) for n in lengths])
    bandwidth = rng.choice([0.02, 0.1, 0.5, 1.0, 3.0, 8.0], len(time))
    names = np.array([f"rough{k}" for k in range(SESSIONS)])
    return Traces(names, names, np.append(0, lengths.cumsum()), time, bandwidth, rng.integers(1, lengths))


def video(chunks: int, ladder: list[int] = LADDER, spread: float = 0.5) -> Video:
    sizes = np.random.default_rng(0).uniform(1 - spread, 1 + spread, (len(ladder), chunks))
    return make_video("short", ladder, (sizes * np.array(ladder)[:, None] * 500).astype(int), 4.0)


def best_value(session: PlainSession, chunks: int, weight: float) -> float:
    """Largest sum of rewards over all plans of the next chunks, plus the worth of the buffer that is left."""
    if chunks == 0 or session.chunk == session.chunks:
        return 0.0 if session.chunk == session.chunks else weight * session.buffer / 1000.0
    return max(level_values(session, chunks, weight))


def level_values(session: PlainSession, chunks: int, weight: float) -> list[float]:
    values = []
    for level in range(len(session.ladder)):
        after = copy(session)  # its arrays are replaced by a step, not changed
        reward = after.step(level)[1]
        values.append(reward + best_value(after, chunks - 1, weight))
    return values


def begin(simulator: Simulator) -> tuple[list[PlainSession], np.ndarray]:
    """Begin all sessions, and the same ones in plain Python; draw levels for all chunks (chunks - 1, N)."""
    plain = [plain_session(copy(simulator), seed) for seed in range(SESSIONS)]
    simulator.reset(range(SESSIONS))
    return plain, np.random.default_rng(0).integers(0, simulator.levels, (simulator.chunks - 1, SESSIONS))


# Hindsight values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "mode", "weight"),
    [
        (Rules(chunks=8), "fixed", 0.1),
        (Rules(chunks=8, noise=(1.0, 1.0), scale=0.5, first_level=2, rtt_s=0.3, payload=0.8), "random", 0.5),
        (Rules(chunks=None, rebuffer_weight=1.0, smoothness_weight=3.0), "fixed", 0.0),
        (Rules(chunks=8, buffer_limit_s=1e9), "fixed", 1.0),
    ],
)
def test_values_are_those_of_the_best_continuation(rules: Rules, mode: str, weight: float) -> None:
    """All are tried, in the middle of sessions and at their end, where what is left in the buffer is worth nothing."""
    simulator = Simulator(rough(3), video(9), rules, mode)  # type: ignore[arg-type]
    plain, levels = begin(simulator)
    for row in levels:
        values = hindsight_values(simulator, horizon=5, beam=300, buffer_weight=weight)
        expected = [level_values(session, 5, weight) for session in plain]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9)
        simulator.step(row)
        for session, level in zip(plain, row.tolist(), strict=True):
            session.step(level)


def test_a_horizon_of_one_chunk_is_its_reward_and_buffer() -> None:
    simulator = Simulator(rough(2), video(6), Rules(chunks=6))
    _, levels = begin(simulator)
    for number, row in enumerate(levels):
        values = hindsight_values(simulator, horizon=1, buffer_weight=0.3)[np.arange(SESSIONS), row]
        observations, rewards, over, _ = simulator.step(row)
        assert over.all() == (number == len(levels) - 1)
        np.testing.assert_allclose(values, rewards + 0.3 * observations["buffer_s"] * ~over, atol=1e-9)


def test_a_beam_finds_no_more_than_there_is() -> None:
    simulator = Simulator(rough(3), video(9), Rules(chunks=9))
    begin(simulator)
    exact = hindsight_values(simulator, horizon=5, beam=300)
    few = [hindsight_values(simulator, horizon=5, beam=beam) for beam in (1, 3)]
    assert all((exact >= values - 1e-9).all() for values in few)
    assert (exact > few[0] + 1e-3).any()


@pytest.mark.parametrize("cores", [1, 3, 100])
def test_values_of_sessions_do_not_depend_on_cores_or_company(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = Simulator(rough(4), video(9), Rules(chunks=9))
    begin(simulator)
    values, threads = hindsight_values(simulator), torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert np.array_equal(values, hindsight_values(simulator))
    assert torch.get_num_threads() == threads  # a run that records experience trains like one that finds it
    for session in range(SESSIONS):
        simulator.reset([session])
        assert np.array_equal(hindsight_values(simulator), values[session : session + 1])


def test_valuing_leaves_the_sessions_as_they_are() -> None:
    simulator, untouched = (Simulator(rough(5), video(7), Rules(chunks=7)) for _ in range(2))
    _, levels = begin(simulator)
    untouched.reset(range(SESSIONS))
    for row in levels:
        hindsight_values(simulator)
        (seen, reward, *_), (others, other, *_) = simulator.step(row), untouched.step(row)
        assert np.array_equal(reward, other)
        assert all(np.array_equal(seen[name], others[name]) for name in seen)
    with pytest.raises(ValueError, match="a session is over"):
        hindsight_values(simulator)


def test_labelled_sessions_are_sessions_with_values_of_before_each_step() -> None:
    simulator = Simulator(rough(6), video(7), Rules(chunks=7))
    _, levels = begin(simulator)
    labelled = Hindsight(Simulator(rough(6), video(7), Rules(chunks=7)))
    labelled.reset(range(SESSIONS))
    assert all(np.array_equal(labelled.first[name], simulator.first[name]) for name in simulator.first)
    for row in levels:
        values = hindsight_values(simulator)
        (_, reward, over, info), (_, others, ended, happened) = simulator.step(row), labelled.step(row)
        assert np.array_equal(reward, others) and np.array_equal(over, ended)
        assert np.array_equal(happened.pop("values"), values)
        assert all(np.array_equal(info[name], happened[name]) for name in info) and info.keys() == happened.keys()
    check_environment(Hindsight(Simulator(rough(6), video(7), Rules(chunks=7), "random")), range(3))


# The optimum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "mode", "ladder"),
    [
        (Rules(chunks=6), "fixed", LADDER),
        (Rules(chunks=6, first_level=1, rtt_s=0.5), "fixed", LADDER),
        (Rules(chunks=6, noise=(1.0, 1.0), scale=0.7), "random", LADDER),
        (Rules(chunks=None, buffer_limit_s=5.0, drain_s=0.01, rebuffer_weight=0.5), "fixed", CLOSE),
    ],
)
def test_the_plan_is_the_best_of_all_plans(rules: Rules, mode: str, ladder: list[int]) -> None:
    for seed in range(4):
        simulator = Simulator(rough(seed), video(7, ladder), rules, mode)  # type: ignore[arg-type]
        best = [best_value(session, simulator.chunks, 0.0) for session in begin(simulator)[0]]
        played = rollout(simulator, OfflineOptimal(simulator), range(SESSIONS))
        np.testing.assert_allclose(played.returns, best, rtol=0, atol=1e-9)


def test_quality_may_be_worth_more_than_buffer() -> None:
    """A plan that stalled for quality wins if an outage makes the others stall as long."""
    for before in (10.0, 12.0, 16.0, 18.0, 20.0):
        traces = link((before, 0.95), (20.0, 0.0), (200.0, 50.0))
        simulator = Simulator(traces, video(6, CLOSE, spread=0.0), Rules(chunks=6, first_level=1))
        best = best_value(plain_session(simulator, 0), 6, 0.0)
        assert rollout(simulator, OfflineOptimal(simulator), [0]).returns[0] == pytest.approx(best, abs=1e-9)


def test_no_other_plan_is_better_over_a_whole_video() -> None:
    """At the limit of the buffer too."""
    traces = generate(SyntheticTraces(traces=2), "test")
    for limit in (60.0, 12.0):
        simulator = Simulator(traces, generated_video(), Rules(buffer_limit_s=limit))
        best = rollout(simulator, OfflineOptimal(simulator), range(2))
        rng = np.random.default_rng(0)
        for _ in range(30):
            simulator.reset(range(2))
            total, random = np.zeros(2), rng.random(best.actions.shape) < rng.choice([0.02, 0.1, 1.0])
            for chosen, other in zip(best.actions, random, strict=True):
                total += simulator.step(np.where(other, rng.integers(0, 6, 2), chosen))[1]
            assert (total <= best.returns + 1e-9).all()


def test_the_published_optimum_is_found(data_dir: Path) -> None:
    if not GOLDEN.is_file():
        pytest.skip(f"no log {GOLDEN}")
    log = pd.read_parquet(GOLDEN)
    golden = log[log["chunk"] > 0].groupby("trace")["reward"].mean()
    assert golden.mean() == pytest.approx(1.2229, abs=5e-5)
    chosen = np.arange(0, 100, 20)
    simulator = Simulator(select(published_split(data_dir, "test"), chosen), named_video("video1", data_dir))
    played = rollout(simulator, OfflineOptimal(simulator), range(len(chosen)))
    np.testing.assert_allclose(played.rewards.mean(0), golden.loc[chosen], rtol=0, atol=1e-6)


def test_the_planner_acts_in_what_is_played() -> None:
    """It is told the environment, labelled or not, and plans anew for it."""
    one, other = (Simulator(rough(seed), video(6), Rules(chunks=6)) for seed in (1, 2))
    expected = rollout(other, OfflineOptimal(other), range(SESSIONS))
    for env in (other, Hindsight(other)):
        assert np.array_equal(rollout(env, OfflineOptimal(one), range(SESSIONS)).actions, expected.actions)
    data = AdaptiveBitrateData(synthetic=SyntheticTraces(traces=3, duration_s=60), rules=Rules(chunks=6))
    valid = data.episodes(data.policy("offline_optimal"), split="valid")
    bba = data.episodes(data.policy("bba"), split="valid")
    assert len(valid) == 3 * data.valid_starts
    assert (valid["qoe"] >= bba["qoe"]).all() and valid["qoe"].mean() > bba["qoe"].mean()


# Starts ---------------------------------------------------------------------------------------------------------------


def test_starts_are_spread_over_the_traces() -> None:
    traces = rough(7)
    repeated = with_starts(traces, 3)
    lengths = np.diff(traces.starts) - 1
    pointers = repeated.pointers.reshape(3, SESSIONS)
    assert repeated.names.tolist() == 3 * traces.names.tolist()
    assert repeated.sources.tolist() == 3 * traces.sources.tolist()
    assert np.array_equal(repeated.time_s, np.tile(traces.time_s, 3))
    assert np.array_equal(repeated.bandwidth_mbps, np.tile(traces.bandwidth_mbps, 3))
    assert np.array_equal(pointers[0], traces.pointers), "the traces as they are come first"
    assert (pointers >= 1).all() and (pointers <= lengths).all()
    assert all(np.array_equal((row - pointers[0]) % lengths, k * lengths // 3) for k, row in enumerate(pointers))
    once = with_starts(traces, 1)
    assert np.array_equal(once.pointers, traces.pointers) and np.array_equal(once.starts, traces.starts)
    simulator = Simulator(repeated, video(6), Rules(chunks=6))
    simulator.reset(range(3 * SESSIONS))
    assert (simulator.pointer < repeated.starts[1:]).all()
