"""Pictures of a study: one a part, with an axis for each setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from netllm_pl.bootstrap import Metric
from netllm_pl.compare import Run
from netllm_pl.drawing import COLOURS, blank, distribution
from netllm_pl.study.plan import Part, Plan
from netllm_pl.study.results import Found

Look = Mapping[str, str]
"""Colours of policies, by their names."""


def draw(plan: Plan, part: Part, found: Mapping[str, Found], runs: Mapping[str, Sequence[Run]]) -> Figure | None:
    """Draw what a part asks for.

    Args:
        plan: The study.
        part: Which part of it.
        found: What was measured, by setting.
        runs: Folders of trainings, by name of the run.

    Returns:
        The picture; None if nothing of it was measured.
    """
    if not found:
        return None
    first = next(iter(found.values()))
    names = list(dict.fromkeys(name for told in found.values() for name in told.episodes))
    look = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    label = plan.study.labels
    lines: list[tuple[str, float, Callable[[Axes, str, Found], None]]] = []
    bars = 1.2 + 0.24 * len(names)
    for kind in part.figures:
        if kind == "bars":
            lines.append(("", bars, lambda axes, _, told: _bars(axes, told, told.main, look, label)))
        elif kind == "factors":
            lines += [("", bars, _factor(metric, look, label)) for metric in first.metrics[1:]]
        elif kind == "extra":
            lines += [("", bars, _factor(Metric(name, name), look, label)) for name in part.extra]
        elif kind in ("cdf", "box"):
            shown = part.shown or names
            height = _height(len(shown)) if kind == "cdf" else bars
            lines.append(("", height, _spread(kind, shown, look, label)))
        elif kind == "curve":
            lines.append(("", _height(5), lambda axes, _, told: _curve(axes, told, plan, part, label)))
    columns = max(1, len(found))
    # Trainings are of no setting: one axis.
    heights = [height for _, height, _ in lines] + [_height(len(names))] * ("progress" in part.figures)
    if not heights:
        return None
    figure, flat = blank(
        len(heights), columns, (max(7.0, 4.6 * columns), sum(heights)), gridspec_kw={"height_ratios": heights}
    )
    axes = np.reshape(flat, (len(heights), columns))
    for row, (_, _, paint) in enumerate(lines):
        for column, (setting, told) in enumerate(found.items()):
            paint(axes[row, column], setting, told)
            if row == 0:
                axes[row, column].set_title(setting)
    if "progress" in part.figures:
        own = {policy.run: policy.name for policy in plan.policies(part) if policy.run is not None}
        _progress(axes[-1, 0], {name: runs[run] for run, name in own.items() if run in runs}, look, label)
        for empty in axes[-1, 1:]:
            empty.set_axis_off()
    return figure


def _called(name: str, label: Look) -> str:
    return label.get(name, name)


def _height(lines: int) -> float:
    """Of an axis with so many lines in its legend."""
    return 3.4 + 0.12 * lines


def _legend(axes: Axes) -> None:
    """Say what lines are, below them: names can be longer than the axis is wide, as those of bars at its left are."""
    axes.legend(fontsize=6, loc="upper right", bbox_to_anchor=(1.0, -0.18), borderaxespad=0.0)


def _bars(axes: Axes, told: Found, metric: Metric, look: Look, label: Look) -> None:
    """A bar for each policy, with its interval."""
    table = told.table[told.table["metric"] == metric.name].set_index("policy")
    names = list(table.index)
    for place, name in enumerate(names):
        mean, low, high = table.loc[name, ["mean", "low", "high"]]
        error = None if math.isnan(low) else [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.barh(place, mean, color=look[name], xerr=error, error_kw={"linewidth": 0.8}, height=0.7)
        axes.annotate(f"{mean:.4g}", (mean, place), (3, 5), textcoords="offset points", fontsize=6, va="bottom")
    axes.set_yticks(range(len(names)), [_called(name, label) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric.name} ({'more' if metric.better == 'max' else 'less'} is better)", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _factor(metric: Metric, look: Look, label: Look) -> Callable[[Axes, str, Found], None]:
    return lambda axes, _, told: _bars(axes, told, metric, look, label)


def _spread(kind: str, shown: Sequence[str], look: Look, label: Look) -> Callable[[Axes, str, Found], None]:
    """Distribution of the main metric over episodes."""

    def paint(axes: Axes, setting: str, told: Found) -> None:
        column = told.main.column
        samples = {n: told.episodes[n][column].to_numpy(np.float64) for n in shown if n in told.episodes}
        if kind == "cdf":
            named = {_called(name, label): values for name, values in samples.items()}
            distribution(axes, named, told.main.name, {_called(name, label): look[name] for name in samples})
            _legend(axes)
            return
        drawn = axes.boxplot(
            list(samples.values()), orientation="horizontal", showfliers=False, showmeans=True, patch_artist=True
        )
        for box, name in zip(drawn["boxes"], samples, strict=True):
            box.set_facecolor(look[name])
        axes.set_yticks(range(1, len(samples) + 1), [_called(name, label) for name in samples], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(told.main.name, fontsize=8)
        axes.grid(axis="x", alpha=0.3)

    return paint


def _curve(axes: Axes, told: Found, plan: Plan, part: Part, label: Look) -> None:
    """The main metric over ``x`` of the runs; what has none is a dashed line."""
    table = told.table[told.table["metric"] == told.main.name].set_index("policy")
    lines: dict[str, list[tuple[float, Any]]] = {}
    for policy in plan.policies(part):
        run = None if policy.run is None else plan.study.runs[policy.run]
        if policy.name not in table.index:
            continue
        row = table.loc[policy.name]
        if run is None or run.x is None:
            axes.axhline(row["mean"], linestyle="--", linewidth=0.9, label=_called(policy.name, label), color="0.5")
        else:
            lines.setdefault(run.line or "", []).append((run.x, row))
    for number, (line, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        rows = pd.DataFrame([row for _, row in points])
        xs, colour = [x for x, _ in points], COLOURS[number % len(COLOURS)]
        axes.plot(xs, rows["mean"], "o-", color=colour, label=_called(line, label), markersize=4)
        axes.fill_between(xs, rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
    word, _, rest = part.x.partition(" ")
    if word == "log":
        axes.set_xscale("log")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    axes.set(xlabel=rest if word == "log" else part.x, ylabel=told.main.name)
    _legend(axes)
    axes.grid(alpha=0.3)


def _progress(axes: Axes, runs: Mapping[str, Sequence[Run]], look: Look, label: Look) -> None:
    """Validations over the time of training, without that of the validations."""
    for name, seeds in runs.items():
        for number, run in enumerate(seeds):
            metric, more = run.monitored
            seconds = clock(run)
            if metric not in run.curves or seconds is None:
                continue
            shown = run.curves[["step", metric]].dropna()
            text = _called(name, label) if number == 0 else None
            at = np.interp(shown["step"], *seconds)
            axes.plot(at, shown[metric], ".-", color=look.get(name), label=text, alpha=0.8)
            axes.set_ylabel(f"{metric} ({'more' if more else 'less'} is better)", fontsize=8)
    axes.set_xlabel("seconds of training, without validations", fontsize=8)
    if axes.lines:
        _legend(axes)
    axes.grid(alpha=0.3)


def clock(run: Run) -> tuple[Sequence[float], Sequence[float]] | None:
    """Steps of a run, and the seconds of training until them, from the speed that it has logged; None if it has not."""
    size = run.settings.get("data.batch_size")
    speed = run.curves.get("cost/samples_per_s")
    if speed is None or speed.dropna().empty or not size:
        return None
    known = run.curves[["step", "cost/samples_per_s"]].dropna()
    steps = np.concatenate([[0.0], known["step"]])
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(steps) * float(size) / known["cost/samples_per_s"])])
    return steps.tolist(), seconds.tolist()
