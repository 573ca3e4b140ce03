"""Hand-written and published bitrate policies by name.

Shapes: N sessions, L levels, H samples of history.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from netllm_pl.errors import UserError, unknown
from netllm_pl.rollout import Policy
from tasks.adaptive_bitrate.mpc import RobustMPC, harmonic_means
from tasks.adaptive_bitrate.simulator import Ints, Observations, Rules, Video

PENSIEVES = ("genet", "udr_1", "udr_real")
NAMES = (
    "bba",
    "robust_mpc",
    "robust_mpc_published",
    "rate",
    "bola",
    "constant",
    *(name + way for name in PENSIEVES for way in ("", "_argmax")),
)


class BBA:
    """Maps the buffer linearly to a level (Huang et al., SIGCOMM 2014).

    Args:
        video: What is streamed.
        reservoir_s: Below this buffer the lowest level is taken.
        cushion_s: This much above it, the highest; levels between are rounded down.
    """

    def __init__(self, video: Video, reservoir_s: float = 5.0, cushion_s: float = 10.0) -> None:
        if cushion_s <= 0:
            raise UserError(f"BBA: cushion_s {cushion_s} must be above 0")
        self.top, self.reservoir_s, self.cushion_s = len(video.ladder_kbps) - 1, reservoir_s, cushion_s

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    def act(self, observations: Observations) -> Ints:
        """Choose levels (N,)."""
        level = self.top * (observations["buffer_s"] - self.reservoir_s) / self.cushion_s
        return np.asarray(np.clip(level, 0, self.top).astype(np.int64))


class Rate:
    """The highest level whose nominal bitrate is not above the harmonic mean of measured throughput.

    Args:
        video: What is streamed.
        samples: Measurements in the mean.
    """

    def __init__(self, video: Video, samples: int = 5) -> None:
        self.ladder, self.samples = video.ladder_kbps, samples

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    def act(self, observations: Observations) -> Ints:
        """Choose levels (N,)."""
        kbps = harmonic_means(observations["throughput"], self.samples) * 8000.0
        return np.asarray(np.maximum(np.searchsorted(self.ladder, kbps, side="right") - 1, 0))


class Bola:
    """BOLA-BASIC: the level with most utility a byte, given the buffer (Spiteri et al., INFOCOM 2016, eq. 8).

    Utility of a level is the logarithm of its nominal size over the lowest one's.

    Args:
        video: What is streamed.
        gp: Worth of playing without stalls, in units of utility (the authors' gamma p).
        buffer_s: Buffer at which the highest level stops to be worth it.
    """

    def __init__(self, video: Video, gp: float = 2.0, buffer_s: float = 40.0) -> None:
        if gp <= 0 or buffer_s <= video.chunk_s:
            raise UserError(f"BOLA: gp {gp} must be above 0 and buffer_s {buffer_s} above a chunk's {video.chunk_s} s")
        self.size = video.ladder_kbps / video.ladder_kbps[0]
        utility = np.log(self.size)
        control = (buffer_s - video.chunk_s) / (utility[-1] + gp)
        self.worth_s = control * (utility + gp)

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    def act(self, observations: Observations) -> Ints:
        """Choose levels (N,)."""
        score = (self.worth_s - observations["buffer_s"][:, None]) / self.size
        return np.asarray(score.argmax(axis=1))


class Constant:
    """Always the same level.

    Args:
        video: What is streamed.
        level: Which one.
    """

    def __init__(self, video: Video, level: int = 0) -> None:
        if not 0 <= level < len(video.ladder_kbps):
            raise UserError(f"constant: level {level} is not one of 0 to {len(video.ladder_kbps) - 1}")
        self.level = level

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    def act(self, observations: Observations) -> Ints:
        """Choose levels (N,)."""
        return np.full(len(observations["level"]), self.level)


def build(name: str, video: Video, rules: Rules, weights_dir: Path | None = None, seed: int = 0) -> Policy:
    """Make a policy.

    Args:
        name: One of `NAMES`; a Pensieve name alone draws its actions, with ``_argmax`` it takes the likeliest.
        video: What is streamed.
        rules: How, and what it is worth.
        weights_dir: Folder with ``genet.npz``, ``udr_1.npz`` and ``udr_real.npz``.
        seed: Of what is drawn.

    Raises:
        UserError: The name is unknown, or weights are missing or do not fit the video.
    """
    plain = name.removesuffix("_argmax")
    if name in NAMES and plain in PENSIEVES:
        return _pensieve(plain, video, weights_dir, sample=name == plain, seed=seed)
    policies: dict[str, Callable[[], Policy]] = {
        "bba": lambda: BBA(video),
        "robust_mpc": lambda: RobustMPC(video, rules),
        "robust_mpc_published": lambda: RobustMPC(video, rules, any_jump=False, right_index=False, carry=True),
        "rate": lambda: Rate(video),
        "bola": lambda: Bola(video),
        "constant": lambda: Constant(video),
    }
    if name not in policies:
        raise unknown("policy", name, NAMES)
    return policies[name]()


def _pensieve(name: str, video: Video, weights_dir: Path | None, sample: bool, seed: int) -> Policy:
    from tasks.adaptive_bitrate.pensieve import Pensieve, load_pensieve  # imported late: torch takes seconds

    if weights_dir is None:
        raise UserError(f"policy '{name}' needs the published weights: set weights_dir to the folder with {name}.npz")
    return Pensieve(load_pensieve(weights_dir / f"{name}.npz"), video, sample, seed)
