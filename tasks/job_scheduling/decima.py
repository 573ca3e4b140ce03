"""Decima's network (Mao et al., SIGCOMM 2019, arXiv:1810.01963) as spark-sched-sim trains it, and its policy.

Shapes: N episodes side by side, M nodes, J jobs, G observations, K schedulable stages, Q chosen jobs, C numbers of
executors.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from netllm_pl.encoders import Graphs, pack_graphs, padded
from netllm_pl.encoders.graph import MessagePassing, sum_by
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ragged import LENGTH, group_of, observed, starts_of
from netllm_pl.rollout import Observations
from netllm_pl.weights import array_of, fill, read_weights

FEATURES = 5
JOB_FEATURES = 3  # of the five, those that all nodes of a job share
READ = ("nodes", "edges", "heights", "job_nodes", "caps", "stages")
# Our name of a network in `DecimaNet` -> the published one.
PUBLISHED = {
    "passing.prep": "encoder.node_encoder.mlp_prep",
    "passing.message": "encoder.node_encoder.mlp_msg",
    "passing.update": "encoder.node_encoder.mlp_update",
    "job": "encoder.dag_encoder.mlp",
    "group": "encoder.global_encoder.mlp",
    "stage": "stage_policy_network.mlp_score",
    "executors": "exec_policy_network.mlp_score",
}

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Embedded(NamedTuple):
    """What the encoder says.

    Attributes:
        nodes: (M, size).
        jobs: (J, size).
        groups: (G, size).
    """

    nodes: Tensor
    jobs: Tensor
    groups: Tensor


class DecimaNet(nn.Module):
    """Decima's graph network and its two heads, for any number of jobs, stages and executors.

    Stages are embedded by height, each once. The published program goes by topological generation and embeds a stage
    again, from some of its children only, where its parent's generation leads to these, too, but not to all of them;
    in no part of a TPC-H job does that happen.

    Args:
        size: Size of an embedding.
        width: Hidden layer of the encoder's networks; a second one has the size of an embedding.
        head_width: Both hidden layers of the heads.
    """

    def __init__(self, size: int = 16, width: int = 32, head_width: int = 64) -> None:
        super().__init__()
        self.passing = MessagePassing(*(_encoder(inputs, width, size) for inputs in (FEATURES, size, size)))
        self.job = _encoder(FEATURES + size, width, size)
        self.group = _encoder(size, width, size)
        self.stage = _head(FEATURES + 3 * size, head_width)
        self.executors = _head(JOB_FEATURES + 2 * size + 1, head_width)

    def embed(self, graphs: Graphs) -> Embedded:
        """Embed nodes, jobs and observations.

        As published, a node is not updated where no stage of the whole observation has a child.
        """
        linked = torch.zeros(graphs.groups, dtype=torch.bool, device=graphs.nodes.device)
        linked[graphs.node_group[graphs.edges[:, 0]]] = True
        hidden = self.passing(graphs.nodes, graphs.edges, graphs.heights, ~linked[graphs.node_group])
        jobs = sum_by(self.job(torch.cat([graphs.nodes, hidden], dim=1)), graphs.job, len(graphs.group))
        return Embedded(hidden, jobs, sum_by(self.group(jobs), graphs.group, graphs.groups))

    def stage_scores(self, graphs: Graphs, embedded: Embedded, stages: Tensor) -> Tensor:
        """Score stages.

        Args:
            graphs: The observations.
            embedded: What `embed` makes of them.
            stages: (K,) nodes, numbers of the whole batch.

        Returns:
            (K,) logits.
        """
        job = graphs.job[stages]
        parts = [graphs.nodes[stages], embedded.nodes[stages], embedded.jobs[job], embedded.groups[graphs.group[job]]]
        scores: Tensor = self.stage(torch.cat(parts, dim=1))[:, 0]
        return scores

    def executor_scores(self, graphs: Graphs, embedded: Embedded, jobs: Tensor, caps: Tensor) -> Tensor:
        """Score numbers of executors for jobs.

        The network reads the number less one, over that of all executors, which follows from the first feature:
        cap / executors.

        Args:
            graphs: The observations.
            embedded: What `embed` makes of them.
            jobs: (Q,) jobs, numbers of the whole batch.
            caps: (Q,) most executors that each may get.

        Returns:
            (Q, C) logits of 1 to C = max(caps) executors; behind a job's cap they are `IMPOSSIBLE`.
        """
        first = graphs.nodes[graphs.first_nodes[jobs], :JOB_FEATURES]
        told = torch.cat([first, embedded.jobs[jobs], embedded.groups[graphs.group[jobs]]], dim=1)
        # Only what is possible is scored: most of the executors of a cluster are at work, so that a cap is small.
        row = group_of(caps, int(caps.sum()))
        count = torch.arange(len(row), device=caps.device) - starts_of(caps)[row]
        everyone = torch.where(caps > 0, (caps / first[:, 0]).round(), 1)
        scores = self.executors(torch.cat([told[row], (count / everyone[row])[:, None]], dim=1))[:, 0]
        lines, real = padded(scores.float(), caps)
        assert real is not None
        return lines.masked_fill(~real, IMPOSSIBLE)

    def forward(self, graphs: Graphs, stages: Tensor, caps: Tensor) -> tuple[Tensor, Tensor]:
        """Score everything at once.

        Args:
            graphs: The observations.
            stages: (K,) schedulable stages, numbers of the whole batch.
            caps: (J,) most executors that each job may get.

        Returns:
            Logits (K,) of the stages, and (J, C) of numbers of executors for each job.
        """
        embedded = self.embed(graphs)
        jobs = torch.arange(len(caps), device=caps.device)
        return self.stage_scores(graphs, embedded, stages), self.executor_scores(graphs, embedded, jobs, caps)


class Draws(Protocol):
    """A simulator whose episodes have random streams of their own."""

    def uniforms(self) -> npt.NDArray[np.float64]:
        """Draw one number in [0, 1) from the stream of every episode (N,)."""


class DecimaPolicy:
    """Runs the network in an environment: one pass over all episodes for each decision.

    Args:
        net: The network.
        sample: Draw stage and executors from the softmax of their scores, as published; otherwise take the likeliest.
        seed: Of draws in an environment that has no ``uniforms``.
    """

    def __init__(self, net: DecimaNet, sample: bool = True, seed: int = 0) -> None:
        self.net, self.sample = net, sample
        self.seed = seed
        self.env: Draws | None = None
        self.reseed(0)

    def reseed(self, number: int) -> None:
        """Draw what belongs to one of many batches of episodes, where the environment has no streams."""
        self.random = np.random.default_rng([self.seed, number])

    def watch(self, env: Any) -> None:
        """Draw from the environment's streams from now on, if it has any."""
        self.env = env if hasattr(env, "uniforms") else None

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    @torch.inference_mode()
    def act(self, observations: Observations) -> Ints:
        """Choose stage and executors (N, 2); an episode without schedulable stages gets (-1, 1)."""
        batch = observed({name: observations[name] for name in READ}, next(self.net.parameters()).device)
        graphs, counts = pack_graphs(batch), batch["stages" + LENGTH][:, 0]
        embedded, stages = self.net.embed(graphs), graphs.numbers(batch["stages"], counts)
        scores, real = padded(self.net.stage_scores(graphs, embedded, stages), counts)
        actions = np.stack([np.full(len(counts), -1), np.ones(len(counts), np.int64)], axis=1)
        asked = (counts > 0).cpu().numpy()
        if not asked.any():
            return actions
        assert real is not None
        actions[asked, 0] = self._choose(scores.masked_fill(~real, IMPOSSIBLE), asked)
        nodes = stages[(starts_of(counts).cpu() + torch.from_numpy(actions[:, 0]))[asked].to(stages.device)]
        job = graphs.job[nodes]
        caps = batch["caps"][job]
        allowed = torch.full((len(counts), int(caps.max())), IMPOSSIBLE, device=caps.device)
        allowed[torch.from_numpy(asked).to(caps.device)] = self.net.executor_scores(graphs, embedded, job, caps)
        actions[asked, 1] = 1 + self._choose(allowed, asked)
        return actions

    def _choose(self, scores: Tensor, asked: npt.NDArray[np.bool_]) -> Ints:
        """Choose in each line of scores (N, C) of an episode that is asked."""
        if not self.sample:
            best: Ints = scores.argmax(-1).cpu().numpy()[asked]
            return best
        uniforms = self.random.random(len(asked)) if self.env is None else self.env.uniforms()
        return draw(scores.float().softmax(-1).cpu().numpy()[asked], uniforms[asked])


