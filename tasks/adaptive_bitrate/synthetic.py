"""Built-in generators of bandwidth traces, so that everything runs without data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from netllm_pl.data import SPLITS
from netllm_pl.errors import UserError, unknown
from tasks.adaptive_bitrate.simulator import Floats, Traces
from tasks.adaptive_bitrate.traces import check_traces

STEP_S = (0.1, 3.5)
"""Range of the time between two samples of a walk."""
HOLD = 3
"""A value of a walk is held for at most this many samples."""
LEVELS = 24
"""States of the Markov chain, equally spaced in the logarithm."""
OFTEN = (0.005, 0.12)
"""Range over traces of the chance that a Markov chain leaves its state in a second."""
SPREAD = (0.12, 0.65)
"""Range over traces of the parameter of the geometric distribution of its moves: small is far."""
RIPPLE = (0.01, 0.13)
"""Range over traces of the relative standard deviation within a state."""


@dataclass(frozen=True)
class SyntheticTraces:
    """Number and character of generated traces.

    Attributes:
        kind: ``walk`` draws values that are held for 1 to 3 steps, each 0.1 to 3.5 s long, as Genet's generator does
            (Xia et al., SIGCOMM 2022): fast links that change all the time. ``markov`` has a slow link with a level of
            its own that it leaves and comes back to, in steps of 1 s or means over 5 s, as FCC links do.
        traces: Number of traces in each split.
        duration_s: A trace ends at the first sample at or after this.
        low: Lowest value, Mbit/s; for ``markov`` lowest state.
        high: Highest value, Mbit/s; for ``markov`` highest state.
        seed: Equal seeds give equal traces; splits share none.
    """

    kind: Literal["walk", "markov"] = "walk"
    traces: int = 100
    duration_s: float = 250.0
    low: float = 0.2
    high: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that make no traces.

        Raises:
            UserError: A value is out of its range.
        """
        if self.kind not in ("walk", "markov"):
            raise unknown("kind of synthetic traces", self.kind, ("walk", "markov"))
        for name, least in (("traces", 1), ("duration_s", 10), ("low", 0.01), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"synthetic.{name}: {getattr(self, name)} is too small; expected {least} or more")
        if not self.low < self.high < float("inf"):
            raise UserError(f"synthetic.high: {self.high} must be above synthetic.low, {self.low}, and finite")


def generate(config: SyntheticTraces, split: str) -> Traces:
    """Make the traces of a split, each with a random start pointer.

    Args:
        config: How many, and which.
        split: train, valid or test.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    # One stream a trace: the first ten of a hundred traces are the ten of ten.
    seeds = np.random.SeedSequence(config.seed, spawn_key=(SPLITS.index(split),)).spawn(config.traces)
    make = _walk if config.kind == "walk" else _markov
    samples, pointers = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        samples.append(make(config, rng))
        pointers.append(int(rng.integers(1, len(samples[-1]))))
    names = np.array([f"{config.kind}-{split}-{k}" for k in range(config.traces)])
    starts = np.cumsum([0, *map(len, samples)], dtype=np.int64)
    flat = np.concatenate(samples)
    traces = Traces(names, names, starts, flat[:, 0].copy(), flat[:, 1].copy(), np.array(pointers, dtype=np.int64))
    return check_traces(traces, lambda row: f"synthetic traces, row {row}")


def _walk(config: SyntheticTraces, rng: np.random.Generator) -> Floats:
    """Samples (P, 2) of seconds and Mbit/s."""
    rows: list[tuple[float, float]] = []
    time, left, value = 0.0, 0, 0.0
    while time < config.duration_s:
        if left == 0:
            left, value = int(rng.integers(1, HOLD + 1)), rng.uniform(config.low, config.high)
        left -= 1
        time += rng.uniform(*STEP_S)
        rows.append((time, value))
    return np.array(rows)


def _markov(config: SyntheticTraces, rng: np.random.Generator) -> Floats:
    """Samples (P, 2) of seconds and Mbit/s.

    Pensieve's synthetic traces (Mao et al., SIGCOMM 2017, section 5.3) move between levels by a geometric distribution
    once a second and have Gaussian noise within one. Here moves start from the trace's own level, not from the last
    one, so that traces keep apart; and how often and how far it moves differs from trace to trace.
    """
    interval = int(rng.choice([1, 5]))
    seconds = interval * -(-int(np.ceil(config.duration_s)) // interval)
    levels = np.geomspace(config.low, config.high, LEVELS)
    home = int(rng.integers(LEVELS // 8, LEVELS - LEVELS // 12))
    often, spread, ripple = (rng.uniform(*limits) for limits in (OFTEN, SPREAD, RIPPLE))
    states = np.fromiter(_visited(rng, seconds, home, often, spread), dtype=np.int64, count=seconds)
    values = levels[states] * np.maximum(1 + ripple * rng.standard_normal(seconds), 0.1)
    means = values.reshape(-1, interval).mean(1)
    times = np.arange(len(means) + 1, dtype=np.float64) * interval
    return np.stack([times, np.concatenate([means[:1], means])], axis=1)


def _visited(rng: np.random.Generator, seconds: int, home: int, often: float, spread: float) -> Iterator[int]:
    state = home
    for _ in range(seconds):
        if rng.random() < often:
            move = int(rng.geometric(spread)) - 1
            # Downward moves are twice as likely: links are slower than their rate more often than faster.
            state = min(max(home + (move if rng.random() < 1 / 3 else -move), 0), LEVELS - 1)
        yield state
