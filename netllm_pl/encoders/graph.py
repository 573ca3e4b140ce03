"""Message passing over batches of directed acyclic graphs, from the sinks up, all graphs at once.

All graphs of a batch lie one behind the other. Nodes belong to jobs, jobs to groups; a group is one observation, that
is, one step of one window.

Shapes: M nodes, E edges, J jobs, G groups, K rows of another ragged column; F features of a node, Y of a job, D size of
a hidden vector, L levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from netllm_pl.data import Batch
from netllm_pl.encoders.tokens import TokenNorm
from netllm_pl.errors import UserError
from netllm_pl.ragged import LENGTH, counts_of, group_of, starts_of


@dataclass(frozen=True)
class Graphs:
    """Many graphs as one; `pack_graphs` makes it from a batch.

    Attributes:
        nodes: (M, F) float features.
        edges: (E, 2) int64 parent and child, numbers of nodes of the whole batch.
        heights: (M,) int64 edges on the longest path to a sink.
        job: (M,) int64 job of each node; nodes of a job lie side by side.
        group: (J,) int64 group of each job; jobs of a group lie side by side.
        groups: How many groups there are (G), those without nodes included.
    """

    nodes: Tensor
    edges: Tensor
    heights: Tensor
    job: Tensor
    group: Tensor
    groups: int

    @cached_property
    def node_group(self) -> Tensor:
        """Group of each node (M,)."""
        return self.group[self.job]

    @cached_property
    def job_counts(self) -> Tensor:
        """Nodes of each job (J,)."""
        return counts_of(self.job, len(self.group))

    @cached_property
    def first_nodes(self) -> Tensor:
        """First node of each job (J,)."""
        return starts_of(self.job_counts)

    @cached_property
    def group_starts(self) -> Tensor:
        """First node of each group (G,)."""
        return starts_of(counts_of(self.node_group, self.groups))

    def numbers(self, local: Tensor, counts: Tensor) -> Tensor:
        """Turn numbers of nodes within their groups into those of the whole batch.

        Args:
            local: (K, ...) int, group by group.
            counts: (G,) or (B, W) rows of each group.

        Returns:
            (K, ...) int64.
        """
        start = self.group_starts[group_of(counts.flatten(), len(local))]
        return local.long() + start.view(-1, *[1] * (local.dim() - 1))


def pack_graphs(batch: Batch) -> Graphs:
    """Make one graph of all observations of a batch, whose ragged columns lie as `netllm_pl.ragged` says.

    Args:
        batch: ``nodes`` (M, F); ``edges`` (E, 2), numbers of nodes within the observation; ``job_nodes`` (J,) nodes of
            each job; ``heights`` (M,), which is computed if it is absent; each with its ``_length`` (B, W).

    Returns:
        Graphs with a group for each of the B W steps, also for padding.

    Raises:
        UserError: The nodes of the jobs are not the nodes there are, or `heights_of` refuses the edges.
    """
    nodes, edges, sizes = batch["nodes"].float(), batch["edges"].long(), batch["job_nodes"].long()
    counts = {name: batch[name + LENGTH].flatten() for name in ("nodes", "edges", "job_nodes")}
    if int(sizes.sum()) != len(nodes):
        raise UserError(f"job_nodes sum to {int(sizes.sum())}, but there are {len(nodes)} nodes; record them together")
    job, group = group_of(sizes, len(nodes)), group_of(counts["job_nodes"], len(sizes))
    edges = edges + starts_of(counts["nodes"])[group_of(counts["edges"], len(edges)), None]
    heights = batch["heights"].long() if "heights" in batch else heights_of(edges, len(nodes))
    return Graphs(nodes, edges, heights, job, group, len(counts["nodes"]))


def heights_of(edges: Tensor, nodes: int) -> Tensor:
    """Longest path to a sink, in edges, of each node (M,), by taking away the sinks again and again.

    Args:
        edges: (E, 2) int64 parent and child.
        nodes: How many nodes there are (M).

    Raises:
        UserError: An edge names a node that is not there, or edges form a cycle.
    """
    outside = ((edges < 0) | (edges >= nodes)).any(1).nonzero().flatten().tolist()
    if outside:
        number, (parent, child) = outside[0], edges[outside[0]].tolist()
        raise UserError(f"edge {number} of the graph, {parent} -> {child}, names a node outside 0 to {nodes - 1}")
    heights = torch.zeros(nodes, dtype=torch.long, device=edges.device)
    level = 0
    while len(edges):
        level += 1
        is_parent = torch.zeros(nodes, dtype=torch.bool, device=edges.device)
        is_parent[edges[:, 0]] = True
        stays = is_parent[edges[:, 1]]
        if bool(stays.all()):
            raise UserError(f"the graph has a cycle: nodes {_cycle(edges)}; stages must form a directed acyclic graph")
        heights[edges[~stays, 0]] = level
        edges = edges[stays]
    return heights


def _cycle(edges: Tensor) -> str:
    """Describe a cycle of edges of which every child is a parent, too."""
    child_of: dict[int, int] = dict(edges.tolist())
    path = [next(iter(child_of))]
    while child_of[path[-1]] not in path:
        path.append(child_of[path[-1]])
    begin = path.index(child_of[path[-1]])
    return " -> ".join(map(str, [*path[begin:], path[begin]]))


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum rows (R, D) by number (R,) into (size, D), in float32 whatever the type of the rows."""
    return values.new_zeros(size, values.shape[1], dtype=torch.float32).index_add(0, index, values.float())


