"""What schedules look like: executors by job over time, jobs in the system, completion times."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from netllm_pl.drawing import blank, distribution, lines


def bars(tasks: pd.DataFrame) -> pd.DataFrame:
    """Join tasks of one job that follow each other on an executor without a gap.

    Args:
        tasks: Of one episode.

    Returns:
        ``executor_id``, ``job_id``, ``start_ms`` and ``end_ms``, one row a bar, by executor and start.
    """
    rows = tasks.sort_values(["executor_id", "t_start_ms"])
    executor, job = rows["executor_id"].to_numpy(), rows["job_id"].to_numpy()
    start = rows["t_start_ms"].to_numpy()
    end = start + rows["duration_ms"].to_numpy()
    begins = np.ones(len(rows), bool)
    begins[1:] = (np.diff(executor) != 0) | (np.diff(job) != 0) | (start[1:] > end[:-1])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(rows)) - 1
    return pd.DataFrame(
        {"executor_id": executor[first], "job_id": job[first], "start_ms": start[first], "end_ms": end[last]}
    )


def draw_gantt(tasks: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw which job each executor works for: the model's schedule above that of the last baseline.

    Args:
        tasks: `task_table` by name of the policy, of the same episode.
    """
    names = list(tasks)
    shown = [names[0], *names[1:][-1:]]
    figure, axes = blank(len(shown), size=(8.0, 3.2 * len(shown)), sharex=True)
    colormap = colormaps["tab20"]
    for ax, name in zip(axes, shown, strict=True):
        rows = bars(tasks[name])
        left, right = rows["start_ms"].to_numpy() / 1000, rows["end_ms"].to_numpy() / 1000
        low = rows["executor_id"].to_numpy() - 0.5
        corners = np.stack([left, low, left, low + 1, right, low + 1, right, low], axis=1).reshape(-1, 4, 2)
        ax.add_collection(
            PolyCollection(list(corners), facecolors=colormap(rows["job_id"].to_numpy() % 20), linewidths=0)
        )
        executors = int(rows["executor_id"].max()) + 1
        busy = (right - left).sum() / (executors * right.max())
        ax.set(ylabel="executor", xlim=(0, None), ylim=(-0.5, executors - 0.5))
        ax.autoscale(axis="x")
        ax.set_title(f"{name}: {busy:.0%} busy, done after {right.max():.0f} s (colours: jobs)", fontsize=10)
    axes[-1].set_xlabel("seconds")
    return figure


def draw_load(jobs: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how many jobs are in the system over time, in the first episode.

    Args:
        jobs: One row a job by name of the policy (``jobs`` of `JobSchedulingData.report`).
    """
    figure, (axes,) = blank()
    for name, line in lines(jobs).items():
        times, counts, jct_s = in_system(jobs[name])
        axes.step(times, counts, where="post", **line, label=f"{name} (mean completion {jct_s:.1f} s)")
    episode = next(iter(jobs.values()))["episode"].iloc[0]
    axes.set(xlabel="seconds", ylabel="jobs in the system", ylim=(0, None))
    axes.set_title(f"Validation episode {episode}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def in_system(jobs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, float]:
    """Count the jobs of the first episode of a table.

    Returns:
        Seconds at which a job comes or goes, ascending; how many are there from then on; mean completion time in s.
    """
    own = jobs[jobs["episode"] == jobs["episode"].iloc[0]]
    comes, goes = own["t_arrival_ms"].to_numpy() / 1000, own["t_completed_ms"].to_numpy() / 1000
    times = np.concatenate([comes, goes])
    order = np.argsort(times, kind="stable")
    change = np.repeat([1, -1], len(own))[order]
    return times[order], np.cumsum(change), float((goes - comes).mean())


def draw_completion(jobs: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how the completion times of all jobs are distributed.

    Args:
        jobs: One row a job by name of the policy.
    """
    figure, (axes,) = blank()
    samples = {
        name: (table["t_completed_ms"] - table["t_arrival_ms"]).to_numpy() / 1000 for name, table in jobs.items()
    }
    distribution(axes, samples, "completion time of a job, s")
    table = next(iter(jobs.values()))
    axes.set_title(f"{len(table)} jobs of {table['episode'].nunique()} validation episodes", fontsize=10)
    axes.set_xscale("log")
    return figure
