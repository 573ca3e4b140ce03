"""What schedulers that learn from experience share: tokens of a decision's state, and scores of its candidates.

A candidate is a schedulable stage together with a number of executors. Shapes: B batch, W steps, K schedulable stages,
L numbers of executors of each, M nodes, J jobs, C candidates with known values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from netllm_pl.acting import Objective, chosen_of
from netllm_pl.data import Batch
from netllm_pl.encoders import ScalarEncoder, padded
from netllm_pl.encoders.graph import GraphEncoder, Graphs, pack_graphs
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE, PointerHead
from netllm_pl.processes import mean
from netllm_pl.ragged import LENGTH, group_of, real_of
from netllm_pl.task import check_columns

COLUMNS = ("nodes", "extra", "edges", "job_nodes", "jobs", "caps", "stages", "limits", "committable", "advice")
"""Columns of the observation that are read."""
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Executors that may be chosen: these parts of those that a stage can use, and what the advice says."""
NODE_FEATURES, JOB_FEATURES, COUNT_FEATURES = 20, 15, 9
GAIN, HUBER = 30.0, 3.0
"""Job-seconds: gains over the advice are cut at the first; errors up to the second are squared."""
SCALE = 5.0
"""Job-seconds that a score of 1 stands for."""
TEMPERATURE = 1.0
"""Job-seconds: candidates so much worse than the best are e times less likely in the target of the softmax."""
UNREACHABLE = -1e4
"""Score of stages behind the end of a fixed list; they are neither chosen nor learned."""


class State(NamedTuple):
    """Tokens of the schedulable stages, and of all that is there.

    Attributes:
        stages: (R, d_model) of all steps, one behind the other.
        whole: (B, W, 1, d_model).
    """

    stages: Tensor
    whole: Tensor


class StateEncoder(nn.Module):
    """Turns observations into tokens: a graph network over stages and jobs, and what it cannot see at once.

    Args:
        d_model: Size of a token.
        width: Size of hidden vectors.
        scale: Root mean square of the tokens at the start.
    """

    def __init__(self, d_model: int, width: int = 64, scale: float = 1.0) -> None:
        super().__init__()
        self.graph = GraphEncoder(NODE_FEATURES, JOB_FEATURES, d_model, width, scale)
        self.whole = ScalarEncoder(4, d_model, width, scale)

    def forward(self, batch: Batch) -> State:
        """Encode the observations of every step."""
        check_columns(batch, COLUMNS)
        graphs = pack_graphs(batch | {"nodes": node_features(batch)})
        vectors = self.graph(graphs, job_features(batch, graphs))
        numbers = graphs.numbers(batch["stages"], batch["stages" + LENGTH].flatten())
        owner = graphs.job[numbers]
        shape = batch["stages" + LENGTH].shape
        counts = [batch["committable"], batch["stages" + LENGTH], batch["job_nodes" + LENGTH], batch["nodes" + LENGTH]]
        whole = self.whole(torch.log1p(torch.stack([part.float() for part in counts], dim=-1))).values
        return State(
            vectors.nodes[numbers] + vectors.jobs[owner], (vectors.groups.unflatten(0, shape) + whole)[:, :, None]
        )


def node_features(batch: Batch) -> Tensor:
    """Features of nodes (M, 20), near one: the published ones, and logarithms of what is known besides."""
    nodes, extra = batch["nodes"].float(), batch["extra"].float()
    published = torch.cat([nodes[:, :3], nodes[:, 3:].clamp_max(5.0)], dim=1)
    return torch.cat([published, torch.log1p(extra.clamp_min(0)) / 3], dim=1)


