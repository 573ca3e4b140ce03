"""Compares policies on the same episodes: runs them, writes the results, prints one table."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from netllm_pl import __version__, parts
from netllm_pl.bootstrap import Metric, compare_pairs, summarise
from netllm_pl.errors import UserError
from netllm_pl.parquet import read_table
from netllm_pl.parts import Parts, Shard
from netllm_pl.paths import atomic
from netllm_pl.progress import is_quiet, output, status
from netllm_pl.run_folder import RESULTS, free_place

__all__ = ["Evaluable", "Evaluation", "Metric", "compare_pairs", "print_table", "summarise", "write_results"]

Tables = dict[str, pd.DataFrame]


class Evaluable(Protocol):
    """What `Evaluation` needs of a data module."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """What to report; the first one is the main one."""

    @property
    def note(self) -> str:
        """What a reader of the numbers must know, if anything."""

    def policy(self, name: str) -> Any:
        """The policy of a name; an unknown name is a `UserError`."""

    def made_of(self, names: Collection[str]) -> dict[str, str]:
        """What policies depend on, such as hashes of files."""

    def fingerprint(self, split: str) -> str:
        """Hash of what the episodes of a split depend on beside the arguments; empty if of nothing."""

    def batches(self) -> int:
        """Into how many parts the test split can be divided."""

    def batch_tables(
        self, policy: Any, steps: bool = False, batches: range | None = None
    ) -> Iterator[tuple[int, Tables]]:
        """Run a policy over some of the parts of the test split, as `NetDataModule.batch_tables` does.

        Yields:
            How many parts are done, and their rows: ``episodes``, one row an episode or window, with ``cluster`` and
            the metrics' columns; ``steps``, one row a step, if they are asked for; and whatever else there is to tell:
            each is written under its name.
        """


class Evaluation:
    """Runs policies on the same episodes, writes the results, prints the table and where they lie.

    The work is in pieces: batches of the test split, of one policy after the other. What takes long is kept in
    ``OUT/parts`` on the way: the same call goes on from there after an interruption.

    Args:
        data: The data module.
        policies: Names of policies or paths of checkpoints; differences are to the first one.
        out: Folder for summary.csv, paired.csv and episodes.parquet.
        steps: Also write steps.parquet.
        ready: Policies of that name that need not be built, such as a model in memory; then nothing is kept on the way.

    Attributes:
        batches: Of one policy.
        seconds: That policies have played so far, without the time to build them.
    """

    def __init__(
        self,
        data: Evaluable,
        policies: Sequence[str],
        out: Path,
        steps: bool = False,
        ready: Mapping[str, Any] | None = None,
    ) -> None:
        repeated = [name for name, count in Counter(policies).items() if count > 1]
        if repeated or not policies:
            raise UserError(f"policies {', '.join(policies)}: name at least one, and each once.")
        self.data, self.policies, self.out, self.steps, self.ready = data, policies, out, steps, ready or {}
        for name in policies:
            if name not in self.ready and not Path(name).exists():
                data.policy(name)  # a misspelt name fails before the first policy runs
        self.batches = data.batches()
        self.seconds = 0.0
        depends = {
            "data": {"class_path": type(data).__name__, "init_args": dict(getattr(data, "hparams", {}))},
            "content": data.fingerprint("test"), "policies": list(policies), "weights": data.made_of(policies),
            "steps": steps, "version": __version__,
        }  # fmt: skip
        cure = "run them with --shard i/n, or all that is left by the same command without --merge"
        self.parts = Parts(out / "parts", depends, "evaluation", cure)

    def run(self, command: str | None = None) -> pd.DataFrame:
        """Run all that is left to run.

        Args:
            command: Whose results these are, if those of another call are to be kept: a folder that holds some gets a
                new one in it, named by command and time. Null writes over them, and over parts of other evaluations.

        Returns:
            The summary, as `summarise` gives it.
        """
        with self.parts.claimed():
            if command is None and not self.parts.fits:
                self.parts.forget()
            summary = self._tell(self._tables(self._play(range(self.batches))), command)
            self.parts.forget()
        return summary

    def run_shard(self, shard: Shard) -> None:
        """Run a share of the batches, and leave it in ``OUT/parts``.

        A policy whose episodes depend on each other runs as a whole in the first share.

        Raises:
            UserError: There are fewer batches than shares.
        """
        self.check(shard)
        with self.parts.claimed(shared=True):
            for start, stop, tables in self._play(shard.of(self.batches)):
                self._keep(start, stop, tables)
        print(f"wrote shard {shard.number} of {shard.count} in {self.parts.folder} ({self.seconds:.2f} s of playing)")

    def merge(self, command: str | None = None) -> pd.DataFrame:
        """Write and print what `run` would, of what `run_shard` has left.

        Raises:
            UserError: Some of it is missing, or of an evaluation with other settings.
        """
        with self.parts.claimed():
            self.parts.whole(self.batches * len(self.policies))
            summary = self._tell(self._tables([]), command)
            self.parts.forget()
        return summary

    def check(self, shard: Shard) -> None:
        """Refuse more shares than there are batches."""
        if shard.count > self.batches:
            raise UserError(
                f"shard is {shard.number}/{shard.count}, but the test split of {type(self.data).__name__} is evaluated "
                f"in {self.batches} batches or fewer; take fewer shards, or a smaller data.eval_batch_size for all of "
                "them"
            )

    def _play(self, own: range) -> Iterator[tuple[int, int, Tables]]:
        """Run what is not there of some batches, with all policies.

        Yields:
            The first piece, the one behind the last one, and the tables of what was run last; the rest is kept.
        """
        for number, name in enumerate(self.policies):
            first = number * self.batches
            gaps = self.parts.missing(range(first + own.start, first + own.stop))
            if not gaps:
                continue
            with status(f"running {name} ({number + 1} of {len(self.policies)})"):
                # loaded when its turn comes: several large backbones would not fit side by side
                policy = self.ready[name] if name in self.ready else self.data.policy(name)
                for gap in gaps:
                    yield self._fill(policy, gap, first)

    def _fill(self, policy: Any, gap: range, first: int) -> tuple[int, int, Tables]:
        start, began, told = gap.start, monotonic(), []
        entered = began
        for done, tables in self.data.batch_tables(policy, self.steps, range(gap.start - first, gap.stop - first)):
            told.append(tables)
            if monotonic() - began >= parts.SAVE_S and not self.ready:
                self._keep(start, first + done, joined(told))
                start, began, told = first + done, monotonic(), []
        self.seconds += monotonic() - entered
        return start, gap.stop, joined(told)

    def _keep(self, start: int, stop: int, tables: Tables) -> None:
        """Write the results of pieces."""
        if start < stop:
            with self.parts.section(start) as section:
                for name, table in tables.items():
                    table.to_parquet(section.folder / f"{name}.parquet", index=False)
                section.stop = stop

    def _tables(self, played: Iterable[tuple[int, int, Tables]]) -> Tables:
        """Join what was run now and what was kept, in the order of a run without interruption."""
        found = [(start, tables) for start, stop, tables in played if start < stop]
        for pieces, folder in self.parts.found():
            read = {
                file.stem: read_table(file).to_pandas(use_threads=False) for file in sorted(folder.glob("*.parquet"))
            }
            found.append((pieces.start, read))
        found.sort(key=lambda part: part[0])
        names = [self.policies[start // self.batches] for start, _ in found]
        return joined(
            {key: table.assign(policy=name) for key, table in tables.items()}
            for name, (_, tables) in zip(names, found, strict=True)
        )

    def _tell(self, tables: Tables, command: str | None) -> pd.DataFrame:
        """Write the results, print the table and where they lie; return the summary."""
        frame = tables["episodes"]
        summary = summarise(frame, self.data.metrics, self.policies)
        pairs = compare_pairs(frame, self.data.metrics, self.policies)
        out = self.out if command is None else free_place(self.out, RESULTS, command)
        write_results(out, summary, pairs, tables)
        if not is_quiet():
            counted = "windows" if "window" in frame else "episodes"
            # a bootstrap of one cluster knows nothing about others
            alone = frame["cluster"].nunique() < 2
            known = "(a 95 % interval needs two clusters at least)" if alone else "[95 % interval]"
            title = f"{summary['n'].iloc[0]} test {counted}, mean {known}"
            print_table(summary, pairs, self.data.metrics, "; ".join(filter(None, (title, self.data.note))))
        print(f"wrote {', '.join(['summary.csv', 'paired.csv', *(f'{key}.parquet' for key in tables)])} in {out}")
        return summary


def joined(tables: Iterable[Tables]) -> Tables:
    """Put tables of parts one below the other, those of each name."""
    named: dict[str, list[pd.DataFrame]] = {}
    for part in tables:
        for name, table in part.items():
            named.setdefault(name, []).append(table)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in named.items()}


def write_results(out: Path, summary: pd.DataFrame, pairs: pd.DataFrame, tables: Tables) -> None:
    """Write summary.csv, paired.csv and the tables as Parquet (policy first, measurements as float64) into a folder.

    All of them get their names at the end, one after the other: what lies there is of one evaluation.
    """
    with ExitStack() as stack:
        for name, table in (("summary.csv", summary), ("paired.csv", pairs)):
            table.to_csv(stack.enter_context(atomic(out / name)), index=False)
        for key, frame in tables.items():
            rows = frame.astype({name: "float64" for name in frame.select_dtypes("floating").columns})
            rows = rows.astype({"policy": "string"})[["policy", *rows.columns.drop("policy")]]
            rows.to_parquet(stack.enter_context(atomic(out / f"{key}.parquet")), index=False)


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
    """Write an estimate with its interval, if there is one; z is for no zero with a minus."""
    return f"{mean:z.3f}" if math.isnan(low) else f"{mean:z.3f} [{low:z.3f}, {high:z.3f}]"
