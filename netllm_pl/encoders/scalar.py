"""One token for each vector of plain numbers."""

from torch import Tensor, nn

from netllm_pl.encoders.tokens import TokenNorm, Tokens
from netllm_pl.errors import at_least


class ScalarEncoder(nn.Module):
    """Two linear layers from a few numbers to a token.

    Args:
        features: How many numbers make one token.
        d_model: Size of a token vector.
        width: Size of the hidden layer.
        scale: Root mean square of the tokens at the start (`Backbone.token_scale`).
    """

    def __init__(self, features: int, d_model: int, width: int = 128, scale: float = 1.0) -> None:
        super().__init__()
        at_least(1, "ScalarEncoder: ", features=features, width=width)
        self.layers = nn.Sequential(
            nn.Linear(features, width), nn.GELU(), nn.Linear(width, d_model), TokenNorm(d_model, scale)
        )

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        """Encode (B, T, features) numbers, mask (B, T) bool, to (B, T, d_model) tokens."""
        return Tokens(self.layers(values), mask)
