"""What predictions look like: paths on the sphere, unrolled, and the error over the horizon."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from netllm_pl.drawing import blank, lines
from tasks.viewport_prediction.baselines import Angles, circular_error, unwrap_relative
from tasks.viewport_prediction.windows import Windows

ANGLES = ("roll", "pitch", "yaw")
SHOWN = (0.5, 0.75, 0.9, 1.0)
"""Windows that are drawn: these quantiles of how far the viewer turns."""
MARGIN = 10.0
"""Degrees around a path."""


def sample_table(
    windows: Windows, rows: list[int], t_s: np.ndarray, history: Angles, future: Angles, prediction: Angles
) -> pd.DataFrame:
    """Tell of every sample of windows, one row each.

    Args:
        windows: Of a split.
        rows: (N,) which of them.
        t_s: (T + H,) seconds from the last sample that was seen.
        history: (N, T, 3) degrees.
        future: (N, H, 3) degrees.
        prediction: (N, H, 3) degrees.

    Returns:
        ``window``, ``trace``, ``t_s``, ``roll``, ``pitch``, ``yaw``, and ``predicted_roll`` and so on, which are NaN
        where the sample was seen.
    """
    truth = np.concatenate([history, future], axis=1)
    predicted = np.concatenate([np.full(history.shape, np.nan), prediction], axis=1)
    length = truth.shape[1]
    where = {"window": np.repeat(rows, length), "trace": np.repeat(windows.trace[rows], length)}
    columns = {"t_s": np.tile(t_s, len(rows))}
    columns |= {name: truth[..., k].ravel() for k, name in enumerate(ANGLES)}
    columns |= {f"predicted_{name}": predicted[..., k].ravel() for k, name in enumerate(ANGLES)}
    return pd.DataFrame(where | columns)


def draw_paths(samples: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw where viewers look and where each policy says they will, around where they looked last.

    Yaw and pitch are unrolled: a path that crosses 180 degrees goes on.

    Args:
        samples: `sample_table` by name of the policy, of the same windows.
    """
    tables = list(samples.values())
    times, truth, _ = _arrays(tables[0])
    seen = times <= 0
    moved = np.abs(_unrolled(truth, seen)).max(axis=(1, 2))
    chosen = np.argsort(moved)[[round(share * (len(moved) - 1)) for share in SHOWN]]
    figure, axes = blank(2, 2, size=(8.0, 6.4))
    line = lines(samples)
    for k, (ax, window) in enumerate(zip(axes, chosen, strict=True)):
        path = _unrolled(truth, seen)[window]
        start = truth[window, seen][-1]
        ax.plot(*path[seen].T, ":", color="grey", label="seen")
        ax.plot(*path[~seen | (times == 0)].T, color="black", linewidth=2, label="true")
        ax.plot(*path[-1], "s", color="black", markersize=4)
        for name, table in samples.items():
            ahead = np.concatenate([truth[window, seen], _arrays(table)[2][window, ~seen]])
            guess = _unrolled(ahead[None], seen)[0][~seen | (times == 0)]
            ax.plot(*guess.T, **line[name], linewidth=1.2, label=name)
            ax.plot(*guess[-1], "s", **line[name], markersize=4)
        ax.plot(0, 0, "o", color="black", markersize=4)
        ax.set_title(f"last seen at yaw {start[2]:.0f}°, pitch {start[1]:.0f}°", fontsize=9)
        ax.set(
            xlabel="yaw from there, degrees", ylabel="pitch from there, degrees", aspect="equal", adjustable="datalim"
        )
        ax.margins(0.15)
        ax.grid(alpha=0.3)
        if k == 0:
            ax.legend(fontsize=8)
    turned = "median, upper quartile, upper tenth and most turned"
    figure.suptitle(f"{turned} of {len(moved)} windows; squares: {times[-1]:.1f} s ahead", fontsize=10)
    return figure


def draw_errors(samples: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the mean absolute error over windows and angles, at each future sample.

    Args:
        samples: `sample_table` by name of the policy.
    """
    figure, (axes,) = blank()
    count = 0
    for name, line in lines(samples).items():
        times, truth, predicted = _arrays(samples[name])
        error = circular_error(predicted, truth)[:, times > 0].mean(axis=(0, 2))
        count = len(truth)
        axes.plot(times[times > 0], error, **line, label=f"{name} (mean {error.mean():.2f})")
    axes.set(xlabel="seconds ahead", ylabel="mean absolute error, degrees", ylim=(0, None))
    axes.set_title(f"Error over the horizon, {count} windows", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _arrays(table: pd.DataFrame) -> tuple[np.ndarray, Angles, Angles]:
    """Seconds (T + H,), true and predicted angles (N, T + H, 3)."""
    windows = table["window"].nunique()
    angles = table[[*ANGLES, *(f"predicted_{name}" for name in ANGLES)]].to_numpy().reshape(windows, -1, 6)
    return table["t_s"].to_numpy()[: angles.shape[1]], angles[..., :3], angles[..., 3:]


def _unrolled(path: Angles, seen: np.ndarray) -> np.ndarray:
    """Yaw and pitch (N, T + H, 2) from the last sample that was seen, unwrapped step by step."""
    motion = unwrap_relative(path)  # relative to the last sample of all
    return (motion - motion[:, seen][:, -1:])[..., [2, 1]]
