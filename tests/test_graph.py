"""Graphs of many observations at once: packing, message passing, and one layout of ragged columns everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netllm_pl.data import Batch
from netllm_pl.encoders import GraphEncoder, Graphs, pack_graphs, padded
from netllm_pl.encoders.graph import MessagePassing, heights_of
from netllm_pl.errors import UserError
from netllm_pl.experience import PoolWriter, Windows, read_pool
from netllm_pl.ragged import join_steps, observed, select
from netllm_pl.rollout import Array, Observations, Rollout
from netllm_pl.testing import tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrate

F, Y, D = 4, 3, 16
PLAIN = ("nodes", "edges", "heights", "job_nodes", "jobs", "stages")


def column(values: list[Array]) -> Array:
    """An object array of arrays, as simulators give what differs in length between episodes."""
    out = np.empty(len(values), object)
    for row, value in enumerate(values):
        out[row] = value
    return out


def shown(episodes: int, seed: int = 0, edges: float = 0.4, jobs: int = 3) -> Observations:
    """Random jobs of 1 to 5 stages in every episode, edges from lower to higher numbers."""
    rng = np.random.default_rng(seed)
    every: list[dict[str, Array]] = []
    for _ in range(episodes):
        sizes = rng.integers(1, 6, rng.integers(1, jobs + 1))
        first = np.cumsum(sizes) - sizes
        pairs = [
            (f + a, f + b)
            for f, n in zip(first, sizes, strict=True)
            for a in range(n)
            for b in range(a + 1, n)
            if rng.random() < edges
        ]
        linked, total = np.array(pairs, np.int32).reshape(-1, 2), int(sizes.sum())
        every.append(
            {
                "nodes": rng.normal(size=(total, F)).astype(np.float32),
                "edges": linked,
                "heights": heights_of(torch.from_numpy(linked).long(), total).numpy().astype(np.int16),
                "job_nodes": sizes.astype(np.int16),
                "jobs": rng.normal(size=(len(sizes), Y)).astype(np.float32),
                "stages": rng.permutation(total)[: rng.integers(1, total + 1)].astype(np.int16),
            }
        )
    return {name: column([one[name] for one in every]) for name in every[0]}


def pick(observations: Observations, rows: list[int]) -> Observations:
    return {name: values[rows] for name, values in observations.items()}


def encoder(seed: int = 0) -> GraphEncoder:
    torch.manual_seed(seed)
    return GraphEncoder(F, Y, D, width=8)


def encode(model: GraphEncoder, observations: Observations) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Vectors of nodes and jobs, by episode, and of episodes."""
    batch = observed(observations)
    nodes, jobs, groups = model(pack_graphs(batch), batch["jobs"])
    return (
        list(nodes.split(batch["nodes_length"][:, 0].tolist())),
        list(jobs.split(batch["job_nodes_length"][:, 0].tolist())),
        groups,
    )


# Heights --------------------------------------------------------------------------------------------------------------


