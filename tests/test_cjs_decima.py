"""Decima's network against the published program, its draws against Python's, and what its policy does at the edges."""

import random
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from netllm_pl.encoders import pack_graphs
from netllm_pl.encoders.graph import heights_of
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ragged import observed
from netllm_pl.rollout import Array, Observations, rollout
from tasks.job_scheduling.decima import PUBLISHED, DecimaNet, DecimaPolicy, draw, load_decima
from tasks.job_scheduling.simulator import Rules, Simulator
from tasks.job_scheduling.workloads import Workload


def column(values: list[Array]) -> Array:
    out = np.empty(len(values), object)
    for row, value in enumerate(values):
        out[row] = value
    return out


def gathered(each: list[dict[str, Array]]) -> Observations:
    return {name: column([one[name] for one in each]) for name in each[0]}


def shown(episodes: int = 6, executors: int = 20, seed: int = 0) -> Observations:
    """Chains of stages: each episode has 1 to 3 jobs of 1 to 4."""
    rng = np.random.default_rng(seed)
    each = []
    for _ in range(episodes):
        sizes = rng.integers(1, 5, rng.integers(1, 4))
        caps = rng.integers(1, executors + 1, len(sizes))
        nodes = rng.normal(size=(sizes.sum(), 5))
        nodes[:, 0] = np.repeat(caps / executors, sizes)
        ends = np.cumsum(sizes) - 1
        parents = np.setdiff1d(np.arange(sizes.sum()), ends)
        each.append(
            {
                "nodes": nodes.astype(np.float32),
                "edges": np.stack([parents, parents + 1], 1).astype(np.int32),
                "heights": np.repeat(ends, sizes).astype(np.int16) - np.arange(sizes.sum(), dtype=np.int16),
                "job_nodes": sizes.astype(np.int16),
                "caps": caps.astype(np.int16),
                "stages": np.sort(rng.permutation(sizes.sum())[: rng.integers(1, 4)]).astype(np.int16),
            }
        )
    return gathered(each)


def net(seed: int = 0) -> DecimaNet:
    torch.manual_seed(seed)
    return DecimaNet()


# Against the published program ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(data_dir: Path) -> tuple[DecimaNet, Observations, pd.DataFrame]:
    """The published weights, what they were shown, and what they said and did."""
    files = {
        name: data_dir.parent / "golden" / "cjs" / f"det_decima_argmax_seed1_{name}.parquet"
        for name in ("obs", "decisions")
    }
    weights = data_dir.parent / "weights" / "decima.npz"
    for file in (*files.values(), weights):
        if not file.is_file():
            pytest.skip(f"no {file}")
    log = pd.read_parquet(files["obs"]).merge(pd.read_parquet(files["decisions"]), on="step")
    each = []
    for row in log.itertuples():
        edges = np.reshape(row.edges, (-1, 2))
        nodes = np.reshape(row.x, (-1, 5)).astype(np.float32)
        each.append(
            {
                "nodes": nodes,
                "edges": edges,
                "heights": heights_of(torch.tensor(edges), len(nodes)).numpy(),
                "job_nodes": np.diff(row.dag_ptr),
                "caps": row.commit_caps,
                "stages": row.schedulable_nodes,
            }
        )
    return load_decima(weights), gathered(each), log


def test_scores_of_the_published_program(published: tuple[DecimaNet, Observations, pd.DataFrame]) -> None:
    net, observations, log = published
    assert any(len(edges) == 0 for edges in observations["edges"])  # the odd case: nothing is updated
    batch = observed(observations)
    graphs = pack_graphs(batch)
    stages = graphs.numbers(batch["stages"], batch["stages_length"])
    with torch.no_grad():
        of_stages, of_executors = net(graphs, stages, batch["caps"])
    assert np.abs(of_stages.numpy() - np.concatenate(log["stage_scores"])).max() < 1e-4
    own = (log["stage_idx"].to_numpy() + np.cumsum([0, *map(len, log["stage_scores"])])[:-1]).tolist()
    for job, scores in zip(graphs.job[stages[own]].tolist(), log["exec_scores"], strict=True):
        assert np.abs(of_executors[job, : len(scores)].numpy() - scores).max() < 1e-4
        assert (of_executors[job, len(scores) :] == IMPOSSIBLE).all()


