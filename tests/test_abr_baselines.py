"""Bitrate policies: the published program's levels and numbers, and what must hold for any video."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from netllm_pl.errors import UserError
from netllm_pl.rollout import Policy, Rollout, rollout
from tasks.adaptive_bitrate.baselines import BBA, NAMES, Bola, Constant, Rate, build
from tasks.adaptive_bitrate.mpc import RobustMPC, best_first_level, harmonic_means, near_first
from tasks.adaptive_bitrate.pensieve import PUBLISHED, Pensieve, PensieveActor, load_pensieve, pensieve_state
from tasks.adaptive_bitrate.simulator import Rules, Simulator, Traces, Video
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.traces import published_split, read_traces
from tasks.adaptive_bitrate.videos import generated_video, read_video

CARRIED = "mended, errors carried"
# mean reward of a chunk: fcc test traces on video1 and video2, synthetic traces on both (fixed mode, 100 traces each)
KNOWN = {
    "bba": (0.76415, 0.58674, 1.486, 1.212),
    "robust_mpc_published": (0.84845, 0.63094, 1.893, 1.574),
    "robust_mpc": (1.0002, 0.8187, None, None),
    CARRIED: (1.0194, 0.8197, 1.883, None),
    "rate": (0.8641, 0.5556, None, None),
    "bola": (0.8419, 0.7312, None, None),
    "genet_argmax": (0.8275, 0.6511, 1.919, 1.677),
    "udr_1_argmax": (0.9332, 0.8235, 2.172, 1.730),
    "udr_real_argmax": (0.9380, 0.7993, 2.101, 1.726),
}
GOLDEN = {
    "bba": "bba",
    "robust_mpc_published": "mpc",
    CARRIED: "mpc_robust_all_index_fixed",
    "genet_argmax": "genet_argmax",
}


@cache
def published(folder: Path, kind: str) -> Traces:
    return (
        published_split(folder, "test") if kind == "fcc" else read_traces(folder / "abr" / "traces_synthetic.parquet")
    )


@cache
def played(folder: Path, policy: str, kind: str, name: str) -> Rollout:
    video, rules = read_video(folder / "abr" / "videos.json", name), Rules()
    chosen = RobustMPC(video, rules, carry=True) if policy == CARRIED else None
    chosen = chosen or build(policy, video, rules, folder.parent / "weights")
    return rollout(Simulator(published(folder, kind), video), chosen, range(100))


@pytest.fixture
def weights_dir(data_dir: Path) -> Path:
    folder = data_dir.parent / "weights"
    if not folder.is_dir():
        pytest.skip(f"no published weights in {folder}")
    return folder


@pytest.mark.parametrize("policy", GOLDEN)
def test_levels_of_the_published_program(weights_dir: Path, data_dir: Path, policy: str) -> None:
    golden = data_dir.parent / "golden" / "abr" / f"{GOLDEN[policy]}_video1.parquet"
    if not golden.is_file():
        pytest.skip(f"no {golden}")
    table = pq.read_table(golden).to_pandas()
    ours = played(data_dir, policy, "fcc", "video1")
    names = published(data_dir, "fcc").names
    assert [name.removeprefix("fcc-test_") for name in table.trace_name[::48]] == list(names)
    assert np.array_equal(ours.actions.T, table.bitrate.to_numpy().reshape(100, 48)[:, 1:])
    assert np.allclose(ours.rewards.T, table.reward.to_numpy().reshape(100, 48)[:, 1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy", KNOWN)
def test_published_numbers(weights_dir: Path, data_dir: Path, policy: str) -> None:
    settings = [(kind, video) for kind in ("fcc", "synthetic") for video in ("video1", "video2")]
    for (kind, video), known in zip(settings, KNOWN[policy], strict=True):
        if known is not None:
            within = 1e-4 if kind == "fcc" else 1e-3  # the latter were noted with three digits
            assert played(data_dir, policy, kind, video).rewards.mean() == pytest.approx(known, abs=within)


@pytest.mark.parametrize(("name", "known", "within"), [("video1", 0.861, 0.03), ("video2", 0.6347, 0.06)])
def test_drawn_actions_of_genet(weights_dir: Path, data_dir: Path, name: str, known: float, within: float) -> None:
    video = read_video(data_dir / "abr" / "videos.json", name)
    env = Simulator(published(data_dir, "fcc"), video)
    scores = [
        rollout(env, build("genet", video, Rules(), weights_dir, seed), range(100)).rewards.mean() for seed in range(10)
    ]
    assert np.mean(scores) == pytest.approx(known, abs=within) and np.std(scores) > 0


# --- the search of RobustMPC


def brute_force(
    seconds: np.ndarray, ladder: np.ndarray, buffer_s: float, level: int, chunk_s: float, weights: tuple, jump: int
) -> int:
    """Try all plans in turn, last of equals wins."""
    best, answer = -np.inf, -1
    for plan in itertools.product(range(len(ladder)), repeat=len(seconds)):
        if max(abs(np.diff([level, *plan]))) > jump:
            continue
        buffer, late, quality, change, last = buffer_s, 0.0, 0.0, 0.0, level
        for row, now in zip(seconds, plan, strict=True):
            late += max(row[now] - buffer, 0.0)
            buffer = max(buffer - row[now], 0.0) + chunk_s
            quality += ladder[now]
            change += abs(ladder[now] - ladder[last])
            last = now
        value = quality / 1000.0 - weights[0] * late - weights[1] * (change / 1000.0)
        if value >= best:
            best, answer = value, plan[0]
    return answer


@pytest.mark.parametrize("levels", [1, 2, 4, 6])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_search_equals_brute_force(levels: int, length: int) -> None:
    rng = np.random.default_rng(10 * levels + length)
    for trial in range(4 if levels**length > 500 else 60):
        ladder = np.sort(rng.integers(100, 9000, levels)).astype(float)
        seconds = ladder / 1000.0 * rng.uniform(0.5, 1.5, (length, 1)) * rng.choice([0.2, 1, 5, 1e6])
        seconds = seconds * rng.uniform(0.6, 1.6, (length, levels))  # also larger chunks at lower levels
        weights = [(4.3, 1.0), (0.0, 1.0), (4.3, 0.0), (0.5, 7.0)][trial % 4]
        buffer_s, level = float(rng.choice([0.0, 2.0, 8.0, 30.0])), int(rng.integers(levels))
        jump = int(rng.choice([1, levels]))
        ours = best_first_level(seconds, ladder, near_first(levels), buffer_s, level, length, 4.0, *weights, jump)
        assert ours == brute_force(seconds, ladder, buffer_s, level, 4.0, weights, jump)


def test_search_equals_brute_force_at_the_published_size() -> None:
    rng = np.random.default_rng(0)
    ladder = np.array([300.0, 750, 1200, 1850, 2850, 4300])
    for mbps in (0.4, 1.5, 4.0):
        seconds = 4 * ladder / (1000 * mbps) * rng.uniform(0.7, 1.3, (5, 6))
        buffer_s, level = rng.uniform(0, 15), int(rng.integers(6))
        ours = best_first_level(seconds, ladder, near_first(6), buffer_s, level, 5, 4.0, 4.3, 1.0, 6)
        assert ours == brute_force(seconds, ladder, buffer_s, level, 4.0, (4.3, 1.0), 6)


def test_of_equal_plans_the_last_wins() -> None:
    ladder, seconds = np.array([1000.0, 2000.0, 3000.0]), np.zeros((3, 3))
    # A change costs what the last chunk gains, so rising at once or a chunk later differs; without quality all tie.
    assert best_first_level(seconds, ladder * 0, near_first(3), 5.0, 0, 3, 4.0, 4.3, 1.0, 3) == 2
    assert best_first_level(seconds[:1], ladder, near_first(3), 5.0, 0, 1, 4.0, 4.3, 1.0, 3) == 2
    assert best_first_level(seconds[:1], ladder, near_first(3), 5.0, 0, 1, 4.0, 4.3, 1.0, 1) == 1


def test_harmonic_mean_skips_what_was_not_measured() -> None:
    throughput = np.array([[9.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 2.0], [0.0] * 4])
    assert harmonic_means(throughput, 3) == pytest.approx([1.5, 2.0, 0.0])
    assert harmonic_means(throughput, 9) == pytest.approx([3 / (1 / 9 + 1 + 1 / 3), 2.0, 0.0])


# --- any ladder, horizon, number of sessions


def other_video(levels: int) -> Video:
    ladder = np.linspace(300, 6000, levels).astype(np.int64)
    rng = np.random.default_rng(levels)
    sizes = ladder * 1000 // 8 * 2 * rng.uniform(0.8, 1.2, (30, 1))
    return Video(f"ladder of {levels}", ladder, sizes.astype(np.int64), 2.0)


def policies(video: Video, rules: Rules) -> list[Policy]:
    actor = PensieveActor(levels=len(video.ladder_kbps), relative=False)
    return [
        *(build(name, video, rules) for name in ("bba", "robust_mpc", "rate", "bola", "constant")),
        RobustMPC(video, rules, horizon=2, samples=20),
        RobustMPC(video, rules, any_jump=False, right_index=False),
        Pensieve(actor, video),
        Pensieve(PensieveActor(levels=len(video.ladder_kbps)), video, sample=True),
    ]


@pytest.mark.parametrize("levels", [1, 3, 9])
def test_any_ladder(levels: int) -> None:
    video, rules = other_video(levels), Rules(chunks=None, buffer_limit_s=20.0)
    traces = generate(SyntheticTraces(traces=4), "test")
    for policy in policies(video, rules):
        played = rollout(Simulator(traces, video, rules), policy, range(4))
        assert played.actions.shape == (29, 4)
        assert played.actions.min() >= 0 and played.actions.max() < levels


def test_answers_do_not_depend_on_the_batch() -> None:
    video, rules, traces = other_video(5), Rules(), generate(SyntheticTraces(traces=6), "test")
    torch.manual_seed(0)
    for policy in policies(video, rules)[:-1]:  # the last draws
        env = Simulator(traces, video, rules, mode="random", history=7)
        together = rollout(env, policy, range(6)).actions
        alone = [rollout(env, policy, [seed]).actions for seed in range(6)]
        assert np.array_equal(together, np.concatenate(alone, axis=1)), policy


def test_errors_carried_over_need_one_session_after_another() -> None:
    policy = RobustMPC(other_video(3), Rules(), carry=True)
    with pytest.raises(ValueError, match="one episode at a time"):
        policy.reset(2)


def test_hand_written_rules() -> None:
    video = Video("toy", np.array([1000, 2000, 4000]), np.ones((5, 3), dtype=np.int64))
    seen = {
        "buffer_s": np.array([4.99, 10.0, 14.9, 15.0, 40.0]),
        "throughput": np.array([[0.0], [0.1249], [0.25], [0.4], [9.0]]),
        "level": np.zeros(5, dtype=np.int64),
    }
    assert list(BBA(video).act(seen)) == [0, 1, 1, 2, 2]
    assert list(Rate(video).act(seen)) == [0, 0, 1, 1, 2]
    assert list(Constant(video, 1).act(seen)) == [1] * 5


def test_bola_switches_where_the_formula_says() -> None:
    video = Video("toy", np.array([1000, 2000, 4000]), np.ones((5, 3), dtype=np.int64))
    # V = (40 - 4) / (ln 4 + 2); scores (V 2 - q) / 1, (V (ln 2 + 2) - q) / 2, (36 - q) / 4 meet at q = 13.89 and 21.26.
    seen = {"buffer_s": np.array([0.0, 13.8, 14.0, 21.2, 21.4, 60.0])}
    assert list(Bola(video).act(seen)) == [0, 0, 1, 1, 2, 2]


# --- Pensieve


def by_convolution(path: Path, part: str, state: np.ndarray) -> np.ndarray:
    """The published graph, written with the convolutions it has, on the arrays as they are stored."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: torch.from_numpy(archive[name]).double() for name in archive.files}
    x = torch.from_numpy(state).double()

    def dense(value: torch.Tensor, name: str) -> torch.Tensor:
        return value @ arrays[f"{part}.{name}.W"] + arrays[f"{part}.{name}.b"]

    def convolve(row: torch.Tensor, name: str) -> torch.Tensor:
        kernel = arrays[f"{part}.{name}.W"].permute(3, 2, 0, 1)  # taps, 1, in, out -> out, in, taps, 1
        image = torch.nn.functional.pad(row[:, :, None, None], (0, 0, 1, 2))  # "same", the odd zero behind
        return torch.nn.functional.conv2d(image, kernel, arrays[f"{part}.{name}.b"])[:, :, 0, 0]

    parts = [dense(x[:, 0, -1:], "FullyConnected"), dense(x[:, 1, -1:], "FullyConnected_1")]
    parts += [convolve(x[:, 2 + i], "Conv1D" + ("", "_1", "_2")[i]) for i in range(3)]
    joined = torch.cat([*parts, dense(x[:, 5, -1:], "FullyConnected_2")], dim=1).relu()
    return dense(dense(joined, "FullyConnected_3").relu(), "FullyConnected_4").numpy()