class MessagePassing(nn.Module):
    """Embeds nodes level by level, each from its children, so that a node knows all that comes behind it.

    ``h = prep(x) + update(sum of message(h of children))`` with children, ``h = update(prep(x))`` without, as in Decima
    (Mao et al., 2019, arXiv:1810.01963, eq. 1).

    Args:
        prep: Maps features (., F) to (., D).
        message: Maps (., D) to (., D).
        update: Maps (., D) to (., D).
    """

    def __init__(self, prep: nn.Module, message: nn.Module, update: nn.Module) -> None:
        super().__init__()
        self.prep, self.message, self.update = prep, message, update

    def forward(self, nodes: Tensor, edges: Tensor, heights: Tensor, untouched: Tensor | None = None) -> Tensor:
        """Embed nodes.

        Args:
            nodes: (M, F) features.
            edges: (E, 2) int64 parent and child.
            heights: (M,) int64 longest path to a sink.
            untouched: (M,) bool sinks whose embedding is ``prep(x)`` alone; None is none.

        Returns:
            (M, D).
        """
        order = heights.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        by_level = edges[heights[edges[:, 0]].argsort(stable=True)]
        node_counts, edge_counts = _counts(heights, edges)
        base = self.prep(nodes[order])
        sinks, *above = base.split(node_counts)
        first = self.update(sinks)
        if untouched is not None:
            first = torch.where(untouched[order][: len(sinks), None], sinks.to(first.dtype), first)
        parents, children = (place[by_level[:, end]].split(edge_counts) for end in range(2))
        return self._climb(first, above, parents[1:], children[1:])[place]

    def _climb(
        self, sinks: Tensor, above: Sequence[Tensor], parents: Sequence[Tensor], children: Sequence[Tensor]
    ) -> Tensor:
        """Embed all nodes, in the order of their levels, which is also that of the numbers in parents and children."""
        hidden = [sinks]
        messages = sinks.new_empty(0, sinks.shape[1])
        below = 0
        for base, parent, child in zip(above, parents, children, strict=True):
            messages = torch.cat([messages, self.message(hidden[-1])])
            below += len(hidden[-1])
            received = sum_by(messages[child], parent - below, len(base))
            hidden.append(base + self.update(received.to(base.dtype)))
        return torch.cat(hidden)


def _counts(heights: Tensor, edges: Tensor) -> tuple[list[int], list[int]]:
    """Nodes of each level, and edges from each level: what the device tells the program, at one time."""
    node_counts = torch.bincount(heights, minlength=1)
    edge_counts = torch.bincount(heights[edges[:, 0]], minlength=len(node_counts))
    return tuple(torch.stack([node_counts, edge_counts]).tolist())


class GraphVectors(NamedTuple):
    """What `GraphEncoder` says of graphs.

    Attributes:
        nodes: (M, d_model) one token a node.
        jobs: (J, d_model) one token a job.
        groups: (G, d_model) one token a group.
    """

    nodes: Tensor
    jobs: Tensor
    groups: Tensor


class GraphEncoder(nn.Module):
    """Graphs as tokens: one a node, one a job, one for all that is there.

    A node's token knows its features, all nodes behind it (`MessagePassing`), its job and its group.

    Args:
        node_features: Numbers per node (F).
        job_features: Numbers per job (Y); 0 if jobs have none of their own.
        d_model: Size of a token vector.
        width: Size of the hidden vectors.
        scale: Root mean square of the tokens at the start (`Backbone.token_scale`).
    """

    def __init__(
        self, node_features: int, job_features: int, d_model: int, width: int = 64, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.passing = MessagePassing(_mlp(node_features, width), _mlp(width, width), _mlp(width, width))
        self.job_features = job_features
        self.job = _mlp(2 * width + job_features, width)
        self.group = _mlp(2 * width, width)
        self.node_token = _token(node_features + 3 * width, width, d_model, scale)
        self.job_token = _token(job_features + 2 * width, width, d_model, scale)
        self.group_token = _token(width, width, d_model, scale)

    def forward(self, graphs: Graphs, jobs: Tensor | None = None) -> GraphVectors:
        """Encode graphs.

        Args:
            graphs: Nodes, edges, and who belongs to whom.
            jobs: (J, Y) features of jobs; None if there are none.
        """
        told = graphs.nodes.new_zeros(len(graphs.group), 0) if jobs is None else jobs.float()
        if told.shape[1] != self.job_features:
            raise ValueError(f"jobs have {told.shape[1]} features, the encoder was made for {self.job_features}")
        hidden = self.passing(graphs.nodes, graphs.edges, graphs.heights)
        job = self.job(torch.cat([_pool(hidden, graphs.job, len(graphs.group)), told], dim=1))
        group = self.group(_pool(job, graphs.group, graphs.groups))
        return GraphVectors(
            self.node_token(torch.cat([graphs.nodes, hidden, job[graphs.job], group[graphs.node_group]], dim=1)),
            self.job_token(torch.cat([told, job, group[graphs.group]], dim=1)),
            self.group_token(group),
        )


def _pool(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean and, for how much there is in all, tenth of the sum of rows by number: (size, 2 D)."""
    total = sum_by(values, index, size)
    count = counts_of(index, size).clamp_min(1)
    return torch.cat([total / count[:, None], total / 10], dim=1)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


def _token(inputs: int, width: int, d_model: int, scale: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 2 * width), nn.GELU(), nn.Linear(2 * width, d_model), TokenNorm(d_model, scale)
    )