def job_features(batch: Batch, graphs: Graphs) -> Tensor:
    """Features of jobs (J, 15), near one: logarithms, how they compare with the others, and what they could get."""
    jobs = batch["jobs"].float()
    work, unstarted = jobs[:, 4], jobs[:, 7] > 0
    group, groups = graphs.group, graphs.groups
    order = torch.argsort(group * 1e7 + work.clamp_max(9e6).double(), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    counts = batch["job_nodes" + LENGTH].flatten()
    rank = place - (counts.cumsum(0) - counts)[group]  # 0 is the job with the least work left
    waiting = torch.zeros(groups, device=work.device).index_add(0, group, unstarted.float())[group].clamp_min(1)
    executors = _all_executors(batch, graphs)[group]
    told = [jobs[:, 0] * waiting / executors, 1 / (1 + rank.float()), rank.float() / counts[group], waiting / 20]
    return torch.cat([torch.log1p(jobs.clamp_min(0)) / 3, torch.stack(told, dim=1)], dim=1)


def _all_executors(batch: Batch, graphs: Graphs) -> Tensor:
    """Executors of the cluster (G,): some job may get some of them, and its first feature says which part that is."""
    first, caps = batch["nodes"].float()[graphs.first_nodes, 0], batch["caps"].float()
    found = torch.where(first > 0, caps / first.clamp_min(1e-6), torch.zeros_like(caps))
    most = torch.zeros(graphs.groups, device=found.device)
    return most.scatter_reduce(0, graphs.group, found, "amax").clamp_min(1)


class Scores(NamedTuple):
    """Scores of candidates.

    Attributes:
        grid: (B, W, K, L) every schedulable stage with each of `SHARES` and the advice; `IMPOSSIBLE` behind the last
            stage, near `UNREACHABLE` behind the end of a fixed list.
        tried: (B, W, C) the candidates of the batch's column ``values``, `IMPOSSIBLE` behind the last; none if there is
            no such column.
    """

    grid: Tensor
    tried: Tensor


class CandidateHead(nn.Module):
    """Scores stages by a pointer, and for each the executors it may get: any number of both.

    Args:
        d_hidden: Size of a hidden state.
        width: Size of hidden vectors.
        most: As published, scores belong to places in a list of so many stages, and later stages cannot be chosen;
            None scores the stages' own states, in any number.
    """

    def __init__(self, d_hidden: int, width: int = 128, most: int | None = None) -> None:
        super().__init__()
        self.most = most
        self.pointer = PointerHead(d_hidden, width) if most is None else None
        self.places = None if most is None else nn.Sequential(nn.LayerNorm(d_hidden), nn.Linear(d_hidden, most))
        self.stage = nn.Sequential(nn.LayerNorm(d_hidden), nn.Linear(d_hidden, width))
        self.whole = nn.Sequential(nn.LayerNorm(d_hidden), nn.Linear(d_hidden, width))
        self.count = nn.Linear(COUNT_FEATURES, width)
        self.last = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, hidden: Tensor, batch: Batch) -> Scores:
        """Score the candidates of every step.

        Args:
            hidden: (B, W, K + 1, d_hidden) states of the stages, and the deciding one.
            batch: The observations; with the column ``values``, its candidates are scored, too.
        """
        stages, whole = hidden[:, :, :-1], hidden[:, :, -1:]
        lengths = batch["stages" + LENGTH]
        size = stages.shape[2]
        real = real_of(lengths, size)
        limits = _limits(batch, size)
        points = self._points(stages, whole, real)
        told = self.stage(stages) + self.whole(whole)
        counts = _counts(batch, limits)
        about = _about(batch, lengths, size)
        grid = points[..., None] + self._executors(told[..., None, :], counts, about[..., None, :])
        grid = grid.float().masked_fill(~real[..., None], IMPOSSIBLE)
        if "values" not in batch:
            return Scores(grid, grid.new_zeros(*lengths.shape, 0))
        tried = padded(batch["values"], batch["values" + LENGTH].flatten()).values.unflatten(0, lengths.shape)
        number, executors = tried[..., 0].long().clamp_min(0), tried[..., 1:2]
        point, stage, told_of = (_gather(part, number) for part in (points[..., None], told, about))
        sized = self._executors(stage[..., None, :], executors, told_of[..., None, :])
        there = real_of(batch["values" + LENGTH], tried.shape[2])
        return Scores(grid, (point + sized)[..., 0].float().masked_fill(~there, IMPOSSIBLE))

    def _points(self, stages: Tensor, whole: Tensor, real: Tensor) -> Tensor:
        """Score stages (B, W, K)."""
        if self.pointer is not None:
            scores = self.pointer(whole.flatten(0, 1), stages.flatten(0, 1), real.flatten(0, 1))
            pointed: Tensor = scores.squeeze(1).unflatten(0, stages.shape[:2])
            return pointed.masked_fill(~real, 0.0)
        assert self.places is not None and self.most is not None
        places: Tensor = self.places(whole.squeeze(2))
        return F.pad(places, (0, max(0, stages.shape[2] - self.most)), value=UNREACHABLE)[..., : stages.shape[2]]

    def _executors(self, told: Tensor, counts: Tensor, about: Tensor) -> Tensor:
        """Score numbers of executors (..., L) of stages (..., 1, width); about (..., 1, 5) as `_about` tells."""
        limit, free, supply, unit, advised = about.unbind(-1)
        features = [counts / limit.clamp_min(1), counts / free.clamp_min(1), counts * unit, (supply + counts) * unit]
        features += [torch.log1p(counts) / 3, torch.log1p(supply + counts) / 3]
        useful = torch.minimum(counts, limit)
        same, stage = (useful == advised).float(), (advised > 0).float().expand_as(counts)
        features += [stage, same, stage * torch.log((useful + 1) / (advised + 1))]
        scores: Tensor = self.last(told + self.count(torch.stack(features, dim=-1).to(told.dtype)))
        return scores.squeeze(-1)


