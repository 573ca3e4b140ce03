"""What the benchmark measures of streaming beside the task: simulator, planner, labels."""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from netllm_pl.rollout import Policy, Rollout, rollout
from netllm_pl.timing import Work
from tasks.adaptive_bitrate.mpc import RobustMPC
from tasks.adaptive_bitrate.plain import PlainSession
from tasks.adaptive_bitrate.planning import hindsight_values
from tasks.adaptive_bitrate.simulator import Simulator

PLAIN = "plain_python_1_session"
SESSIONS = (1, 100, 1000)
PLAYED = 100  # sessions whose observations RobustMPC decides on
LABELLED = 16  # sessions that are labelled at once


def works(simulator: Simulator) -> dict[str, Work]:
    """List what is measured.

    * ``simulator_<n>_sessions``: whole sessions with random levels, n side by side, resets included, beside the same
      rules in plain Python, one session after another.
    * ``robust_mpc``: decisions of the mended RobustMPC with its full search, on what it sees in its own sessions.
    * ``hindsight``: labels, each the values of all levels at one chunk in mid-video.

    Args:
        simulator: Sessions in fixed mode, of which no extra observations are asked: plain Python gives none.
    """
    levels = np.random.default_rng(0).integers(0, simulator.levels, (simulator.chunks - 1, max(SESSIONS)))
    found = {PLAIN: Work("steps", _plain(simulator, levels))}
    for sessions in SESSIONS:
        name = f"simulator_{sessions}_session{'s' * (sessions > 1)}"
        found[name] = Work("steps", _batched(simulator, levels[:, :sessions]), beside=PLAIN)
    mpc = RobustMPC(simulator.video, simulator.rules)
    found["robust_mpc"] = Work("decisions", _deciding(mpc, rollout(simulator, mpc, range(PLAYED), record=True)))
    found["hindsight"] = Work("labels", _labels(simulator, levels[:, :LABELLED]))
    return found


def _plain(simulator: Simulator, levels: np.ndarray) -> Callable[[], int]:
    numbers: Iterator[int] = count()

    def play() -> int:
        number = next(numbers)
        trace = number % len(simulator.traces)
        session = PlainSession(simulator.traces, trace, simulator.video, simulator.rules, history=simulator.history)
        for level in levels[:, number % levels.shape[1]].tolist():
            session.step(level)
        return len(levels)

    return play


def _batched(simulator: Simulator, levels: np.ndarray) -> Callable[[], int]:
    rows, sessions = np.ascontiguousarray(levels), levels.shape[1]
    first = count(step=sessions)

    def play() -> int:
        start = next(first)
        simulator.reset(np.arange(start, start + sessions))
        for row in rows:
            simulator.step(row)
        return rows.size

    return play


def _deciding(policy: Policy, played: Rollout) -> Callable[[], int]:
    steps = [{name: values[t] for name, values in played.observations.items()} for t in range(len(played.actions))]

    def decide() -> int:
        policy.reset(played.actions.shape[1])
        for observations in steps:
            policy.act(observations)
        return played.actions.size

    return decide


def _labels(simulator: Simulator, levels: np.ndarray) -> Callable[[], int]:
    own = Simulator(simulator.traces, simulator.video, simulator.rules, "fixed", simulator.history)
    own.reset(np.arange(levels.shape[1]))
    for row in levels[: len(levels) // 3]:  # early enough for a full horizon, late enough for a buffer
        own.step(row)

    def label() -> int:
        return len(hindsight_values(own))

    return label