def test_heights_are_longest_paths_to_a_sink() -> None:
    edges = torch.tensor([[0, 1], [1, 2], [0, 2], [3, 2], [2, 4]])
    assert heights_of(edges, 6).tolist() == [3, 2, 1, 2, 0, 0]
    assert heights_of(torch.empty(0, 2, dtype=torch.long), 2).tolist() == [0, 0]
    assert heights_of(torch.empty(0, 2, dtype=torch.long), 0).tolist() == []


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 1], [1, 2], [2, 1]], r"cycle: nodes (1 -> 2 -> 1|2 -> 1 -> 2);"),
        ([[0, 1], [3, 3]], r"cycle: nodes 3 -> 3;"),
        ([[0, 1], [1, 4]], r"edge 1 of the graph, 1 -> 4, names a node outside 0 to 3"),
        ([[-1, 1]], r"edge 0 of the graph, -1 -> 1"),
    ],
)
def test_bad_edges_are_named(edges: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        heights_of(torch.tensor(edges), 4)


# Packing --------------------------------------------------------------------------------------------------------------


def test_numbers_count_over_the_whole_batch() -> None:
    observations = shown(5)
    batch = observed(observations)
    graphs = pack_graphs(batch)
    stages = graphs.numbers(batch["stages"], batch["stages_length"])
    start = 0
    for row in range(5):
        nodes, sizes, edges, own = (observations[name][row] for name in ("nodes", "job_nodes", "edges", "stages"))
        end = start + len(nodes)
        inside = ((graphs.edges >= start) & (graphs.edges < end)).all(1)
        assert np.array_equal(graphs.edges[inside].numpy() - start, edges)
        assert graphs.job[start:end].bincount()[-len(sizes) :].tolist() == sizes.tolist()
        mine = stages[(stages >= start) & (stages < end)]
        assert np.array_equal(graphs.nodes[mine].numpy(), nodes[own])
        start = end
    assert graphs.groups == 5 and start == len(graphs.nodes)
    assert torch.equal(graphs.job[graphs.first_nodes], torch.arange(len(graphs.group)))


def test_absent_heights_are_computed() -> None:
    batch = observed(shown(4))
    graphs = pack_graphs({name: value for name, value in batch.items() if "heights" not in name})
    assert torch.equal(graphs.heights, batch["heights"])


def test_jobs_must_hold_all_nodes() -> None:
    batch = observed(shown(3))
    batch["job_nodes"][0] += 1
    with pytest.raises(UserError, match="job_nodes sum to"):
        pack_graphs(batch)


@pytest.mark.parametrize("size", [None, 6])
def test_rows_are_padded_and_come_back(size: int | None) -> None:
    rows, counts = torch.randn(7, 2, requires_grad=True), torch.tensor([2, 0, 4, 1])
    values, mask = padded(rows, counts, size)
    assert mask is not None and values.shape == (4, size or 4, 2) and mask.sum(1).tolist() == counts.tolist()
    assert torch.equal(values[mask], rows) and not values[~mask].any()
    values.sum().backward()
    assert rows.grad is not None and (rows.grad == 1).all()
    assert padded(torch.empty(0, 3), torch.tensor([0, 0])).values.shape == (2, 0, 3)


# Message passing ------------------------------------------------------------------------------------------------------


def by_recursion(passing: MessagePassing, nodes: Tensor, edges: Tensor) -> Tensor:
    """The definition, a node at a time."""

    def embed(node: int) -> Tensor:
        base = passing.prep(nodes[node])
        children = [embed(child) for parent, child in edges.tolist() if parent == node]
        if not children:
            return passing.update(base)
        return base + passing.update(torch.stack([passing.message(child) for child in children]).sum(0))

    return torch.stack([embed(node) for node in range(len(nodes))])


def test_messages_climb_from_the_sinks() -> None:
    torch.manual_seed(1)
    passing = MessagePassing(nn.Linear(F, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6))
    graphs = pack_graphs(observed(shown(6, edges=0.6)))
    assert graphs.heights.max() >= 3
    hidden = passing(graphs.nodes, graphs.edges, graphs.heights)
    torch.testing.assert_close(hidden, by_recursion(passing, graphs.nodes, graphs.edges))
    spared = (graphs.heights == 0) & (torch.arange(len(graphs.nodes)) % 2 == 0)
    hidden = passing(graphs.nodes, graphs.edges, graphs.heights, spared)
    torch.testing.assert_close(hidden[spared], passing.prep(graphs.nodes[spared]))


def test_one_by_one_gives_what_a_batch_gives() -> None:
    observations, model = shown(6), encoder()
    together = encode(model, observations)
    for row in range(6):
        alone = encode(model, pick(observations, [row]))
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[row], one[0])


def test_the_order_of_graphs_does_not_matter() -> None:
    observations, model, order = shown(6), encoder(), [3, 0, 5, 1, 4, 2]
    straight, mixed = encode(model, observations), encode(model, pick(observations, order))
    for before, after in zip(straight, mixed, strict=True):
        for place, row in enumerate(order):
            torch.testing.assert_close(after[place], before[row])


def test_a_node_is_told_what_lies_behind_it_and_around_it() -> None:
    edges = torch.tensor([[0, 1], [1, 2]])
    heights, job = torch.tensor([2, 1, 0, 0]), torch.tensor([0, 0, 0, 1])
    nodes, model = torch.randn(4, F), encoder()

    def hidden(changed: int) -> Tensor:
        other = nodes.clone()
        other[changed] += 1
        return model.passing(other, edges, heights)

    same = [(hidden(node) == model.passing(nodes, edges, heights)).all(1).tolist() for node in (1, 2, 3)]
    assert same == [[False, False, True, True], [False, False, False, True], [True, True, True, False]]
    graphs = Graphs(nodes, edges, heights, job, torch.zeros(2, dtype=torch.long), 1)
    tokens = model(graphs, torch.zeros(2, Y)).nodes
    other = model(Graphs(nodes + torch.eye(4)[:, 3:], edges, heights, job, graphs.group, 1), torch.zeros(2, Y)).nodes
    assert (tokens != other).any(1).all()  # node 3 is in another job, of the same group


@pytest.mark.parametrize("edges", [0.0, 0.5])
def test_gradients_reach_all_weights(edges: float) -> None:
    observations, model = shown(5, edges=edges), encoder()
    batch = observed(observations)
    vectors = model(pack_graphs(batch), batch["jobs"])
    (sum((part * torch.randn_like(part)).sum() for part in vectors)).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.startswith("passing.message") for name in idle) and bool(idle) == (edges == 0)


