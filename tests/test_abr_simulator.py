"""The streaming simulator: equal to the published program's logs, to plain Python, and to what must be conserved."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gymnasium.utils.env_checker import check_env

from netllm_pl.errors import UserError
from tasks.adaptive_bitrate.environment import AdaptiveBitrateEnv
from tasks.adaptive_bitrate.plain import PlainSession, plain_session
from tasks.adaptive_bitrate.simulator import Rules, Simulator, Traces
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.traces import published_split, select
from tasks.adaptive_bitrate.videos import generated_video, make_video, read_video

LOGS = ("bba", "mpc", "genet_argmax", "mpc_robust_all_index_fixed", "offline_opt")
LOGGED = ("delay_ms", "sleep_ms", "buffer_s", "rebuffer_s", "chunk_bytes", "reward")
RULES = {
    "published": Rules(),
    "all chunks": Rules(chunks=None),
    "few chunks, first level": Rules(chunks=7, first_level=1),
    "small buffer": Rules(buffer_limit_s=9.0, drain_s=0.3),
    "buffer below a chunk": Rules(buffer_limit_s=1.0, drain_s=1.0),
    "large buffer": Rules(buffer_limit_s=1000.0),
    "network": Rules(rtt_s=0.4, payload=0.5),
    "weights": Rules(rebuffer_weight=1.0, smoothness_weight=2.5),
    "noise and scale": Rules(noise=(0.5, 2.0), scale=0.5),
    "one factor": Rules(noise=(1.25, 1.25)),
}
VIDEOS = {
    "six levels": generated_video(3),
    "three levels of 2 s": make_video("three", [200, 900, 3000], np.arange(1, 91).reshape(3, 30) * 9000, 2.0),
    "one level of 10 s": make_video("one", [1000], [[1_250_000] * 12], 10.0),
}


@pytest.fixture(scope="session")
def traces() -> Traces:
    """Fast, changing links and slow ones, of different lengths."""
    walk, markov = generate(SyntheticTraces(traces=9), "test"), generate(SyntheticTraces("markov", 8, 120.0), "test")
    return Traces(
        np.concatenate([walk.names, markov.names]), np.concatenate([walk.sources, markov.sources]),
        np.concatenate([walk.starts, walk.starts[-1] + markov.starts[1:]]),
        np.concatenate([walk.time_s, markov.time_s]), np.concatenate([walk.bandwidth_mbps, markov.bandwidth_mbps]),
        np.concatenate([walk.pointers, markov.pointers]),
    )  # fmt: skip


def levels_for(simulator: Simulator, sessions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, simulator.levels, (simulator.chunks - 1, sessions))


def join(steps: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Stack what was seen and what happened; of the two meanings of ``chunk``, the played one is kept."""
    return {name: np.stack([{**seen, **info}[name] for seen, info in steps]) for name in steps[-1][0] | steps[-1][1]}


def play(simulator: Simulator, seeds: Any, levels: np.ndarray) -> dict[str, np.ndarray]:
    """Play all chunks, the first one included (its reward is 0); arrays (chunks, sessions, ...) by name."""
    observations = simulator.reset(seeds)
    steps = [(observations, simulator.first | {"reward": observations["reward"]})]
    for row in levels:
        observations, rewards, over, info = simulator.step(row)
        assert np.array_equal(rewards, observations["reward"])
        assert np.array_equal(over, observations["chunks_left"] == 0)
        steps.append((observations, info))
    assert over.all()
    return join(steps)


def play_alone(session: PlainSession, levels: list[int]) -> dict[str, np.ndarray]:
    steps = [(session.observation, session.info)]
    for level in levels:
        observation, _, over, info = session.step(level)
        steps.append((observation, info))
    assert over
    return join(steps)


@pytest.fixture(scope="session")
def golden(data_dir: Path) -> Path:
    folder = data_dir.parent / "golden" / "abr"
    if not folder.is_dir():
        pytest.skip(f"no logs of the published program in {folder}")
    return folder