def draw(weights: Floats, uniforms: npt.NDArray[np.float64]) -> Ints:
    """Draw an index in each line as Python's ``random.choices`` does from one number, with its rounding.

    Weights are summed up one by one in their own type. The number is multiplied in double precision, as with the
    NumPy 1 that the published program runs on.

    Args:
        weights: (N, C) float32; zeros at the end are never drawn.
        uniforms: (N,) numbers in [0, 1).

    Returns:
        (N,).
    """
    sums = np.cumsum(weights, axis=1, dtype=weights.dtype)
    wanted = uniforms * sums[:, -1].astype(np.float64)
    # The last sum is left out, there as here: a number that rounds up to the total stays inside.
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1)
    passed = (sums <= wanted[:, None]) & (np.arange(weights.shape[1]) < last[:, None])
    return np.asarray(passed.sum(axis=1))


def load_decima(path: Path) -> DecimaNet:
    """Read published weights.

    Args:
        path: A NumPy archive whose arrays have the names of the published program's parameters.

    Raises:
        UserError: There is no such file, it is no archive of plain arrays, or an array is missing or has another shape.
    """
    net, weights = DecimaNet(), read_weights(path)
    arrays = {}
    for name in net.state_dict():
        part, layer, kind = name.rsplit(".", 2)
        arrays[name] = array_of(weights, f"{PUBLISHED[part]}.{layer}.{kind}", path, "Decima")
    fill(net, arrays, path)
    return net


def _encoder(inputs: int, width: int, size: int) -> nn.Sequential:
    first, second, third = nn.Linear(inputs, width), nn.Linear(width, size), nn.Linear(size, size)
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), third)


def _head(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
