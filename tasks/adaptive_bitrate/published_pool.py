"""Experience pools that NetLLM's program writes (Wu et al., SIGCOMM 2024): pickled lists, turned into our rollouts.

Its states are 6 x 6, newest last: last bitrate over the highest; buffer in 10 s; MB/s and download time in 10 s of the
last six chunks; sizes of the next chunk in MB; chunks left over 48. The first chunk of an episode is not in it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from netllm_pl.errors import UserError
from netllm_pl.rollout import Rollout
from netllm_pl.unpickle import Record, as_array, read_pickle
from tasks.adaptive_bitrate.simulator import Floats, Ints, Observations
from tasks.adaptive_bitrate.videos import PUBLISHED_LADDER

CHUNKS = 48
LISTS = ("states", "actions", "rewards", "dones")


def read_published(file: Path, history: int = 10) -> Iterator[Rollout]:
    """Read a published pool, one episode after the other; nothing in the file is executed.

    Args:
        file: A pickled ``ExperiencePool``.
        history: Samples of history in an observation; earlier ones than the state's six come from earlier states.

    Yields:
        Rollouts of one episode each, with the observations of `Simulator`.

    Raises:
        UserError: The file asks for anything but data, or is not such a pool; the message says what is wrong where.
    """
    pool = read_pickle(file, classes=("ExperiencePool",))
    lists = [getattr(pool, name, None) for name in LISTS]
    if not isinstance(pool, Record) or not all(isinstance(values, list) and values for values in lists):
        raise UserError(f"{file} holds no ExperiencePool with lists {', '.join(LISTS)}")
    try:
        states, actions, rewards, dones = (as_array(values) for values in lists)
        states, rewards, dones = states.astype(np.float64), rewards.astype(np.float64), dones.astype(bool)
        actions = actions.astype(np.int64, casting="safe")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: states, actions, rewards and dones are not arrays of numbers ({error})") from None
    last = _check(file, states, actions, rewards, dones)
    for begin, end in zip(np.concatenate([[0], last[:-1] + 1]), last + 1, strict=True):
        steps = slice(begin, end)
        seen = _observations(states[steps], rewards[steps], history)
        yield Rollout(
            actions[steps, None],
            rewards[steps, None],
            np.ones((end - begin, 1), bool),
            {},
            {name: values[:, None] for name, values in seen.items()},
            {},
        )


def _check(file: Path, states: Floats, actions: Ints, rewards: Floats, dones: np.ndarray) -> Ints:
    """Check all steps; return where the episodes end."""
    size = len(states)
    if states.shape != (size, 6, 6) or any(values.shape != (size,) for values in (actions, rewards, dones)):
        shapes = ", ".join(str(values.shape) for values in (states, actions, rewards, dones))
        raise UserError(f"{file}: states, actions, rewards, dones are {shapes}; expected (n, 6, 6), (n,), (n,), (n,)")
    levels = np.asarray(PUBLISHED_LADDER) / PUBLISHED_LADDER[-1]
    left = states[:, 5, -1] * CHUNKS
    problems = {
        "numbers that are not finite": ~(np.isfinite(states).all((1, 2)) & np.isfinite(rewards)),
        f"an action that is no level from 0 to {len(levels) - 1}": (actions < 0) | (actions >= len(levels)),
        "a last bitrate that is not on the ladder": np.abs(states[:, :1, -1] - levels).min(1) > 1e-3,
        "a part of a chunk left": (np.abs(left - left.round()) > 1e-3) | (left < 0) | (left > CHUNKS),
    }
    begins = np.concatenate([[True], dones[:-1]])
    moved = np.abs(states[1:, 2:4, :-1] - states[:-1, 2:4, 1:]).max((1, 2)) > 1e-5
    problems["a history that does not continue the step before's"] = np.concatenate([[False], moved]) & ~begins
    for what, where in problems.items():
        if where.any():
            raise UserError(f"{file}, step {where.argmax()}: {what}")
    if not dones[-1]:
        raise UserError(f"{file}: the last episode does not end, so its returns are unknown; the pool was cut off")
    return np.nonzero(dones)[0]


def _observations(states: Floats, rewards: Floats, history: int) -> Observations:
    """Undo the scaling of an episode's states (T, 6, 6)."""
    left = (states[:, 5, -1] * CHUNKS).round().astype(np.int64)
    levels = np.asarray(PUBLISHED_LADDER) / PUBLISHED_LADDER[-1]
    return {
        "level": np.abs(states[:, :1, -1] - levels).argmin(1),
        "buffer_s": states[:, 1, -1] * 10.0,
        "throughput": _history(states[:, 2], history),
        "delay_s": _history(states[:, 3] * 10.0, history),
        "next_bytes": (states[:, 4] * 1e6).round().astype(np.int64),
        "chunk": CHUNKS - left,
        "chunks_left": left,
        "reward": np.concatenate([[0.0], rewards[:-1]]),
    }


def _history(windows: Floats, history: int) -> Floats:
    """Samples of the last six steps (T, 6), newest last, as those of the last ``history`` steps (T, history)."""
    samples = np.concatenate([np.zeros(history), windows[0, :-1], windows[:, -1]])
    whole = np.lib.stride_tricks.sliding_window_view(samples, history)
    return whole[len(whole) - len(windows) :]
