"""Networking heads: each reads hidden states and gives an answer that is valid by construction.

Shapes: B batch, T positions, H size of a hidden state, C choices, N candidates.
"""

import math

import torch
from torch import Tensor, nn

from netllm_pl.errors import at_least

IMPOSSIBLE = torch.finfo(torch.float32).min
"""Score of a choice that is not allowed: finite, so that a softmax over a masked row has gradients without NaN."""


class RegressionHead(nn.Module):
    """Real numbers for each position, such as one step of a horizon.

    It starts at zero, so a task that predicts a change starts from "nothing changes".

    Args:
        d_hidden: Size of a hidden state.
        outputs: Numbers per position.
        width: Size of a hidden layer; None is a single linear layer.
    """

    def __init__(self, d_hidden: int, outputs: int, width: int | None = None) -> None:
        super().__init__()
        at_least(1, "RegressionHead: ", outputs=outputs, width=width)
        hidden = [] if width is None else [nn.Linear(d_hidden, width), nn.GELU()]
        last = nn.Linear(width or d_hidden, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.LayerNorm(d_hidden), *hidden, last)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, T, H) to (B, T, outputs); positions that mask (B, T) rules out give 0."""
        values: Tensor = self.layers(hidden)
        return values if mask is None else values * mask.unsqueeze(-1)


class ChoiceHead(nn.Module):
    """Logits over a fixed set of choices, those that are not allowed masked.

    Args:
        d_hidden: Size of a hidden state.
        choices: How many there are.
        width: Size of a hidden layer; None is a single linear layer.
    """

    def __init__(self, d_hidden: int, choices: int, width: int | None = None) -> None:
        super().__init__()
        at_least(1, "ChoiceHead: ", choices=choices, width=width)
        hidden = [] if width is None else [nn.Linear(d_hidden, width), nn.GELU()]
        self.layers = nn.Sequential(nn.LayerNorm(d_hidden), *hidden, nn.Linear(width or d_hidden, choices))

    def forward(self, hidden: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Map (B, T, H) to (B, T, C) logits; allowed (B, T, C) bool, at least one a position."""
        return _mask(self.layers(hidden), allowed)


class PointerHead(nn.Module):
    """Scores the candidates themselves, any number of them (Vinyals et al., 2015, arXiv:1506.03134).

    Args:
        d_hidden: Size of a hidden state, of the query and of the candidates.
        width: Size in which they are compared.
    """

    def __init__(self, d_hidden: int, width: int = 128) -> None:
        super().__init__()
        at_least(1, "PointerHead: ", width=width)
        self.query = nn.Sequential(nn.LayerNorm(d_hidden), nn.Linear(d_hidden, width))
        self.key = nn.Sequential(nn.LayerNorm(d_hidden), nn.Linear(d_hidden, width))
        self.scale = 1 / math.sqrt(width)

    def forward(self, hidden: Tensor, candidates: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Score candidates.

        Args:
            hidden: (B, T, H) states of the positions that decide.
            candidates: (B, N, H) states of the candidates.
            allowed: (B, N) or (B, T, N) bool, at least one a position.

        Returns:
            (B, T, N) logits.
        """
        scores = self.query(hidden) @ self.key(candidates).transpose(1, 2) * self.scale
        if allowed is not None and allowed.dim() == 2:
            allowed = allowed.unsqueeze(1)
        return _mask(scores, allowed)


def _mask(logits: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return logits
    return logits.float().masked_fill(~allowed, IMPOSSIBLE)