@pytest.mark.parametrize("name", ["genet", "udr_1", "udr_real"])
def test_actor_computes_what_the_published_graph_does(weights_dir: Path, data_dir: Path, name: str) -> None:
    video = read_video(data_dir / "abr" / "videos.json", "video1")
    actor = load_pensieve(weights_dir / f"{name}.npz")
    env = Simulator(published(data_dir, "fcc"), video)
    seen = rollout(env, Pensieve(actor, video), range(100), record=True).observations
    state = np.concatenate([pensieve_state({k: v[t] for k, v in seen.items()}, video) for t in range(0, 47, 5)])
    with torch.no_grad():
        chances, value = actor(torch.from_numpy(state)).softmax(1).numpy(), actor.value(torch.from_numpy(state)).numpy()
    logits = torch.from_numpy(by_convolution(weights_dir / f"{name}.npz", "actor", state))
    assert np.abs(chances - logits.softmax(1).numpy()).max() < 1e-5
    assert np.allclose(value, by_convolution(weights_dir / f"{name}.npz", "critic", state)[:, 0], rtol=1e-4, atol=1e-4)


def test_state_layout() -> None:
    video = other_video(3)
    env = Simulator(generate(SyntheticTraces(traces=1), "test"), video, Rules(chunks=10), history=4)
    env.reset([0])
    seen, *_, info = env.step(np.array([2]))
    state = pensieve_state(seen, video)
    assert state.shape == (1, 6, 6) and state.dtype == np.float32
    assert state[0, 0, -1] == 1.0 and state[0, 5, -1] == pytest.approx(0.8)
    assert state[0, 1, -1] == pytest.approx(info["buffer_s"][0] / 10)
    assert state[0, 3, -1] == pytest.approx(info["delay_ms"][0] / 1e4)
    assert state[0, 2, -1] == pytest.approx(info["chunk_bytes"][0] / info["delay_ms"][0] / 1000)
    assert state[0, 4, :3] == pytest.approx(video.chunk_bytes[2] / 1e6)
    assert not state[0, 2:4, :4].any() and not state[0, 4, 3:].any()
    assert pensieve_state(seen, other_video(3), length=8).shape == (1, 6, 8)