def _about(batch: Batch, lengths: Tensor, size: int) -> Tensor:
    """What numbers of executors are compared with (B, W, K, 5).

    The most that the stage can use, those to assign, those of its job, 1 / all, and those of the advice.
    """
    graphs = pack_graphs(batch)
    owner = graphs.job[graphs.numbers(batch["stages"], lengths.flatten())]
    group = group_of(lengths.flatten(), len(owner))
    columns = [
        batch["limits"].float(),
        batch["committable"].flatten()[group].float(),
        # Executors of the source are counted already.
        batch["jobs"].float()[owner, 0] - batch["jobs"].float()[owner, 3] * batch["committable"].flatten()[group],
        1 / _all_executors(batch, graphs)[group],
        _advised(batch, lengths),
    ]
    about: Tensor = padded(torch.stack(columns, dim=-1), lengths.flatten(), size).values.unflatten(0, lengths.shape)
    return about


def _advised(batch: Batch, lengths: Tensor) -> Tensor:
    """Executors that the advice gives to stages (R,), as many as they can use; 0 where it names another stage."""
    stage, count = batch["advice"].flatten(0, 1).unbind(-1)
    flat = lengths.flatten()
    rows = len(batch["limits"])
    group = group_of(flat, rows)
    place = torch.arange(rows, device=flat.device) - (flat.cumsum(0) - flat)[group]
    return torch.minimum(count[group], batch["limits"]).float() * (place == stage[group])


def candidates(batch: Batch, size: int) -> Tensor:
    """Numbers of executors (B, W, K, L) that each of K = ``size`` schedulable stages may be given."""
    return _counts(batch, _limits(batch, size))


def _counts(batch: Batch, limits: Tensor) -> Tensor:
    """Numbers of executors (B, W, K, L) that may be chosen, for stages with limits (B, W, K)."""
    shares = torch.tensor(SHARES, device=limits.device)
    parts = torch.ceil(limits[..., None] * shares - 1e-4).clamp_min(1)
    stage, count = batch["advice"].unbind(-1)
    here = torch.arange(limits.shape[-1], device=limits.device) == stage[..., None]
    advised = torch.where(here, torch.minimum(count[..., None].float(), limits), limits)
    return torch.cat([parts, advised[..., None].clamp_min(1)], dim=-1)


def _limits(batch: Batch, size: int) -> Tensor:
    """Most executors of each schedulable stage (B, W, K)."""
    lengths = batch["stages" + LENGTH]
    limits: Tensor = padded(batch["limits"].float(), lengths.flatten(), size).values.unflatten(0, lengths.shape)
    return limits


