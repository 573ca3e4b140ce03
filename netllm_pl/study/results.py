"""What the commands of a study left behind, as tables: means over seeds, paired differences, costs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse import Namespace

from netllm_pl.bootstrap import IDENTITY, Metric, summarise
from netllm_pl.compare import Run, read_run
from netllm_pl.data import NetDataModule
from netllm_pl.discovery import find_class
from netllm_pl.errors import UserError
from netllm_pl.study.plan import Part, Plan, Policy

COLUMNS = ["part", "setting", "policy", "seeds", "metric", "mean", "low", "high", "gain", "gain_low", "gain_high", "n"]
"""Of a study's CSV file: ``gain`` is by how much the reference is better than the policy, in any metric."""


@dataclass(frozen=True)
class Found:
    """What is known of one part in one setting.

    Attributes:
        metrics: The task's, the one that is compared first.
        episodes: Means over seeds by policy, the reference first: `IDENTITY` columns and the metrics'.
        table: `COLUMNS` but the first two.
        missing: Policies that have not been evaluated.
    """

    metrics: tuple[Metric, ...]
    episodes: dict[str, pd.DataFrame]
    table: pd.DataFrame
    missing: list[str]

    @property
    def main(self) -> Metric:
        """The metric that counts."""
        return self.metrics[0]


def collect(plan: Plan) -> dict[str, dict[str, Found]]:
    """Read the evaluations of all parts and settings that have any, the reference's among them."""
    found: dict[str, dict[str, Found]] = {}
    for name, part in plan.parts.items():
        settings = {setting: _setting(plan, name, part, setting) for setting in part.settings}
        found[name] = {setting: told for setting, told in settings.items() if told is not None}
    return found


def rows(found: dict[str, dict[str, Found]]) -> pd.DataFrame:
    """All tables one below the other, with `COLUMNS`."""
    tables = [
        told.table.assign(part=part, setting=setting)
        for part, settings in found.items()
        for setting, told in settings.items()
    ]
    return pd.concat(tables, ignore_index=True)[COLUMNS] if tables else pd.DataFrame(columns=COLUMNS)


def trained(plan: Plan) -> dict[str, list[Run]]:
    """Read the folders of runs of `fit`, one a seed, by name; what cannot be read is left out."""
    found: dict[str, list[Run]] = {}
    for name in plan.study.runs:
        for seed in plan.seeds(name) if plan.kind(name) == "fit" else []:
            folder = plan.folder(name, seed)
            try:
                run = read_run(folder.parent if folder.suffix else folder)
            except UserError:
                continue
            found.setdefault(name, []).append(run)
    return found


def measured(plan: Plan) -> dict[str, dict[str, Any]]:
    """Read what runs of `benchmark` wrote, by name."""
    found = {}
    for name in plan.study.runs:
        file = plan.folder(name, None) / "benchmark.json"
        if plan.kind(name) == "benchmark" and file.is_file():
            found[name] = json.loads(file.read_text())
    return found


def _setting(plan: Plan, name: str, part: Part, setting: str) -> Found | None:
    data = _data_class(plan.options(part, setting))
    told, missing = {}, []
    seeds: dict[str, int] = {}
    for policy in plan.policies(part):
        frames = _episodes(plan, name, part, setting, policy)
        if frames is None:
            missing.append(policy.name)
            continue
        told[policy.name], seeds[policy.name] = _mean(frames, policy.name), len(frames)
    if part.reference not in told:
        return None
    told = {part.reference: told[part.reference], **told}
    metrics = data.metrics if part.main is None else (Metric(part.main, part.main), *data.metrics)
    table = _summary(told, metrics, part.extra).assign(seeds=lambda frame: frame["policy"].map(seeds))
    return Found(metrics, told, table, missing)


def _data_class(options: Sequence[str]) -> type[NetDataModule]:
    """Class of the data of a command line of `evaluate`."""
    from netllm_pl.commands import task_parser

    parser = task_parser("evaluate", None)
    parser.add_argument("--seed_everything", type=Any, default=None)  # which configs name
    config: Namespace = parser.read(list(options))
    return find_class(NetDataModule, config.data.class_path.rpartition(".")[2], "data module")  # type: ignore[type-abstract]


def _episodes(plan: Plan, name: str, part: Part, setting: str, policy: Policy) -> list[pd.DataFrame] | None:
    """One frame a seed; None if one is missing."""
    group = next(line for line in part.policies if policy.name in [each.strip() for each in line.split(",")])
    file = plan.place(name, setting, group) / "episodes.parquet"
    if not file.is_file():
        return None
    frame = pd.read_parquet(file)
    frames = [frame[frame["policy"] == weights].reset_index(drop=True) for weights in policy.weights.values()]
    return None if any(one.empty for one in frames) else frames


def _mean(frames: Sequence[pd.DataFrame], name: str) -> pd.DataFrame:
    """Average the same episodes over seeds."""
    identity = [column for column in IDENTITY if column in frames[0]]
    if not all(frame[identity].equals(frames[0][identity]) for frame in frames):
        raise UserError(f"the seeds of {name} were not evaluated on the same episodes; remove its evaluation")
    numbers = [column for column in frames[0].select_dtypes("number") if column not in identity]
    return frames[0][identity].join(sum(frame[numbers] for frame in frames) / len(frames)).assign(policy=name)


def _summary(told: dict[str, pd.DataFrame], metrics: Sequence[Metric], extra: Sequence[str]) -> pd.DataFrame:
    """Means with intervals, and how much better the first policy is than each."""
    found = summarise(pd.concat(told.values(), ignore_index=True), metrics, list(told))
    for column in extra:
        # What one command evaluated together has the columns of all of them.
        some = {name: frame for name, frame in told.items() if column in frame and frame[column].notna().all()}
        if some:
            more = summarise(pd.concat(some.values(), ignore_index=True), [Metric(column, column)], list(some))
            found = pd.concat([found, more], ignore_index=True)
    # `summarise` says by how much a policy is better than the first: the other way round here, as that is the question
    found["gain"], found["gain_low"], found["gain_high"] = (
        0.0 - found[column] for column in ("paired_mean", "paired_high", "paired_low")
    )
    return found.drop(columns=["paired_mean", "paired_low", "paired_high"])


def seconds(home: Path) -> dict[str, float]:
    """How long each command took, by name of its job."""
    notes = {file.stem: json.loads(file.read_text()) for file in sorted((home / "jobs").glob("*.json"))}
    return {name: float(note["seconds"]) for name, note in notes.items()}
