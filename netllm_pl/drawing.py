"""Figures without a screen and without pyplot's state: made, drawn into pixels, and forgotten."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#8c8c8c")
"""Of policies, in their order; told apart by colour-blind readers too (Okabe and Ito, 2008, with grey)."""


def blank(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 4.0), **more: Any) -> tuple[Figure, Any]:
    """Make an empty figure.

    Args:
        rows: Of axes.
        columns: Of axes.
        size: Width and height in units of 100 pixels.
        more: For `matplotlib.figure.Figure.subplots`, such as ``sharex``.

    Returns:
        The figure; its axes, an array (rows * columns,).
    """
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **more).ravel()


def lines(names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give each policy arguments for its lines: a colour, and a place above the lines of later ones."""
    return {name: {"color": COLOURS[k % len(COLOURS)], "zorder": 3 - k / 100} for k, name in enumerate(names)}


def distribution(
    axes: Axes, samples: Mapping[str, npt.NDArray[Any]], label: str, colours: Mapping[str, str] | None = None
) -> None:
    """Draw the share of samples up to each value, and the mean of each policy as a dashed line.

    Args:
        axes: Where.
        samples: (N,) numbers by name of the policy.
        label: What they are, with their unit.
        colours: By name; null takes those of `lines`.
    """
    for name, line in lines(samples).items():
        line |= {} if colours is None else {"color": colours[name]}
        values = np.sort(samples[name])
        share = np.arange(1, len(values) + 1) / len(values)
        axes.step(values, share, where="post", **line, label=f"{name} (mean {values.mean():.4g})")
        axes.axvline(values.mean(), **line, linestyle="--", linewidth=0.8)
    axes.set(xlabel=label, ylabel="share of all, up to this value", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Draw a figure into an image (height, width, 3)."""
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
