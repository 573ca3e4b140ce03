"""Means, paired differences and their intervals, by a bootstrap over clusters of dependent episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from netllm_pl.errors import UserError

Floats = npt.NDArray[np.float64]

IDENTITY = ("window", "episode", "cluster")
"""Columns that say what a row was measured on: they must agree between policies."""


@dataclass(frozen=True)
class Metric:
    """A number that `evaluate` reports for a policy.

    Attributes:
        name: What it is called, with its unit.
        column: Column of the episodes that it averages.
        better: Which direction is better.
        root: Report the square root of the mean, as for a root mean square error.
    """

    name: str
    column: str
    better: Literal["min", "max"] = "min"
    root: bool = False


@dataclass(frozen=True)
class Estimates:
    """Metrics of policies on the same episodes.

    Attributes:
        means: (policies, metrics), over all episodes.
        draws: (resamples, policies, metrics), over resampled clusters, the same ones for all policies.
        n: Number of episodes.
    """

    means: Floats
    draws: Floats
    n: int


def summarise(
    frame: pd.DataFrame, metrics: Sequence[Metric], policies: Sequence[str], resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Mean of each metric and policy, and its improvement over the first policy, with 95 % intervals.

    Args:
        frame: One row an episode and policy: ``policy``, ``cluster``, the metrics' columns, and ``window`` or
            ``episode`` if there are any. Rows of policies are matched by their order.
        metrics: What to report.
        policies: Which policies, in the order to report; the first is the one to compare with.
        resamples: Bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        Columns policy, metric, mean, low, high, paired_mean, paired_low, paired_high, n. The paired columns hold the
        improvement over the first policy: above zero is better, whatever the direction of the metric. Intervals are
        NaN when there are fewer than two clusters.

    Raises:
        UserError: If policies were not measured on the same episodes, or a value is not finite.
    """
    found = _estimate(frame, metrics, policies, resamples, seed)
    rows = []
    for p, policy in enumerate(policies):
        for m, metric in enumerate(metrics):
            low, high = _percentiles(found.draws[:, p, m])
            gain = (0.0, 0.0, 0.0) if p == 0 else _improvement(found, metric, m, p, 0)
            rows.append((policy, metric.name, found.means[p, m], low, high, *gain, found.n))
    paired = ["paired_mean", "paired_low", "paired_high"]
    return pd.DataFrame(rows, columns=["policy", "metric", "mean", "low", "high", *paired, "n"])


def compare_pairs(
    frame: pd.DataFrame, metrics: Sequence[Metric], policies: Sequence[str], resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """By how much each policy is better than each other one, with 95 % intervals; arguments as in `summarise`.

    Returns:
        Columns policy, other, metric, mean, low, high, a row for every ordered pair and metric.
    """
    found = _estimate(frame, metrics, policies, resamples, seed)
    rows = [
        (policy, other, metric.name, *_improvement(found, metric, m, p, o))
        for p, policy in enumerate(policies)
        for o, other in enumerate(policies)
        if p != o
        for m, metric in enumerate(metrics)
    ]
    return pd.DataFrame(rows, columns=["policy", "other", "metric", "mean", "low", "high"])


def _estimate(
    frame: pd.DataFrame, metrics: Sequence[Metric], policies: Sequence[str], resamples: int, seed: int
) -> Estimates:
    """Resample clusters with replacement and average, by sums over clusters: a resample is a row of weights."""
    values, clusters = _values(frame, metrics, policies)  # (N, policies * metrics), (N,)
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, index, values)
    draws = np.full((resamples, values.shape[1]), np.nan)
    if len(sizes) > 1:
        weights = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), resamples)
        # a mean over episodes, not over clusters: large clusters count more, as in the mean itself
        draws = (weights @ sums) / (weights @ sizes)[:, None]
    shape = (len(policies), len(metrics))
    root = np.array([metric.root for metric in metrics])
    means, spread = values.mean(0).reshape(shape), draws.reshape(resamples, *shape)
    means[:, root], spread[..., root] = np.sqrt(means[:, root]), np.sqrt(spread[..., root])
    return Estimates(means, spread, len(values))


def _values(
    frame: pd.DataFrame, metrics: Sequence[Metric], policies: Sequence[str]
) -> tuple[Floats, npt.NDArray[np.generic]]:
    """Collect the metrics' columns of all policies side by side, (N, policies * metrics), and the clusters, (N,)."""
    columns = [metric.column for metric in metrics]
    identity = [name for name in IDENTITY if name in frame.columns]
    groups = [frame[frame["policy"] == policy] for policy in policies]
    for policy, group in zip(policies, groups, strict=True):
        if group.empty:
            raise UserError(f"policy '{policy}' has no episodes. The test split is empty: check the data's splits.")
        if not group[identity].reset_index(drop=True).equals(groups[0][identity].reset_index(drop=True)):
            raise UserError(
                f"policy '{policy}' ({len(group)} rows) was not measured on the same episodes as '{policies[0]}' "
                f"({len(groups[0])} rows): {', '.join(identity)} differ. Run both on the same test split."
            )
        bad = [name for name in columns if not np.isfinite(group[name].to_numpy(np.float64)).all()]
        if bad:
            raise UserError(f"policy '{policy}' gives values of {', '.join(bad)} that are not finite numbers.")
    values = np.concatenate([group[columns].to_numpy(np.float64) for group in groups], axis=1)
    return values, groups[0]["cluster"].to_numpy()


def _improvement(found: Estimates, metric: Metric, m: int, policy: int, other: int) -> tuple[float, float, float]:
    """By how much a policy is better than another one on metric number m: mean, low, high."""
    sign = 1.0 if metric.better == "max" else -1.0
    gain = sign * (found.means[policy, m] - found.means[other, m])
    return (float(gain), *_percentiles(sign * (found.draws[:, policy, m] - found.draws[:, other, m])))


def _percentiles(draws: Floats) -> tuple[float, float]:
    """Bounds of the central 95 % of the draws; NaN if the draws are."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
