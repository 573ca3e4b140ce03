"""What every encoder returns.

Shapes: B batch, T tokens, d_model size of a token vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from netllm_pl.ragged import group_of, real_of, starts_of


class Tokens(NamedTuple):
    """Token-like vectors.

    Attributes:
        values: (B, T, d_model) float.
        mask: (B, T) bool, True at real tokens; None if all are.
    """

    values: Tensor
    mask: Tensor | None = None


def join(parts: Sequence[Tokens]) -> Tokens:
    """Put token groups one behind the other into one sequence."""
    values = torch.cat([part.values for part in parts], dim=1)
    if all(part.mask is None for part in parts):
        return Tokens(values)
    masks = [torch.ones_like(p.values[..., 0], dtype=torch.bool) if p.mask is None else p.mask for p in parts]
    return Tokens(values, torch.cat(masks, dim=1))


def padded(rows: Tensor, counts: Tensor, size: int | None = None) -> Tokens:
    """Put rows that lie one behind the other side by side, a group a line.

    Args:
        rows: (R, ...) of any type.
        counts: (G,) rows of each group; they sum to R.
        size: Length of a line (S), at least the largest group, which null takes.

    Returns:
        (G, S, ...) values, zero at padding, and the mask (G, S); ``values[mask]`` are the rows again.
    """
    if size is None:
        size = int(counts.max()) if len(counts) else 0
    group = group_of(counts, len(rows))
    place = torch.arange(len(rows), device=counts.device) - starts_of(counts)[group]
    values = rows.new_zeros(len(counts), size, *rows.shape[1:]).index_put((group, place), rows)
    return Tokens(values, real_of(counts, size))


class TokenNorm(nn.LayerNorm):
    """Layer norm that starts at the root mean square of the language model's own word vectors.

    Args:
        d_model: Size of a token vector.
        scale: `Backbone.token_scale`.
    """

    def __init__(self, d_model: int, scale: float = 1.0) -> None:
        super().__init__(d_model)
        nn.init.constant_(self.weight, scale)
