"""Windows over viewport traces: which samples a policy sees, and which it must predict."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from netllm_pl.errors import UserError
from tasks.viewport_prediction.traces import Labels, Traces, label_order


@dataclass(frozen=True)
class Windows:
    """Places in traces at which a prediction is asked for.

    Attributes:
        trace: (K,) int64 index of the trace.
        t: (K,) int64 index, inside the trace, of the first sample to predict.
    """

    trace: NDArray[np.int64]
    t: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of windows K."""
        return len(self.t)


@dataclass(frozen=True)
class Disturbance:
    """What training does to histories, so that noise and gaps in use do less harm.

    Attributes:
        noise_deg: Largest standard deviation of noise on angles; one is drawn between 0 and this for a history.
        missing: Largest share of samples that are lost, drawn likewise; the one before is held.
        share: Share of the histories with noise, and, drawn apart, of those with gaps.
    """

    noise_deg: float = 5.0
    missing: float = 0.5
    share: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what nothing can be drawn from.

        Raises:
            UserError: A value is out of its range.
        """
        if not (self.noise_deg >= 0 and 0 <= self.missing < 1 and 0 <= self.share <= 1):
            raise UserError(
                f"disturb: noise_deg is {self.noise_deg} (0 or above), missing {self.missing} (from 0 to below 1), "
                f"share {self.share} (from 0 to 1)"
            )


def make_windows(
    traces: Traces,
    videos: Sequence[int | str] | None,
    users: Sequence[int | str] | None,
    history: int,
    horizon: int,
    step: int,
    trim_head: int,
    trim_tail: int,
    split: str = "data",
) -> Windows:
    """Cut windows by the rule of the published code: ``t in range(trim_head, length - trim_tail, step)``.

    A window at t sees the samples ``[t - history, t)`` and predicts ``[t, t + horizon)``; one that would reach outside
    its trace is left out.

    Args:
        traces: Where to cut.
        videos: Labels of the videos to take; null takes all.
        users: Labels of the viewers to take; null takes all.
        history: Samples seen.
        horizon: Samples to predict.
        step: Samples between windows.
        trim_head: Samples at the start of a trace at which no window is asked for.
        trim_tail: The same at the end.
        split: What error messages call this selection.

    Raises:
        UserError: A label is unknown, a size makes no sense, or no window is left.
    """
    _check_sizes(history, horizon, step, trim_head, trim_tail)
    chosen = select(traces, videos, users, split)
    stop = np.minimum(traces.lengths[chosen] - trim_tail, traces.lengths[chosen] - horizon + 1)
    count = np.maximum(0, -((trim_head - stop) // step))
    trace = np.repeat(chosen, count)
    place = np.arange(len(trace)) - np.repeat(np.cumsum(count) - count, count)
    t = trim_head + step * place
    inside = t >= history
    if not inside.any():
        longest = int(traces.lengths[chosen].max())
        raise _no_window(split, longest, history, horizon, trim_head, trim_tail)
    return Windows(trace[inside], t[inside])


def select(
    traces: Traces, videos: Sequence[int | str] | None, users: Sequence[int | str] | None, split: str = "data"
) -> NDArray[np.int64]:
    """Return the indices of the traces of these videos and viewers; null means all.

    Raises:
        UserError: A label is in no trace, or no trace has both.
    """
    video = _mask(traces.video, videos, f"split '{split}': videos")
    user = _mask(traces.user, users, f"split '{split}': users")
    chosen = np.flatnonzero(video & user)
    if not len(chosen):
        raise UserError(f"split '{split}' is empty: no trace has one of its videos and one of its users")
    return chosen


def gather(
    traces: Traces, windows: Windows, indices: NDArray[np.integer] | Sequence[int], history: int, horizon: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Copy windows out of the traces at once.

    Args:
        traces: The traces that the windows were cut from.
        windows: All windows.
        indices: (B,) which of them.
        history: Samples seen, T.
        horizon: Samples to predict, H.

    Returns:
        (B, T, 3) and (B, H, 3) raw roll, pitch, yaw in degrees.
    """
    pick = np.asarray(indices, dtype=np.int64)
    first = traces.starts[windows.trace[pick]] + windows.t[pick]
    samples = traces.angles[first[:, None] + np.arange(-history, horizon)]
    return samples[:, :history], samples[:, history:]


