"""Compares policies on the same episodes: runs them, writes the results, prints one table."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netllm_pl.bootstrap import Metric, compare_pairs, summarise
from netllm_pl.errors import UserError
from netllm_pl.paths import atomic
from netllm_pl.progress import is_quiet, output, status
from netllm_pl.run_folder import RESULTS, free_place

__all__ = ["Evaluable", "Metric", "compare_pairs", "print_table", "run", "summarise", "write_results"]


class Evaluable(Protocol):
    """What `run` needs of a data module."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """What to report; the first one is the main one."""

    @property
    def note(self) -> str:
        """What a reader of the numbers must know, if anything."""

    def policy(self, name: str) -> Any:
        """The policy of a name; an unknown name is a `UserError`."""

    def tables(self, policy: Any, steps: bool = False) -> dict[str, pd.DataFrame]:
        """Run a policy over the test split.

        Returns:
            ``episodes``, one row an episode or window, with ``cluster`` and the metrics' columns; ``steps``, one row a
            step, if they are asked for; and whatever else there is to tell: each is written under its name.
        """


def run(
    data: Evaluable,
    policies: Sequence[str],
    out: Path,
    resamples: int = 2000,
    seed: int = 0,
    steps: bool = False,
    ready: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> pd.DataFrame:
    """Run policies on the same episodes, write the results, print the table and where they lie.

    Args:
        data: The data module.
        policies: Names of policies or paths of checkpoints; differences are to the first one.
        out: Folder for summary.csv, paired.csv and episodes.parquet.
        resamples: Bootstrap resamples behind the intervals.
        seed: Seed of the resamples.
        steps: Also write steps.parquet.
        ready: Policies of that name that need not be built, such as a model in memory.
        command: Whose results these are, if those of another call are to be kept: a folder that holds some gets a new
            one in it, named by command and time. Null writes over them.

    Returns:
        The summary, as `summarise` gives it.
    """
    repeated = [name for name, count in Counter(policies).items() if count > 1]
    if repeated or not policies:
        raise UserError(f"policies {', '.join(policies)}: name at least one, and each once.")
    ready = ready or {}
    for name in policies:
        if name not in ready and not Path(name).exists():
            data.policy(name)  # a misspelt name fails before the first policy runs
    parts = []
    for number, name in enumerate(policies, 1):
        with status(f"running {name} ({number} of {len(policies)})"):
            # loaded when its turn comes: several large backbones would not fit side by side
            tables = data.tables(ready[name] if name in ready else data.policy(name), steps)
            parts.append({key: table.assign(policy=name) for key, table in tables.items()})
    joined = {key: pd.concat([part[key] for part in parts], ignore_index=True) for key in parts[0]}
    frame = joined["episodes"]
    summary = summarise(frame, data.metrics, policies, resamples, seed)
    pairs = compare_pairs(frame, data.metrics, policies, resamples, seed)
    if command is not None:
        out = free_place(out, RESULTS, command)
    write_results(out, summary, pairs, joined)
    if not is_quiet():
        counted = "windows" if "window" in frame else "episodes"
        # a bootstrap of one cluster knows nothing about others
        alone = frame["cluster"].nunique() < 2
        known = "(a 95 % interval needs two clusters at least)" if alone else "[95 % interval]"
        title = f"{summary['n'].iloc[0]} test {counted}, mean {known}"
        print_table(summary, pairs, data.metrics, "; ".join(filter(None, (title, data.note))))
    print(f"wrote {', '.join(['summary.csv', 'paired.csv', *(f'{key}.parquet' for key in joined)])} in {out}")
    return summary


def write_results(out: Path, summary: pd.DataFrame, pairs: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> None:
    """Write summary.csv, paired.csv and the tables as Parquet (policy first, measurements as float64) into a folder."""
    for name, table in (("summary.csv", summary), ("paired.csv", pairs)):
        with atomic(out / name) as temporary:
            table.to_csv(temporary, index=False)
    for key, frame in tables.items():
        rows = frame.astype({name: "float64" for name in frame.select_dtypes("floating").columns})
        rows = rows.astype({"policy": "string"})[["policy", *rows.columns.drop("policy")]]
        with atomic(out / f"{key}.parquet") as temporary:
            rows.to_parquet(temporary, index=False)


def print_table(
    summary: pd.DataFrame,
    pairs: pd.DataFrame,
    metrics: Sequence[Metric],
    title: str,
    console: Console | None = None,
) -> None:
    """Print one row a policy, and below how much better or worse the last policy is than each other on the main metric.

    The main metric has its interval, unless all episodes are of one cluster; those of the others are in summary.csv.

    Args:
        summary: As `summarise` gives it.
        pairs: As `compare_pairs` gives it.
        metrics: The columns; the first one is the main one.
        title: What stands above the table.
        console: Where to print; null is standard output.
    """
    console = console or output()
    main = metrics[0]
    policies = list(dict.fromkeys(summary["policy"]))
    rows = summary.set_index(["policy", "metric"])
    table = Table(title=title)
    table.add_column("policy", overflow="fold")
    for metric in metrics:
        table.add_column(metric.name, justify="right", overflow="fold")
    table.add_column(Text(f"better than {policies[0]} by ({main.name})"), justify="right")
    for policy in policies:
        cells = [_interval(*rows.loc[(policy, main.name), ["mean", "low", "high"]])]
        cells += [f"{rows.loc[(policy, metric.name), 'mean']:.3f}" for metric in metrics[1:]]
        gain = rows.loc[(policy, main.name), ["paired_mean", "paired_low", "paired_high"]]
        gained = "" if policy == policies[0] else _interval(*gain)
        table.add_row(*map(Text, (policy, *cells, gained)))  # plain: brackets would be taken for markup
    console.print(table)
    chosen = pairs[(pairs["policy"] == policies[-1]) & (pairs["metric"] == main.name)]
    for pair in chosen.itertuples():
        if pair.mean < 0:
            how, by = "worse", _interval(-pair.mean, -pair.high, -pair.low)
        else:
            how, by = "better", _interval(pair.mean, pair.low, pair.high)
        console.print(Text(f"{pair.policy} is {how} than {pair.other} by {by} {main.name}"), soft_wrap=True)


def _interval(mean: float, low: float, high: float) -> str:
    """Write an estimate with its interval, if there is one."""
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