def test_decisions_of_the_published_program(published: tuple[DecimaNet, Observations, pd.DataFrame]) -> None:
    net, observations, log = published
    actions = DecimaPolicy(net, sample=False).act(observations)
    assert np.array_equal(actions, log[["stage_idx", "num_exec"]].to_numpy())


def test_it_plays_the_published_episode(
    published: tuple[DecimaNet, Observations, pd.DataFrame], tpch: Workload, data_dir: Path
) -> None:
    env, policy = Simulator(tpch, Rules(stream="median", order="ascending")), DecimaPolicy(published[0], sample=False)
    log = pd.read_parquet(data_dir.parent / "golden" / "cjs" / "det_decima_argmax_seed1_decisions.parquet")
    observations = env.reset([1])
    for _, row in log[:500].iterrows():
        (action,) = policy.act(observations)
        assert action.tolist() == [row["stage_idx"], row["num_exec"]], f"at step {row['step']}"
        observations, _, _, info = env.step(action[None])
        assert info["wall_time_ms"][0] == row["wall_time_ms"]


def test_drawn_actions_complete_jobs_as_published(
    published: tuple[DecimaNet, Observations, pd.DataFrame], tpch: Workload
) -> None:
    """The streams are the published ones, so that seed 1 gives 39.0 s, not only about that."""
    played = rollout(Simulator(tpch, Rules()), DecimaPolicy(published[0]), [1])
    assert np.round(-played.returns / 200, 1).tolist() == [39.0]


# Draws ----------------------------------------------------------------------------------------------------------------


def test_draws_are_those_of_python() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=3, size=(3000, 50)).astype(np.float32)
    count = rng.integers(1, 51, 3000)
    logits[np.arange(50) >= count[:, None]] = IMPOSSIBLE
    weights = torch.from_numpy(logits).softmax(-1).numpy()
    python = random.Random(7)
    uniforms = np.array([python.random() for _ in range(3000)])
    python.seed(7)
    for row, drawn in enumerate(draw(weights, uniforms)):
        sums = [float(total) for total in accumulate(weights[row, : count[row]])]
        assert drawn == python.choices(range(count[row]), cum_weights=sums)[0]


def test_a_draw_stays_among_what_is_allowed() -> None:
    weights = np.array([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], np.float32)
    below = np.full(3, np.nextafter(1.0, 0.0))
    assert draw(weights, below).tolist() == [1, 0, 2]
    assert draw(weights, np.full(3, 0.1)).tolist() == [0, 0, 1]


def test_a_draw_takes_one_number_for_the_stage_then_one_for_the_executors() -> None:
    given: list[Array] = []

    def uniforms() -> Array:
        given.append(np.full(6, 0.999999 if len(given) % 2 == 0 else 0.0))
        return given[-1]

    policy, observations = DecimaPolicy(net()), shown()
    policy.watch(SimpleNamespace(uniforms=uniforms))
    actions = policy.act(observations)
    assert len(given) == 2
    assert actions.tolist() == [[len(stages) - 1, 1] for stages in observations["stages"]]


def test_draws_follow_the_softmax() -> None:
    observations = {name: column([values[0]] * 4000) for name, values in shown(1, executors=4, seed=5).items()}
    model = net()
    batch = observed({name: values[:1] for name, values in observations.items()})
    graphs = pack_graphs(batch)
    with torch.no_grad():
        stages, executors = model(graphs, batch["stages"], batch["caps"])
    actions = DecimaPolicy(model, seed=2).act(observations)
    shares = np.bincount(actions[:, 0], minlength=len(stages)) / 4000
    assert np.abs(shares - stages.softmax(0).numpy()).max() < 0.03
    first = actions[actions[:, 0] == 0, 1]
    own = executors[graphs.job[batch["stages"][0]]].softmax(0).numpy()
    assert np.abs(np.bincount(first - 1, minlength=len(own)) / len(first) - own).max() < 0.05


