"""The tokens of steps: how they follow each other, where each stands, and which of them a token sees.

Shapes: B batch, W steps, K tokens a step, S state tokens a step, T tokens of a sequence, Q of them new.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from netllm_pl.encoders import padded
from netllm_pl.ragged import real_of

BEHIND = 2**31 - 1
"""Rank of what comes behind all state tokens of a step."""
TRIED = 4
"""Lengths of rows that are tried."""


class StepTokens(NamedTuple):
    """State tokens of every step; the last one, which must be real, decides.

    Attributes:
        values: (B, W, S, d_model) float.
        mask: (B, W, S) bool, True at real tokens: nobody sees the others. None if all are.
        places: (S,) int64, on the CPU: where each stands within the step. Tokens of a set share a place, so that
            positions do not depend on how many there are, nor on padding. None counts them.
        both_ways: Whether all state tokens of a step see each other; otherwise each sees those before it.
    """

    values: Tensor
    mask: Tensor | None = None
    places: Tensor | None = None
    both_ways: bool = False

    @property
    def width(self) -> int:
        """How many places the state of a step has."""
        return self.values.shape[2] if self.places is None else int(self.places.max()) + 1


class TokenSet(NamedTuple):
    """Tokens of steps that differ in how many they have; those of a step share a place.

    Attributes:
        rows: (R, d_model) tokens of all steps, one behind the other.
        lengths: (B, W) how many each step has; they sum to R.
    """

    rows: Tensor
    lengths: Tensor


def join_tokens(parts: Sequence[Tensor | TokenSet], both_ways: bool = False) -> StepTokens:
    """Put the state tokens of steps one behind the other.

    Args:
        parts: Tokens (B, W, k, d_model) that every step has, each at its own place, and sets. The last token decides.
        both_ways: Whether all of them see each other.
    """
    values: list[Tensor] = []
    masks: list[Tensor] = []
    places: list[int] = []
    place = 0
    for part in parts:
        if isinstance(part, TokenSet):
            line = padded(part.rows, part.lengths.flatten()).values
            values.append(line.unflatten(0, part.lengths.shape))
            masks.append(real_of(part.lengths, line.shape[1]))
            places += [place] * line.shape[1]
            place += 1
        else:
            values.append(part)
            masks.append(torch.ones(part.shape[:-1], dtype=torch.bool, device=part.device))
            places += range(place, place + part.shape[2])
            place += part.shape[2]
    return StepTokens(torch.cat(values, 2), torch.cat(masks, 2), torch.tensor(places), both_ways)


@dataclass(frozen=True)
class Part:
    """Tokens that each step has next to each other.

    Attributes:
        values: (B, W, K, d_model) float.
        real: (B, W, K) bool; None if all are.
        ranks: (K,) int64; within a step a token sees those of no higher rank.
        positions: (B, W, K) int64 place of each token in its sequence.
    """

    values: Tensor
    real: Tensor | None
    ranks: Tensor
    positions: Tensor

    def apart(self) -> "Part":
        """Make each step a sequence of its own: (B W, 1, K, ...)."""
        real = None if self.real is None else self.real.flatten(0, 1).unsqueeze(1)
        return Part(self.values.flatten(0, 1).unsqueeze(1), real, self.ranks, self.positions.flatten(0, 1).unsqueeze(1))


@dataclass(frozen=True)
class Line:
    """Tokens in the order in which the language model reads them.

    Attributes:
        values: (B, T, d_model) float.
        real: (B, T) bool; None if all are.
        ranks: (T,) int64; within a step a token sees those of no higher rank.
        steps: (T,) int64 step of each token.
        positions: (B, T) int64.
    """

    values: Tensor
    real: Tensor | None
    ranks: Tensor
    steps: Tensor
    positions: Tensor

    def __len__(self) -> int:
        """Number of tokens of a sequence (T)."""
        return len(self.steps)

    def last(self, keep: int) -> "Line":
        """Drop all tokens but the last ones."""
        begin = len(self) - keep
        real = None if self.real is None else self.real[:, begin:]
        return Line(self.values[:, begin:], real, self.ranks[begin:], self.steps[begin:], self.positions[:, begin:])

    def without_values(self) -> "Line":
        """Keep only what says who sees whom."""
        return replace(self, values=self.values[..., :0])


def lay_out(parts: Sequence[Part], first: int = 0) -> Line:
    """Put the parts of each step, and the steps, one behind the other.

    Args:
        parts: In the order of the tokens of a step.
        first: Number of the first step.
    """
    values = torch.cat([part.values for part in parts], dim=2)
    steps, count = values.shape[1:3]
    numbers = first + torch.arange(steps, device=values.device).repeat_interleave(count)
    real = _join([part.real for part in parts], [part.values for part in parts], dim=2)
    return Line(
        values.flatten(1, 2),
        None if real is None else real.flatten(1),
        torch.cat([part.ranks for part in parts]).repeat(steps),
        numbers,
        torch.cat([part.positions for part in parts], dim=2).flatten(1),
    )


def follow(lines: Sequence[Line]) -> Line:
    """Put lines of the same batch one behind the other."""
    return Line(
        torch.cat([line.values for line in lines], dim=1),
        _join([line.real for line in lines], [line.values for line in lines], dim=1),
        torch.cat([line.ranks for line in lines]),
        torch.cat([line.steps for line in lines]),
        torch.cat([line.positions for line in lines], dim=1),
    )


def visible(new: Line, line: Line, context: int) -> Tensor:
    """Say which tokens each new token sees: real ones of the last `context` steps, its own included, none later.

    Args:
        new: The tokens that look (Q).
        line: All tokens (T); the last Q are the new ones.
        context: Steps.

    Returns:
        (B or 1, 1, Q, T) bool. Each token sees itself, so that padding does not give NaN.
    """
    ahead = new.steps[:, None] - line.steps[None]
    seen = (ahead > 0) | ((ahead == 0) & (line.ranks[None] <= new.ranks[:, None]))
    seen = (seen & (ahead < context))[None, None]
    if line.real is None:
        return seen
    own = torch.ones(len(new), len(line), dtype=torch.bool, device=seen.device).triu(len(line) - len(new))
    own = own.tril(len(line) - len(new))
    return (seen & line.real[:, None, None]) | own


class Packed(NamedTuple):
    """Sequences of different lengths side by side in fewer rows: R rows of P tokens.

    Attributes:
        values: (R, P, d_model) float, zero behind the last token of a row.
        seen: (R, 1, P, P) bool, which tokens each token sees: those of its own sequence that `visible` allows.
        positions: (R, P) int64.
        places: (B, T) int64 where each token lies among the R P; padding lies anywhere.
    """

    values: Tensor
    seen: Tensor
    positions: Tensor
    places: Tensor


def pack(line: Line, context: int, least: int = 32) -> Packed:
    """Leave out padding, and put sequences next to each other that do not see each other.

    Args:
        line: Tokens, of which some are padding.
        context: Steps that a token sees, its own included.
        least: Rows are as long as the longest sequence, and at least so long: short ones find place side by side.
    """
    assert line.real is not None
    lengths = line.real.sum(1)
    counts = lengths.tolist()
    size = max(least, *counts)
    # On a CPU all places cost. In training they are few beside the others, and new lengths would compile layers again.
    if lengths.device.type == "cpu" and not torch.is_grad_enabled():
        size = tight(counts, size)
    row, start = torch.tensor(fill(counts, size), device=lengths.device)
    places = (row * size + start)[:, None] + (line.real.cumsum(1) - 1).clamp_min(0)
    kept = line.real.flatten().nonzero()[:, 0]  # once: each time a GPU is waited for
    where, total = places.flatten()[kept], (int(row.max()) + 1) * size

    def moved(values: Tensor, empty: int = 0) -> Tensor:
        laid = values.new_full((total, *values.shape[2:]), empty).index_put((where,), values.flatten(0, 1)[kept])
        rows: Tensor = laid.unflatten(0, (-1, size))
        return rows

    shape = line.real.shape
    owners = moved(torch.arange(shape[0], device=lengths.device)[:, None].expand(shape), -1)
    steps, ranks = moved(line.steps.expand(shape)), moved(line.ranks.expand(shape))
    ahead = steps[:, :, None] - steps[:, None]
    seen = (ahead > 0) | ((ahead == 0) & (ranks[:, None] <= ranks[:, :, None]))
    seen = seen & (ahead < context) & (owners[:, :, None] == owners[:, None])
    return Packed(moved(line.values), seen[:, None], moved(line.positions), places)


def tight(lengths: Sequence[int], size: int) -> int:
    """Return the shortest rows, of the few lengths that are tried, in which sequences take no more rows than of `size`.

    Args:
        lengths: Of the sequences.
        size: At least the longest one's.
    """
    rows = max(fill(lengths, size)[0]) + 1
    least = max(*lengths, -(-sum(lengths) // rows))
    tried = range(least, size, max(1, (size - least) // TRIED))
    return next((shorter for shorter in tried if max(fill(lengths, shorter)[0]) < rows), size)


def fill(lengths: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """Put sequences into rows, the longest first, each where it leaves the least room (best fit).

    Returns:
        Row of each sequence, and where in its row it begins.
    """
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    count = 0
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        length = lengths[number]
        room = next((room for room in range(length, size) if with_room[room]), size)
        if room == size:
            with_room[size].append(count)
            count += 1
        rows[number], starts[number] = with_room[room].pop(), size - room
        with_room[room - length].append(rows[number])
    return rows, starts


def _join(masks: Sequence[Tensor | None], values: Sequence[Tensor], dim: int) -> Tensor | None:
    """Join masks where at least one says anything."""
    if all(mask is None for mask in masks):
        return None
    every = [
        torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device) if mask is None else mask
        for mask, value in zip(masks, values, strict=True)
    ]
    return torch.cat(every, dim=dim)
