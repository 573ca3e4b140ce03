"""Columns whose length differs between steps, such as the nodes of a graph, in one layout everywhere.

A ragged column of a batch is two entries: ``<name>`` has the values of all steps one behind the other, window by
window, and ``<name>_length`` (B, W) says how many belong to each step, 0 at padding. `netllm_pl.experience.Windows`
gives it so, and `observed` turns what an environment shows into it.

Shapes: B windows of W steps, or G groups in their place; R rows of all of them together, N episodes side by side.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from netllm_pl.data import Batch
from netllm_pl.rollout import Array, Observations

LENGTH = "_length"


def as_tensor(values: Array) -> Tensor:
    """Floats as float32, bits as bool, integers as int64."""
    kind = np.float32 if values.dtype.kind == "f" else np.bool_ if values.dtype.kind == "b" else np.int64
    return torch.from_numpy(np.ascontiguousarray(values, kind))


def observed(observations: Observations, device: torch.device | str | None = None) -> Batch:
    """Turn what an environment shows at a step into windows of one step.

    Args:
        observations: Arrays (N, ...) by name; those that differ in length between episodes are object arrays (N,) of
            arrays, which become ragged columns.
        device: Where the tensors go.

    Returns:
        Fixed columns (N, 1, ...) in their own types; ragged ones as `Windows` gives them, lengths (N, 1).
    """
    batch: Batch = {}
    for name, value in observations.items():
        if value.dtype == object:
            lengths = np.fromiter(map(len, value), np.int64, len(value))
            batch[name] = as_tensor(np.concatenate(list(value))).to(device)
            batch[name + LENGTH] = torch.as_tensor(lengths, device=device)[:, None]
        else:
            batch[name] = torch.as_tensor(value, device=device)[:, None]
    return batch


def group_of(counts: Tensor, rows: int) -> Tensor:
    """Group number (R,) of each row, from the rows of each group (G,); ``rows`` (R) is their sum."""
    return torch.repeat_interleave(counts, output_size=rows)


def counts_of(group: Tensor, groups: int) -> Tensor:
    """Rows of each group (G,), from the group number (R,) of each row; unlike `torch.bincount`, it waits for no GPU."""
    return group.new_zeros(groups).index_add(0, group, torch.ones_like(group))


def starts_of(counts: Tensor) -> Tensor:
    """First row (G,) of each group, from the rows of each group (G,)."""
    return counts.cumsum(0) - counts


def real_of(lengths: Tensor, size: int) -> Tensor:
    """Which of ``size`` places (..., size) hold something, where so many (...) do."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def join_steps(parts: Sequence[Batch]) -> Batch:
    """Put windows of the same episodes one behind the other in time: (B, V, ...) and (B, W, ...) to (B, V + W, ...)."""
    joined: Batch = {}
    for name, first in parts[0].items():
        columns = [part[name] for part in parts]
        if name + LENGTH in parts[0]:
            counts = [part[name + LENGTH].sum(1) for part in parts]
            line = torch.stack(counts, 1).flatten()  # rows of each episode and part, in the order they must have
            rows, width = torch.cat(columns), len(parts)
            place = starts_of(torch.cat(counts)).view(width, -1).T.flatten()  # where they begin in `rows`
            group = group_of(line, len(rows))
            joined[name] = rows[torch.arange(len(rows), device=first.device) + (place - starts_of(line))[group]]
        else:
            joined[name] = torch.cat(columns, dim=1)
    return joined


def select(batch: Batch, rows: slice) -> Batch:
    """Take some of the windows (B, ...) of a batch, with their part of ragged columns."""
    chosen: Batch = {}
    for name, value in batch.items():
        if name + LENGTH in batch:
            counts = batch[name + LENGTH].sum(1)
            kept = torch.zeros_like(counts, dtype=torch.bool)
            kept[rows] = True
            chosen[name] = value[kept[group_of(counts, len(value))]]
        else:
            chosen[name] = value[rows]
    return chosen


def take(batch: Batch, steps: Tensor) -> Batch:
    """Take some of the steps (R,) of ragged columns whose lengths are (R,), and of others (R, ...)."""
    chosen: Batch = {}
    for name, value in batch.items():
        counts = batch.get(name + LENGTH)
        if counts is None:
            chosen[name] = value[steps]
        else:
            kept = counts[steps]
            group = torch.repeat_interleave(kept)
            place = torch.arange(len(group), device=value.device) + (starts_of(counts)[steps] - starts_of(kept))[group]
            chosen[name] = value[place]
    return chosen
