"""The small model at equal supervision: a perceptron that learns hindsight values, without a language model.

Shapes: B batch, W steps, N sessions, L levels.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from netllm_pl.acting import Greedy, Objective, OfflineTask
from netllm_pl.data import Batch
from netllm_pl.errors import at_least
from netllm_pl.task import OptimizerConfig
from tasks.adaptive_bitrate.task import describe, mismeasured, rescaled


class HindsightMLP(OfflineTask):
    """Scores the levels of the next chunk from one observation (which holds the last `history` measurements).

    Args:
        optimizer: AdamW's settings.
        levels: Levels of the bitrate ladder (L).
        history: Samples of history in an observation, as the data gives them.
        lookahead: Chunks whose sizes are seen, as the data gives them; 0 sees the next.
        rescale: In training, standard deviation of the log of a random factor on throughput and sizes of a window.
        noise: In training, largest standard deviation of the log of random factors on what is measured.
        objective: Learn hindsight values (``values``), or the actions of the experience (``imitation``).
        width: Size of the hidden layers.
        depth: Hidden layers.
        rollout_every: Validations between two evaluations by rollout.
    """

    monitor = "val/qoe"
    monitor_mode = "max"

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        levels: int = 6,
        history: int = 10,
        lookahead: int = 5,
        rescale: float = 0.2,
        noise: float = 0.0,
        objective: Objective = "values",
        width: int = 256,
        depth: int = 2,
        rollout_every: int = 1,
    ) -> None:
        super().__init__(None, optimizer)
        at_least(0, "model.", noise=noise)
        self.levels, self.history, self.lookahead, self.rescale = levels, history, lookahead, rescale
        self.noise = noise
        self.objective, self.rollout_every = objective, rollout_every
        sizes = [(1 + max(1, lookahead)) * levels + 4 * history + 4] + [width] * depth
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], levels))

    def forward(self, batch: Batch) -> Tensor:
        """Score the levels (B, W, L)."""
        rows = describe(batch, self.levels, self.history, self.lookahead)
        features = torch.cat([part.flatten(1) for part in rows.values()], dim=1)
        scores: Tensor = self.layers(features).unflatten(0, batch["level"].shape)
        return scores

    def augment(self, batch: Batch) -> Batch:
        """Vary how large chunks are for their nominal bitrate, and what is measured."""
        return mismeasured(rescaled(batch, self.rescale), self.noise)

    def as_policy(self) -> Greedy:
        """Act in an environment."""
        return Greedy(self)