def logged(golden: Path, log: str) -> pd.DataFrame:
    return pd.read_parquet(golden / f"{log}_video1.parquet").sort_values(["chunk", "trace"])


@pytest.mark.parametrize("log", LOGS)
def test_levels_of_a_log_give_its_numbers(data_dir: Path, golden: Path, log: str) -> None:
    traces = published_split(data_dir, "test")
    simulator = Simulator(traces, read_video(data_dir / "abr" / "videos.json", "video1"))
    table = logged(golden, log)
    levels = table["bitrate"].to_numpy().reshape(48, 100)
    assert all(name.endswith(trace) for name, trace in zip(table["trace_name"][:100], traces.names, strict=True))
    ours = play(simulator, range(100), levels[1:])
    assert np.array_equal(ours["bitrate"], levels)
    for name in LOGGED:
        expected = table[name].to_numpy().reshape(48, 100)
        if name == "reward":  # the log gives the first chunk one, which counts nowhere
            ours[name][0] = simulator.first[name]
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-9, err_msg=name)


def test_plain_python_gives_the_numbers_of_a_log(data_dir: Path, golden: Path) -> None:
    traces, video = published_split(data_dir, "test"), read_video(data_dir / "abr" / "videos.json", "video1")
    for trace, table in logged(golden, "mpc").groupby("trace"):
        if trace % 10 == 0:
            ours = play_alone(PlainSession(traces, trace, video), table["bitrate"].tolist()[1:])
            for name in LOGGED:
                np.testing.assert_allclose(ours[name][1:], table[name][1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["fixed", "random"])
@pytest.mark.parametrize("video", VIDEOS)
@pytest.mark.parametrize("rules", RULES)
def test_batch_equals_plain_python(traces: Traces, rules: str, video: str, mode: Any) -> None:
    if RULES[rules].first_level >= len(VIDEOS[video].ladder_kbps):
        return
    simulator = Simulator(traces, VIDEOS[video], RULES[rules], mode, history=3)
    seeds = np.arange(40, 60)
    levels = levels_for(simulator, len(seeds))
    ours = play(simulator, seeds, levels)
    for place, seed in enumerate(seeds.tolist()):
        alone = play_alone(plain_session(simulator, seed), levels[:, place].tolist())
        for name, expected in alone.items():
            np.testing.assert_allclose(
                ours[name][:, place], expected, rtol=1e-9, atol=1e-9, err_msg=f"{name}, session {seed}"
            )


@pytest.mark.parametrize("mode", ["fixed", "random"])
def test_a_session_does_not_depend_on_its_batch(traces: Traces, mode: Any) -> None:
    simulator = Simulator(traces, generated_video(), Rules(scale=0.3), mode)
    seeds = np.array([5, 0, 11, 5, 123456789012])
    levels = levels_for(simulator, len(seeds))
    levels[:, 3] = levels[:, 0]
    together = play(simulator, seeds, levels)
    for place, seed in enumerate(seeds):
        alone = play(simulator, [seed], levels[:, place : place + 1])
        assert all(np.array_equal(alone[name][:, 0], together[name][:, place]) for name in together)


def test_observations_belong_to_the_caller(traces: Traces) -> None:
    simulator = Simulator(traces, generated_video())
    first = simulator.reset([0, 1])
    kept = {name: values.copy() for name, values in first.items()}
    second, _, _, _ = simulator.step(np.array([1, 5]))
    assert all(np.array_equal(first[name], kept[name]) for name in first)
    for values in first.values():
        values[:] = 0
    again, _, _, _ = simulator.step(np.array([1, 5]))
    assert np.array_equal(again["throughput"][:, -2], second["throughput"][:, -1])
    assert np.array_equal(simulator.reset([0, 1])["next_bytes"], kept["next_bytes"])


# What must be conserved -----------------------------------------------------------------------------------------------


def capacity(traces: Traces, trace: int, payload: float, moments: np.ndarray) -> np.ndarray:
    """Bytes that a trace, repeated for ever, carries from its beginning until moments (seconds)."""
    rows = slice(traces.starts[trace], traces.starts[trace + 1])
    knots = np.concatenate([[0.0], traces.time_s[rows][1:]])
    carried = np.concatenate([[0.0], np.cumsum(np.diff(knots) * traces.bandwidth_mbps[rows][1:])]) * 1e6 / 8 * payload
    rounds, rest = np.divmod(moments, knots[-1])
    return rounds * carried[-1] + np.interp(rest, knots, carried)


@pytest.mark.parametrize("rules", [Rules(), Rules(buffer_limit_s=12.0, drain_s=0.7, rtt_s=0.2, payload=0.8)])
def test_bytes_and_time_are_conserved(traces: Traces, rules: Rules) -> None:
    video = generated_video(1)
    simulator = Simulator(traces, video, rules)
    n = len(traces)
    levels = np.minimum(levels_for(simulator, n), np.arange(n) % 6)  # some sessions stay low and fill their buffer
    ours = play(simulator, range(n), levels)
    before = np.concatenate([np.zeros((1, n)), ours["buffer_s"][:-1]])
    delay = ours["delay_ms"] / 1000
    # The buffer gains a chunk and loses what was played, so what is missing was waited for.
    slept = np.maximum(before - delay, 0) + video.chunk_s - ours["buffer_s"]
    assert (slept > 1).any() and slept.min() > -1e-9 and ours["buffer_s"].max() <= rules.buffer_limit_s + 1e-9
    np.testing.assert_allclose(slept / rules.drain_s, np.rint(slept / rules.drain_s), atol=1e-6)
    played = delay.sum(0) + slept.sum(0) - ours["rebuffer_s"].sum(0)
    np.testing.assert_allclose(played + ours["buffer_s"][-1], 48 * video.chunk_s, atol=1e-7)
    for trace in range(n):
        start = traces.time_s[traces.starts[trace] + traces.pointers[trace] - 1]
        network = delay[:, trace] - rules.rtt_s
        ends = start + np.cumsum(network + slept[:, trace]) - slept[:, trace]
        carried = capacity(traces, trace, rules.payload, ends)
        carried -= capacity(traces, trace, rules.payload, ends - network)
        np.testing.assert_allclose(carried, ours["chunk_bytes"][:, trace], rtol=1e-6)
        period = traces.time_s[traces.starts[trace + 1] - 1]
        off = (ends[-1] + slept[-1, trace] - simulator.clock[trace] + period / 2) % period - period / 2
        assert abs(off) < 1e-6


# Settings -------------------------------------------------------------------------------------------------------------


def test_reward_weights(traces: Traces) -> None:
    video = VIDEOS["three levels of 2 s"]
    simulator = Simulator(traces, video, Rules(rebuffer_weight=2.0, smoothness_weight=0.25))
    levels = levels_for(simulator, 10)
    ours = play(simulator, range(10), levels)
    mbps = video.ladder_kbps[ours["bitrate"]] / 1000
    expected = mbps[1:] - 2.0 * ours["rebuffer_s"][1:] - 0.25 * np.abs(np.diff(mbps, axis=0))
    np.testing.assert_allclose(ours["reward"][1:], expected, atol=1e-12)
    assert (ours["reward"][0] == 0).all() and (ours["rebuffer_s"][1:] > 0).any()
    np.testing.assert_allclose(ours["change_mbps"][1:], np.abs(np.diff(mbps, axis=0)), atol=1e-12)


def test_round_trip_time_adds_to_delays_and_moves_nothing(traces: Traces) -> None:
    short, long = (Simulator(traces, generated_video(), Rules(rtt_s=rtt, buffer_limit_s=1e6)) for rtt in (0.0, 1.5))
    levels = levels_for(short, 12)
    first, second = (play(simulator, range(12), levels) for simulator in (short, long))
    np.testing.assert_allclose(second["delay_ms"], first["delay_ms"] + 1500)
    assert np.array_equal(short.clock, long.clock)


def test_video_lengths() -> None:
    traces = generate(SyntheticTraces(traces=2), "test")
    for chunks, expected in ((None, 49), (48, 48), (5, 5), (100, 49)):
        simulator = Simulator(traces, generated_video(), Rules(chunks=chunks))
        ours = play(simulator, [0], levels_for(simulator, 1))
        assert len(ours["chunk"]) == expected
        assert ours["chunks_left"][:, 0].tolist() == list(range(expected - 1, -1, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": 1}, "rules.chunks is 1; expected 2 or more, or null"),
        ({"first_level": -1}, "rules.first_level is -1; expected 0 or more"),
        ({"first_level": 6}, "rules.first_level is 6; video generated has levels 0 to 5"),
        ({"buffer_limit_s": -1.0}, "rules.buffer_limit_s is -1.0"),
        ({"drain_s": 0.0}, "rules.drain_s is 0.0; expected seconds above 0"),
        ({"rtt_s": float("nan")}, "rules.rtt_s is nan"),
        ({"payload": 0.0}, "rules.payload is 0.0; expected a share above 0, up to 1"),
        ({"rebuffer_weight": float("inf")}, "rules.rebuffer_weight is inf"),
        ({"smoothness_weight": float("nan")}, "rules.smoothness_weight is nan"),
        ({"noise": (1.1, 0.9)}, "rules.noise is (1.1, 0.9); expected two ascending factors above 0"),
        ({"noise": (0.0, 1.0)}, "rules.noise is (0.0, 1.0)"),
        ({"scale": -0.1}, "rules.scale is -0.1"),
    ],
)
def test_impossible_rules(traces: Traces, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        Simulator(traces, generated_video(), Rules(**change))


def test_wrong_steps_are_refused(traces: Traces) -> None:
    simulator = Simulator(traces, generated_video(), Rules(chunks=3))
    simulator.reset([0, 1])
    for levels in ([0], [0, 6], [-1, 0], [[0], [1]]):
        with pytest.raises(ValueError, match="levels must be 2 from 0 to 5"):
            simulator.step(np.array(levels))
    simulator.step(np.array([0, 0]))
    simulator.step(np.array([0, 0]))
    with pytest.raises(ValueError, match="over"):
        simulator.step(np.array([0, 0]))


# Random mode ----------------------------------------------------------------------------------------------------------


def test_random_mode_repeats_by_seed_only(traces: Traces) -> None:
    video, seeds = generated_video(), np.arange(30)
    simulator = Simulator(traces, video, Rules(scale=0.2), "random")
    levels = levels_for(simulator, 30)
    first = play(simulator, seeds, levels)
    again = play(Simulator(traces, video, Rules(scale=0.2), "random"), seeds, levels)
    backwards = play(simulator, seeds[::-1], levels[:, ::-1])
    for name, values in first.items():
        assert np.array_equal(values, again[name]) and np.array_equal(values, backwards[name][:, ::-1])
    other = play(simulator, seeds + 1000, levels)
    assert (other["delay_ms"] != first["delay_ms"]).all()


def test_noise_is_uniform_in_its_range(traces: Traces) -> None:
    video, n = generated_video(), 2000
    rules = Rules(noise=(0.8, 1.3), buffer_limit_s=1e6)  # without waiting noise leaves the walk as it is
    noisy = Simulator(traces, video, rules, "random")
    levels = levels_for(noisy, n)
    ratios = play(noisy, range(n), levels)["delay_ms"]
    ratios /= play(Simulator(traces, video, replace(rules, noise=(1.0, 1.0)), "random"), range(n), levels)["delay_ms"]
    assert 0.8 <= ratios.min() < 0.801 and 1.299 < ratios.max() <= 1.3
    shares = np.histogram(ratios, 10, (0.8, 1.3))[0] / ratios.size
    assert np.abs(shares - 0.1).max() < 0.005
    flat = ratios - ratios.mean()
    assert abs((flat[1:] * flat[:-1]).mean()) < 0.02 * flat.var()  # chunks of a session
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 0.02 * flat.var()  # neighbouring seeds


def test_starts_are_spread_over_traces_and_samples(traces: Traces) -> None:
    tiny = make_video("tiny", [300, 750], np.full((2, 5), 1), 4.0)  # one byte leaves a session where it started
    n = 5000
    simulator = Simulator(traces, tiny, Rules(scale=0.4), "random")
    simulator.reset(range(n))
    lengths = np.diff(traces.starts)
    counts = np.bincount(simulator.trace, minlength=len(traces))
    assert np.abs(counts * len(traces) / n - 1).max() < 0.25
    offset = simulator.pointer - traces.starts[simulator.trace]
    last = lengths[simulator.trace] - 1
    assert offset.min() == 1 and (offset <= last).all() and (offset == last).any()
    assert np.abs(np.histogram((offset - 1) / last, 10, (0, 1))[0] * 10 / n - 1).max() < 0.15
    scale = np.log(simulator.scale)
    assert abs(scale.mean()) < 0.02 and abs(scale.std() - 0.4) < 0.02
    assert abs(np.corrcoef(scale, offset / last)[0, 1]) < 0.04


def test_fixed_mode_knows_no_chance(traces: Traces) -> None:
    simulator = Simulator(traces, generated_video(), Rules(noise=(0.5, 2.0), scale=1.0))
    levels = levels_for(simulator, 3)
    n = len(traces)
    first, again = play(simulator, [0, 1, 2], levels), play(simulator, [n, n + 1, 2 * n + 2], levels)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert simulator.trace.tolist() == [0, 1, 2]


# One session with Gymnasium's interface -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fixed", "random"])
@pytest.mark.parametrize("video", VIDEOS)
def test_environment_passes_the_checker(traces: Traces, video: str, mode: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|render modes|A Box)")
        check_env(AdaptiveBitrateEnv(traces, VIDEOS[video], mode=mode, history=4))


def test_environment_equals_simulator(traces: Traces) -> None:
    arguments = (traces, VIDEOS["three levels of 2 s"], Rules(), "random")
    env, simulator = AdaptiveBitrateEnv(*arguments), Simulator(*arguments)
    levels = levels_for(simulator, 1)
    expected = play(simulator, [77], levels)
    observation, info = env.reset(seed=77)
    steps = [(observation, info | {"reward": observation["reward"]})]
    for level in levels[:, 0]:
        observation, reward, over, cut, info = env.step(level)
        assert observation in env.observation_space
        assert reward == observation["reward"] and not cut and observation["chunk"] == info["chunk"] + 1
        steps.append((observation, info))
    assert over
    ours = join(steps)
    assert all(np.array_equal(values[:, 0], ours[name]) for name, values in expected.items())


def test_environment_sessions(traces: Traces) -> None:
    env = AdaptiveBitrateEnv(traces, generated_video())
    env.reset(seed=3)
    assert env.simulator.trace[0] == 3
    env.reset(options={"session": len(traces) + 5})
    assert env.simulator.trace[0] == 5
    drawn = [env.reset() and int(env.simulator.trace[0]) for _ in range(20)]
    assert len(set(drawn)) > 5
    env.reset(seed=3)
    assert [env.reset() and int(env.simulator.trace[0]) for _ in range(20)] == drawn


def test_selected_traces_play_alike(traces: Traces) -> None:
    some = select(traces, [7, 2])
    whole, part = (Simulator(t, generated_video()) for t in (traces, some))
    levels = levels_for(whole, 2)
    first, second = play(whole, [7, 2], levels), play(part, [0, 1], levels)
    assert all(np.array_equal(first[name], second[name]) for name in first)
