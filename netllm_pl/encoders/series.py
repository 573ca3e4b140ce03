"""A time series as tokens: a 1-D convolutional network."""

from itertools import pairwise

from torch import Tensor, nn

from netllm_pl.encoders.tokens import TokenNorm, Tokens
from netllm_pl.errors import at_least


class SeriesEncoder(nn.Module):
    """Stacked 1-D convolutions; one token for every `stride` samples.

    Args:
        channels: Numbers per sample.
        d_model: Size of a token vector.
        width: Channels of the hidden layers.
        kernel: Odd kernel size, in samples.
        depth: Convolutions before the last.
        stride: Samples per token; 1 keeps one token a sample.
        scale: Root mean square of the tokens at the start (`Backbone.token_scale`).
    """

    def __init__(
        self,
        channels: int,
        d_model: int,
        width: int = 128,
        kernel: int = 3,
        depth: int = 2,
        stride: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        at_least(1, "SeriesEncoder: ", channels=channels, width=width, kernel=kernel, stride=stride)
        sizes = [channels] + [width] * depth
        self.stride = stride
        self.layers = nn.ModuleList(nn.Conv1d(a, b, kernel, padding=kernel // 2) for a, b in pairwise(sizes))
        self.activation = nn.GELU()
        self.last = nn.Conv1d(sizes[-1], d_model, stride, stride=stride)
        self.norm = TokenNorm(d_model, scale)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tokens:
        """Encode a series.

        Args:
            values: (B, T, channels) float, T a multiple of the stride.
            mask: (B, T) bool, True at real samples; padded samples do not influence real ones.

        Returns:
            (B, T / stride, d_model) tokens; a token is real if any of its samples is.
        """
        padded = None if mask is None else ~mask.unsqueeze(1)
        hidden = values.transpose(1, 2)
        for layer in self.layers:
            hidden = self.activation(layer(hidden if padded is None else hidden.masked_fill(padded, 0.0)))
        hidden = self.last(hidden if padded is None else hidden.masked_fill(padded, 0.0))
        real = None if mask is None else mask.unflatten(1, (-1, self.stride)).any(-1)
        return Tokens(self.norm(hidden.transpose(1, 2)), real)