def test_an_observation_without_nodes_is_a_group() -> None:
    observations = shown(3)
    for name in PLAIN:
        observations[name][1] = observations[name][1][:0]
    nodes, jobs, groups = encode(encoder(), observations)
    assert groups.shape == (3, D) and len(nodes[1]) == len(jobs[1]) == 0 and groups.isfinite().all()
    nothing = encode(encoder(), pick(observations, [1]))
    torch.testing.assert_close(nothing[2][0], groups[1])


def test_half_precision_is_close() -> None:
    observations, model = shown(8, edges=0.6, jobs=6), encoder()
    exact = encode(model, observations)[2]
    with torch.autocast("cpu", torch.bfloat16):
        rough = encode(model, observations)[2]
        rough.sum().backward()
    assert (rough - exact).abs().max() < 0.2
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_tokens_start_at_the_scale_of_word_vectors(scale: float) -> None:
    batch = observed(shown(20))
    for part in GraphEncoder(F, Y, 32, scale=scale)(pack_graphs(batch), batch["jobs"]):
        assert part.square().mean().sqrt().item() == pytest.approx(scale, rel=0.05)


def test_jobs_without_features_of_their_own() -> None:
    graphs = pack_graphs(observed(shown(2)))
    assert GraphEncoder(F, 0, D)(graphs).jobs.shape == (len(graphs.group), D)
    with pytest.raises(ValueError, match="jobs have 0 features, the encoder was made for 3"):
        encoder()(graphs)


# Ragged columns -------------------------------------------------------------------------------------------------------


def recorded(lengths: tuple[int, ...]) -> Rollout:
    """Episodes of random graphs."""
    n, longest = len(lengths), max(lengths)
    steps = [shown(n, seed=t) for t in range(longest)]
    seen: dict[str, Any] = {name: np.stack([step[name] for step in steps]) for name in PLAIN}
    seen["ready"] = np.empty((longest, n), object)
    for t, e in np.ndindex(longest, n):
        seen["ready"][t, e] = np.arange(len(seen["job_nodes"][t, e])) % 2 == 1
    seen["time_s"] = np.arange(longest * n, dtype=np.float32).reshape(longest, n)
    alive = np.arange(longest)[:, None] < np.asarray(lengths)
    return Rollout(np.zeros((longest, n, 2), np.int64), np.zeros((longest, n)), alive, {}, seen, {})


def windows(folder: Path, rollout: Rollout, window: int) -> Batch:
    with PoolWriter(folder, "Toy") as writer:
        writer.add(rollout, "toy")
    data = Windows(read_pool(folder), window)
    return data[list(range(len(data)))]


def same(first: Batch, second: Batch, names: list[str]) -> None:
    for name in names:
        assert torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype, name


def names_of(rollout: Rollout) -> list[str]:
    ragged = [name for name, values in rollout.observations.items() if values.dtype == object]
    return ["time_s", *ragged, *(f"{name}_length" for name in ragged)]


def test_what_an_environment_shows_looks_as_its_recording(tmp_path: Path, own_cache: Path) -> None:
    rollout = recorded((1, 1, 1))
    task = AdaptiveBitrate(tiny_backbone())
    batch = task.observe({name: values[0] for name, values in rollout.observations.items()}, step=0)
    assert batch["nodes_length"].shape == (3, 1) and batch["ready"].dtype == torch.bool
    same(batch, windows(tmp_path / "pool", rollout, 1), [*names_of(rollout), "step"])


def test_padding_is_a_group_without_nodes(tmp_path: Path, own_cache: Path) -> None:
    batch = windows(tmp_path / "pool", recorded((3, 2)), 3)
    graphs = pack_graphs(batch)
    vectors = encoder()(graphs, batch["jobs"])
    assert graphs.groups == 6 and batch["nodes_length"][1, 2] == 0 and vectors.groups.isfinite().all()
    assert sorted(set(graphs.node_group.tolist())) == [0, 1, 2, 3, 4]


def test_steps_join_and_windows_part(tmp_path: Path, own_cache: Path) -> None:
    rollout = recorded((3, 3, 3, 3))
    names = names_of(rollout)
    steps = [observed({name: values[t] for name, values in rollout.observations.items()}) for t in range(3)]
    batch = windows(tmp_path / "pool", rollout, 3)
    same(join_steps(steps), batch, names)
    same(join_steps([join_steps(steps[:2]), steps[2]]), batch, names)
    for rows in (slice(0, 1), slice(2, 4)):
        part = [observed({n: v[t, rows] for n, v in rollout.observations.items()}) for t in range(3)]
        same(select(batch, rows), join_steps(part), names)