def test_actor_learns_and_answers_for_its_levels() -> None:
    actor = PensieveActor(levels=9, length=4, hidden=16, relative=False, critic=True)
    state = torch.rand(5, 6, 9)
    assert actor(state).shape == (5, 9) and actor.value(state).shape == (5,)
    (actor(state).square().sum() + actor.value(state).sum()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in actor.parameters())
    with pytest.raises(ValueError, match="critic"):
        PensieveActor().value(torch.rand(5, 6, 6))


def test_relative_moves_stay_on_the_ladder() -> None:
    actor = PensieveActor(levels=3)
    assert list(actor.level_of(np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, 1, 2]))) == [0, 1, 1, 2, 2]


def test_drawn_actions_follow_the_seed() -> None:
    video = other_video(4)
    env = Simulator(generate(SyntheticTraces(traces=3), "test"), video, Rules(chunks=None))
    actor = PensieveActor(levels=4)
    first, again, other = (rollout(env, Pensieve(actor, video, True, seed), range(3)).actions for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# --- mistakes


def test_unknown_policy_names_the_known() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'robust_mpc'\?"):
        build("robust_mcp", generated_video(0), Rules())
    assert set(PUBLISHED) == set(PensieveActor().actor._modules) and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: RobustMPC(v, Rules(), horizon=0), "horizon 0"),
        (lambda v: RobustMPC(v, Rules(rebuffer_weight=-1.0)), "negative"),
        (lambda v: BBA(v, cushion_s=0.0), "cushion_s"),
        (lambda v: Bola(v, buffer_s=4.0), "buffer_s"),
        (lambda v: Constant(v, 6), "level 6 is not one of 0 to 5"),
        (lambda v: build("genet", v, Rules()), "weights_dir"),
        (lambda v: build("genet", v, Rules(), Path("nowhere")), r"nowhere/genet.npz: no such file"),
        (lambda v: Pensieve(PensieveActor(levels=5), v), "5 levels"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(generated_video(0))


def stored(path: Path, actor: PensieveActor | None = None, **changed: np.ndarray | None) -> Path:
    """Save a network in the published layout, apart from what is changed; None drops an array."""
    arrays = {}
    for parameter, weight in (actor or PensieveActor(critic=True)).state_dict().items():
        part, layer, kind = parameter.split(".")
        array = weight.numpy().T
        if kind == "weight" and PUBLISHED[layer].startswith("Conv1D"):
            array = np.stack([array + 1, array, array - 1, array * 2])[:, None]  # only the second tap is live
        arrays[f"{part}.{PUBLISHED[layer]}.{'W' if kind == 'weight' else 'b'}"] = array
    np.savez(path, **{name: array for name, array in {**arrays, **changed}.items() if array is not None})
    return path


def test_weights_load_back_equal(tmp_path: Path) -> None:
    actor = PensieveActor(critic=True)
    loaded = load_pensieve(stored(tmp_path / "weights.npz", actor)).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in actor.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"actor.Conv1D.W": None}, "no array 'actor.Conv1D.W'"),
        ({"actor.FullyConnected_4.W": np.zeros((128, 6), np.float32)}, r"actor.out.weight is \(6, 128\)"),
        ({"critic.Conv1D.b": np.full(128, np.nan, np.float32)}, "critic.throughput.bias"),
        ({"actor.Conv1D.b": np.array(["a"] * 128)}, "not of numbers"),
        ({"actor.Conv1D.b": np.array([object()] * 128)}, "not an archive of plain NumPy arrays"),
    ],
)
def test_broken_weights(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pensieve(stored(tmp_path / "broken.npz", **changed))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"half"])
def test_files_that_are_no_archives(tmp_path: Path, content: bytes) -> None:
    path = stored(tmp_path / "weights.npz")
    path.write_bytes(path.read_bytes()[:5000] if content == b"half" else content)
    with pytest.raises(UserError, match=r"weights.npz: not an archive"):
        load_pensieve(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match=r"weights.npz: not an archive"):
        load_pensieve(path)
