"""One streaming session with Gymnasium's interface."""

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from tasks.adaptive_bitrate.simulator import Observations, Rules, Simulator, Traces, Video


class AdaptiveBitrateEnv(gymnasium.Env[dict[str, Any], np.int64]):
    """A session of the `Simulator`: an action is the level of the next chunk.

    Observations are those of `Simulator.reset` without their first axis; ``info`` holds what `Simulator.step` says of
    the chunk, as numbers. The first chunk is downloaded by ``reset``. An episode ends with the video and is never cut.

    Args:
        traces: Bandwidths.
        video: What is streamed.
        rules: How, and what it is worth.
        mode: Whether anything is random.
        history: Samples of history in an observation (H).
    """

    metadata = {"render_modes": []}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(
        self,
        traces: Traces,
        video: Video,
        rules: Rules | None = None,
        mode: Literal["fixed", "random"] = "fixed",
        history: int = 10,
    ) -> None:
        self.simulator = simulator = Simulator(traces, video, rules, mode, history)

        def numbers(*shape: int, low: float = 0.0) -> spaces.Box:
            return spaces.Box(low, np.inf, shape, np.float64)

        self.action_space = spaces.Discrete(simulator.levels)
        self.observation_space = spaces.Dict(
            {
                "level": spaces.Discrete(simulator.levels),
                "buffer_s": numbers(),
                "throughput": numbers(history),
                "delay_s": numbers(history),
                "next_bytes": spaces.Box(0, np.iinfo(np.int64).max, (simulator.levels,), np.int64),
                "chunk": spaces.Discrete(simulator.chunks + 1),
                "chunks_left": spaces.Discrete(simulator.chunks + 1),
                "reward": numbers(low=-np.inf),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start a session.

        Args:
            seed: Number of the session: in fixed mode the trace (modulo their number); in random mode trace, start and
                noise follow from it. Without one, the number is drawn from the environment's own generator.
            options: ``{"session": number}`` starts that session and leaves the generator as it is.

        Returns:
            The observation after the first chunk, and what happened to that chunk.
        """
        super().reset(seed=seed)
        session = (options or {}).get("session", seed)
        if session is None:
            session = int(self.np_random.integers(2**31))
        return _alone(self.simulator.reset([session])), _alone(self.simulator.first)

    def step(self, action: np.int64) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Download the next chunk.

        Args:
            action: Its level, 0 to L - 1.

        Returns:
            Observation, reward, whether the video is over, False, and what happened.
        """
        observations, rewards, over, info = self.simulator.step(np.array([action], dtype=np.int64))
        return _alone(observations), float(rewards[0]), bool(over[0]), False, _alone(info)


def _alone(batch: Observations) -> dict[str, Any]:
    """Drop the first axis; real numbers stay arrays, which is what `spaces.Box` holds."""
    return {
        name: values[0] if values.ndim > 1 or values.dtype.kind == "i" else np.array(values[0])
        for name, values in batch.items()
    }