def _gather(values: Tensor, number: Tensor) -> Tensor:
    """Take rows (B, W, C, D) of values (B, W, K, D) by number (B, W, C)."""
    return values.gather(2, number.unsqueeze(-1).expand(*number.shape, values.shape[-1]))


def choose(scores: Scores, batch: Batch, flat: Tensor) -> Tensor:
    """Turn numbers of candidates (B, W), of K x L, into actions (B, W, 2)."""
    levels = scores.grid.shape[-1]
    stage, level = flat // levels, flat % levels
    counts = chosen_of(candidates(batch, scores.grid.shape[2]), stage).gather(-1, level[..., None])
    return torch.stack([stage, counts[..., 0].long()], dim=-1)


def loss(scores: Scores, batch: Batch, objective: Objective) -> Tensor:
    """Loss of the real steps: of values of candidates, or of the actions that were taken."""
    real = batch["mask"]
    if objective == "imitation":
        target, known = taken(scores, batch)
        grid = scores.grid.flatten(2)
        known = known & real & _reachable(grid.gather(-1, target[..., None])[..., 0])
        return mean(F.cross_entropy(grid[known], target[known], reduction="none"))
    values, known = known_values(batch)
    known = known & real[..., None] & (batch["advice"][..., :1] >= 0)
    known = known & _reachable(scores.tried) & _reachable(scores.tried[..., :1])
    gains = (values - values[..., :1]).clamp(-GAIN, GAIN)  # the first candidate is the advice
    found = SCALE * (scores.tried - scores.tried[..., :1])
    errors = mean(F.smooth_l1_loss(found[known], gains[known], beta=HUBER, reduction="none"))
    wanted = (gains / TEMPERATURE).masked_fill(~known, IMPOSSIBLE).softmax(-1)
    drawn = (found / TEMPERATURE).masked_fill(~known, IMPOSSIBLE).log_softmax(-1)
    several = real & (known.sum(-1) > 1)
    return errors - mean((wanted * drawn.masked_fill(~known, 0.0)).sum(-1)[several])


def _reachable(scores: Tensor) -> Tensor:
    """Which scores are those of stages that can be chosen."""
    return scores > UNREACHABLE / 2


def known_values(batch: Batch) -> tuple[Tensor, Tensor]:
    """Values of candidates (B, W, C), job-seconds, and which places hold one."""
    if "values" not in batch:
        raise UserError("objective 'values' needs action values, which the pool does not have; collect with --values")
    lengths = batch["values" + LENGTH]
    rows = padded(batch["values"], lengths.flatten()).values.unflatten(0, lengths.shape)
    known = real_of(lengths, rows.shape[2]) & (rows[..., 0] >= 0)  # to leave executors where they are is no candidate
    return rows[..., 2], known


def measure(metrics: MetricCollection, scores: Scores, batch: Batch) -> None:
    """Feed ``accuracy``, the share of recorded actions that score best, and ``regret``.

    The regret is what is lost by the best score among candidates with known values, job-seconds; without values every
    action but the recorded one has a regret of 1.
    """
    target, known = taken(scores, batch)
    hit = (scores.grid.flatten(2).argmax(-1) == target)[batch["mask"] & known].float()
    metrics["accuracy"].update(hit)
    if "values" not in batch:
        metrics["regret"].update(1 - hit)
    else:
        values, known = known_values(batch)
        chosen = scores.tried.masked_fill(~known, IMPOSSIBLE).argmax(-1)
        lost = values.masked_fill(~known, -1e9).amax(-1) - chosen_of(values, chosen)
        metrics["regret"].update(lost[batch["mask"] & known.any(-1)])


def taken(scores: Scores, batch: Batch) -> tuple[Tensor, Tensor]:
    """Number of the candidate, of K x L, that comes nearest to the recorded action (B, W), and where there is one."""
    number, executors = batch["action"].unbind(-1)
    limits = _limits(batch, scores.grid.shape[2])
    stage = number.clamp_min(0)
    counts, limit = chosen_of(_counts(batch, limits), stage), chosen_of(limits, stage)[..., None]
    level = (counts - torch.minimum(executors[..., None].float(), limit)).abs().argmin(-1)
    return stage * scores.grid.shape[-1] + level, number >= 0