# The policy -----------------------------------------------------------------------------------------------------------


def test_an_episode_decides_as_it_does_alone() -> None:
    observations, policy = shown(12), DecimaPolicy(net(), sample=False)
    together = policy.act(observations)
    for row in range(12):
        alone = {name: values[row : row + 1] for name, values in observations.items()}
        assert policy.act(alone).tolist() == [together[row].tolist()]
        k, count = together[row]
        job = np.repeat(np.arange(len(alone["job_nodes"][0])), alone["job_nodes"][0])[alone["stages"][0][k]]
        assert 0 <= k < len(alone["stages"][0]) and 1 <= count <= alone["caps"][0][job]


def test_an_episode_that_is_over_is_passed_by() -> None:
    observations, policy = shown(4), DecimaPolicy(net(), sample=False)
    before = policy.act(observations)
    for values in observations.values():
        values[2] = values[2][:0]
    after = policy.act(observations)
    assert after[2].tolist() == [-1, 1] and np.array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))
    assert policy.act({name: values[2:3] for name, values in observations.items()}).tolist() == [[-1, 1]]
    assert DecimaPolicy(net()).act(observations)[2].tolist() == [-1, 1]


def test_the_share_of_executors_is_of_all_of_them() -> None:
    """The same cap of a smaller cluster is a larger share; the network itself knows no number of executors."""
    model, scores = net(), []
    for executors in (20, 30, 200):
        batch = observed(shown(1, executors=20))
        batch["nodes"][:, 0] *= 20 / executors
        graphs = pack_graphs(batch)
        told = model.embed(graphs)
        fixed = told._replace(jobs=torch.zeros_like(told.jobs), groups=torch.zeros_like(told.groups))
        caps, first = batch["caps"][:1], graphs.nodes[0, :3]
        scores.append(model.executor_scores(graphs, fixed, torch.tensor([0]), caps)[0])
        inputs = torch.cat([first, torch.zeros(32)]).expand(int(caps), -1)
        share = torch.arange(int(caps))[:, None] / executors
        torch.testing.assert_close(scores[-1], model.executors(torch.cat([inputs, share], 1))[:, 0])
    assert not torch.allclose(scores[0], scores[1])


def test_gradients_reach_all_weights() -> None:
    model, batch = net(), observed(shown())
    graphs = pack_graphs(batch)
    stages, executors = model(graphs, graphs.numbers(batch["stages"], batch["stages_length"]), batch["caps"])
    (stages.sum() + executors[executors > IMPOSSIBLE].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# Weights --------------------------------------------------------------------------------------------------------------


def stored(path: Path, model: DecimaNet, **changed: Array | None) -> Path:
    """Save a network in the published layout, apart from what is changed; None drops an array."""
    arrays: dict[str, Array | None] = {}
    for name, weight in model.state_dict().items():
        part, layer, kind = name.rsplit(".", 2)
        arrays[f"{PUBLISHED[part]}.{layer}.{kind}"] = weight.numpy()
    np.savez(path, **{name: array for name, array in (arrays | changed).items() if array is not None})
    return path


def test_weights_load_back_equal(tmp_path: Path) -> None:
    model = net()
    loaded = load_decima(stored(tmp_path / "decima.npz", model)).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


LAST = "exec_policy_network.mlp_score.4.bias"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, rf"no array '{LAST}'; expected the published Decima weights"),
        (np.zeros(2, np.float32), r"executors.4.bias is \(2,\), expected finite \(1,\)"),
        (np.full(1, np.nan, np.float32), "executors.4.bias"),
        (np.zeros(1, np.int64), rf"'{LAST}' holds int64, expected floating-point"),
        (np.array([object()]), "not an archive of plain NumPy arrays"),
    ],
)
def test_broken_weights_are_named(tmp_path: Path, array: Array | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_decima(stored(tmp_path / "decima.npz", net(), **{LAST: array}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decima.npz: no such file"):
        load_decima(tmp_path / "decima.npz")
