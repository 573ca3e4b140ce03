"""Sessions whose client measures badly, to see what policies do then.

Shapes: N sessions side by side, H samples of history.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tasks.adaptive_bitrate.simulator import Floats, Ints, Observations, Rules, Simulator, Traces, Video


class NoisySimulator(Simulator):
    """A `Simulator` that tells wrong throughputs and times of download, the same ones in a session every time.

    Args:
        noise: Standard deviation of the logarithm of the factor on each measured throughput; its inverse is that on the
            time.
        traces: Bandwidths.
        video: What is streamed.
        rules: How, and what it is worth.
        mode: Whether anything else is random.
        history: Samples of history in an observation (H).
        lookahead: Chunks whose sizes are in an observation.
    """

    def __init__(
        self,
        noise: float,
        traces: Traces,
        video: Video,
        rules: Rules | None = None,
        mode: Literal["fixed", "random"] = "fixed",
        history: int = 10,
        lookahead: int = 0,
    ) -> None:
        super().__init__(traces, video, rules, mode, history, lookahead)
        self.noise = noise

    def reset(self, seeds: Sequence[int] | Ints) -> Observations:
        """Start sessions, as a `Simulator` does."""
        self._randoms = [np.random.default_rng([int(seed), 9]) for seed in seeds]
        self._factors = np.ones((len(seeds), self.history))
        return super().reset(seeds)

    def step(self, levels: Ints) -> tuple[Observations, Floats, npt.NDArray[np.bool_], dict[str, npt.NDArray[Any]]]:
        """Download a chunk, as a `Simulator` does, and measure it badly."""
        observations, reward, over, info = super().step(levels)
        drawn = np.exp([self.noise * random.standard_normal() for random in self._randoms])
        self._factors = np.concatenate([self._factors[:, 1:], drawn[:, None]], axis=1)
        observations["throughput"] *= self._factors
        observations["delay_s"] /= self._factors
        return observations, reward, over, info