def some_of(windows: Windows, traces: Traces, share: float) -> Windows:
    """Keep the windows of a share of the traces, one at least; a smaller share is part of a larger one.

    Args:
        windows: All windows.
        traces: What they were cut from.
        share: Above 0, up to 1.
    """
    known = np.unique(windows.trace)
    names = [f"{traces.video[trace]}/{traces.user[trace]}" for trace in known]
    order = sorted(range(len(known)), key=lambda k: hashlib.sha256(names[k].encode()).digest())
    kept = np.isin(windows.trace, known[order[: max(1, math.ceil(share * len(known) - 1e-9))]])
    return Windows(windows.trace[kept], windows.t[kept])


def disturbed(history: Tensor, window: Tensor, noise_deg: float, missing: float) -> Tensor:
    """Histories (B, T, 3) as a bad sensor or network tells them, the same for each window every time.

    Args:
        history: Degrees.
        window: (B,) numbers of the windows, from which is drawn what happens to each.
        noise_deg: Standard deviation of noise on each angle.
        missing: Probability that a sample is lost; the one before is held, of the first ones the first that is there.
    """
    if not noise_deg and not missing:
        return history
    told = history.numpy().copy()
    there = np.empty(told.shape[:2], dtype=np.bool_)
    for row, number in enumerate(window.tolist()):
        random = np.random.default_rng([number, 5])
        told[row] += noise_deg * random.standard_normal(told[row].shape).astype(told.dtype)
        there[row] = random.random(len(told[row])) >= missing
    return held(torch.from_numpy((told + 180) % 360 - 180 if noise_deg else told), torch.from_numpy(there))


def held(history: Tensor, there: Tensor) -> Tensor:
    """Histories (B, T, 3) in which samples that are not there (B, T) are those before them, or else the first one."""
    place = torch.where(there, torch.arange(there.shape[1], device=there.device), -1).cummax(1).values
    place = torch.where(place < 0, there.int().argmax(1, keepdim=True), place)  # none is there: all are the first
    return history.gather(1, place.unsqueeze(-1).expand_as(history))


def _mask(labels: Labels, wanted: Sequence[int | str] | None, where: str) -> NDArray[np.bool_]:
    if wanted is None:
        return np.ones(len(labels), dtype=np.bool_)
    names = [str(name) for name in wanted]
    known = sorted(set(labels.tolist()), key=label_order)
    strange = [name for name in names if name not in known]
    if strange:
        shown = ", ".join(known[:12]) + (f" ... ({len(known)} in all)" if len(known) > 12 else "")
        raise UserError(f"{where} {', '.join(strange)} are in no trace of the data; known: {shown}")
    return np.isin(labels, names)


def _check_sizes(history: int, horizon: int, step: int, trim_head: int, trim_tail: int) -> None:
    for name, value, least in (
        ("history", history, 1),
        ("horizon", horizon, 1),
        ("step", step, 1),
        ("trim_head", trim_head, 0),
        ("trim_tail", trim_tail, 0),
    ):
        if value < least:
            raise UserError(f"{name}: {value} is too small; expected {least} or more samples")


def _no_window(split: str, longest: int, history: int, horizon: int, trim_head: int, trim_tail: int) -> UserError:
    trace = f"the longest trace has {longest} samples"
    if history + horizon > longest:
        why = f"history {history} + horizon {horizon} does not fit: {trace}; shorten them"
    else:
        sizes = f"history {history}, horizon {horizon}, trim_head {trim_head} and trim_tail {trim_tail}"
        why = f"{sizes} leave no place: {trace}; lower one of them"
    return UserError(f"split '{split}' has no window: {why}")
