"""What a file of a study says, and the commands that it stands for."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from netllm_pl.errors import UserError, unknown
from netllm_pl.parsing import Parser, explain
from netllm_pl.plain_yaml import load_yaml
from netllm_pl.run_folder import BEST

FOLDER = Path("configs/study")
COMMANDS = ("fit", "collect", "benchmark")
"""What a run may be; a study evaluates by itself."""
OVERLAYS = ("generated", "quick")
"""Sections that change the others: for data that are generated, and for sizes that take seconds."""
NAME = re.compile(r"\{(\w+)\}")

Figures = Literal["bars", "factors", "extra", "cdf", "box", "curve", "progress"]


@dataclass(frozen=True)
class Run:
    """A command whose result others use: a training, a pool of experience, a measurement.

    Attributes:
        command: `fit`, `collect` or `benchmark` and options, without where the result goes. ``{seed}`` stands for the
            seed; ``{NAME}`` for a text of the study, or for the folder of another run, of the same seed if it has that;
            for pools for all of them, separated by commas.
        seeds: One run each; null takes the study's where the command has ``{seed}``, and else runs once.
        x: Where a point of a curve lies, such as the share of the data.
        line: Which curve it belongs to.
    """

    command: str
    seeds: list[int] | None = None
    x: float | None = None
    line: str | None = None


@dataclass(frozen=True)
class Part:
    """Policies that are compared on the same test data.

    Attributes:
        options: Of `evaluate`: the config of the task, with its data.
        policies: What is compared: names of baselines, or of runs, whose best checkpoint is taken unless it is
            ``RUN/last.ckpt``. Those of one line, separated by commas, are evaluated by one command.
        reference: The policy that all others are compared with.
        settings: Further options of `evaluate` by name of the setting.
        figures: What is drawn: the main metric (bars), the others (factors), what else is reported (extra), the main
            metric's distribution (cdf, box), over ``x`` (curve), and validations over the time of training (progress).
        shown: Policies in cdf and box; null takes all.
        main: Column of episodes.parquet to compare by, of which less is better; null takes the task's main metric.
        extra: Columns of episodes.parquet to report beside the metrics, where a policy has them.
        alone: Evaluate while nothing else runs, as times are measured.
        seeds: Of the runs' seeds, those that are evaluated; null takes all.
        x: What the axis of curves is called; ``log`` in front of it makes it logarithmic.
        note: What a reader must know, such as a leak; it stands above the tables.
    """

    options: str
    policies: list[str]
    reference: str
    settings: dict[str, str] = field(default_factory=lambda: {"default": ""})
    figures: list[Figures] = field(default_factory=lambda: ["bars"])
    shown: list[str] | None = None
    main: str | None = None
    extra: list[str] = field(default_factory=list)
    alone: bool = False
    seeds: list[int] | None = None
    x: str = ""
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, and what is compared.

    Attributes:
        title: Headline of the report.
        about: What stands below it.
        seeds: Of training.
        names: Texts that commands and options use as ``{NAME}``.
        runs: By name, in the order in which they begin.
        parts: By name.
        labels: What policies are called in the report, if not by their names.
        generated: Changes for generated data, which need nothing on the disk.
        quick: Further changes for sizes that take seconds.
    """

    title: str
    about: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    names: dict[str, str] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    generated: dict[str, Any] | None = None
    quick: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """One command of a study.

    Attributes:
        name: What it is called.
        words: The command line.
        needs: Jobs that must be done before.
        folder: Where its result lies.
        alone: Whether nothing else may run beside it.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    folder: Path
    alone: bool = False


@dataclass(frozen=True)
class Policy:
    """Something that is compared.

    Attributes:
        name: What the file calls it.
        weights: What `evaluate` is given for each seed: paths of checkpoints, or once the name of a baseline.
        run: The run that trained it; None of a baseline.
    """

    name: str
    weights: dict[int | None, str]
    run: str | None


def find(name: str) -> Path:
    """Return the file of a study: a path, or a name below configs/study."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"no file {path}; give a study below {FOLDER}, or the path of one")
    known = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    if name not in known:
        raise unknown("study", name, known, f"They lie in {FOLDER}; the path of a file is one too.")
    return known[name]


def read(file: Path, overlays: Iterable[str] = ()) -> Study:
    """Read a study.

    Args:
        file: Its YAML.
        overlays: Which of `OVERLAYS` to apply.

    Raises:
        UserError: It is no YAML, or not as `Study` says.
    """
    try:
        tree = load_yaml(file.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())[:200]}; it must be YAML") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no keys; a study has title, runs and parts")
    for name in overlays:
        tree = merged(tree, tree.get(name) or {})
    runs = tree.get("runs")
    if isinstance(runs, dict):
        tree["runs"] = {key: {"command": run} if isinstance(run, str) else run for key, run in runs.items()}
    parser = Parser()
    parser.add_class_arguments(Study, "study")
    try:
        study: Study = parser.instantiate(parser.parse_object({"study": tree})).study
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # argparse's own, and what constructors of dataclasses raise
        raise UserError(f"{file}: {explain(str(error)).replace('study.', '')}") from error
    _check(study, file)
    return study


def merged(tree: Any, over: Any) -> Any:
    """Lay one tree over another: dicts are joined, anything else is replaced; null takes an entry away."""
    if not isinstance(tree, dict) or not isinstance(over, dict):
        return over
    joined = {key: merged(tree[key], over[key]) if key in over and key in tree else tree.get(key) for key in tree}
    joined |= {key: value for key, value in over.items() if key not in tree}
    return {key: value for key, value in joined.items() if not (key in over and over[key] is None)}


def _check(study: Study, file: Path) -> None:
    for name, run in study.runs.items():
        word = expanded(run.command, study.names).partition(" ")[0]
        if word not in COMMANDS:
            raise UserError(f"{file}: runs.{name}: {unknown('command', word, COMMANDS)}")
        if run.seeds is not None and len(run.seeds) > 1 and "{seed}" not in expanded(run.command, study.names):
            raise UserError(f"{file}: runs.{name} has {len(run.seeds)} seeds, and no {{seed}} in its command")
        if name in study.names or name == "seed" or not NAME.fullmatch(f"{{{name}}}"):
            raise UserError(f"{file}: runs.{name}: take another name, of letters, digits and _, that nothing else has")
    for name, part in study.parts.items():
        listed = _listed(part)
        if part.reference not in listed:
            raise UserError(f"{file}: parts.{name}: {unknown('reference', part.reference, listed)}")
        for shown in part.shown or []:
            if shown not in listed:
                raise UserError(f"{file}: parts.{name}: {unknown('shown', shown, listed)}")


def expanded(text: str, names: Mapping[str, str]) -> str:
    """Put texts, which may name others, in the place of their names."""
    for _ in range(10):
        found = [name for name in NAME.findall(text) if name in names]
        if not found:
            return text
        text = NAME.sub(lambda match: names.get(match[1], match[0]), text)
    raise UserError(f"names.{found[0]} of the study names itself")


def _listed(part: Part) -> list[str]:
    return [name.strip() for line in part.policies for name in line.split(",")]


class Plan:
    """All commands of a study, and where their results go.

    Args:
        study: What is asked.
        home: Folder of the study's runs.
        trained: Folders or checkpoints of runs that need not be trained, by name; ``{seed}`` stands for the seed.
        parts: Which parts; null takes all.

    Attributes:
        jobs: By name, each behind those that it needs.
    """

    def __init__(
        self, study: Study, home: Path, trained: Mapping[str, str] | None = None, parts: Sequence[str] | None = None
    ) -> None:
        self.study, self.home, self.trained = study, home, dict(trained or {})
        for name in self.trained:
            if name not in study.runs:
                raise unknown("run", name, study.runs)
        for name in parts or []:
            if name not in study.parts:
                raise unknown("part", name, study.parts)
        self.parts = {name: part for name, part in study.parts.items() if parts is None or name in parts}
        self.jobs: dict[str, Job] = {}
        for name in study.runs:
            # A part needs what it compares; what no part compares, such as a measurement, belongs to all of them.
            if parts is None or self.kind(name) == "benchmark":
                self._add(name)
        for name, part in self.parts.items():
            for setting in part.settings:
                self._evaluate(name, part, setting)

    def policies(self, part: Part) -> list[Policy]:
        """Return what a part compares."""
        return [self._policy(name, part) for name in _listed(part)]

    def command(self, name: str) -> str:
        """Command of a run with the study's texts in it."""
        return expanded(self.study.runs[name].command, self.study.names)

    def kind(self, name: str) -> str:
        """Which of `COMMANDS` a run is."""
        return self.command(name).partition(" ")[0]

    def seeds(self, name: str) -> list[int | None]:
        """Seeds of a run; a single None if it has none."""
        run = self.study.runs[name]
        if run.seeds is not None:
            return list(run.seeds)
        return list(self.study.seeds) if "{seed}" in self.command(name) else [None]

    def folder(self, name: str, seed: int | None) -> Path:
        """Where the result of a run goes, or lies already."""
        if name in self.trained:
            return Path(self.trained[name].replace("{seed}", str(seed)))
        return self.home / "runs" / self.title(name, seed)

    def place(self, part: str, setting: str, group: str) -> Path:
        """Where the evaluation of some policies goes."""
        return self.home / "evaluations" / part / setting / re.sub(r"\W+", "_", group)

    def options(self, part: Part, setting: str) -> list[str]:
        """Options of `evaluate` for a setting."""
        return shlex.split(expanded(f"{part.options} {part.settings[setting]}", self.study.names))

    def _policy(self, name: str, part: Part) -> Policy:
        run, _, file = name.partition("/")
        if run not in self.study.runs:
            return Policy(name, {None: name}, None)
        chosen = [s for s in self.seeds(run) if part.seeds is None or s is None or s in part.seeds]
        paths = {seed: self.folder(run, seed) for seed in chosen}
        return Policy(name, {s: str(p if p.suffix == ".ckpt" else p / (file or BEST)) for s, p in paths.items()}, run)

    def _evaluate(self, name: str, part: Part, setting: str) -> None:
        groups = [[self._policy(each.strip(), part) for each in group.split(",")] for group in part.policies]
        # The reference first: without it a study that was stopped has nothing to report.
        order = sorted(range(len(groups)), key=lambda k: all(policy.name != part.reference for policy in groups[k]))
        for chosen, group in ((groups[k], part.policies[k]) for k in order):
            needs = [job for policy in chosen if policy.run for job in self._add(policy.run, [*policy.weights])]
            weights = ",".join(path for policy in chosen for path in policy.weights.values())
            folder = self.place(name, setting, group)
            words = ("evaluate", *self.options(part, setting), "--policies", weights, "--out", str(folder))
            title = f"{name}/{setting}/{group}"
            self.jobs[title] = Job(title, words, tuple(needs), folder, part.alone)

    def _add(self, name: str, seeds: Sequence[int | None] | None = None) -> list[str]:
        """Add the jobs of a run, of all seeds or some, behind those that they need; return their names."""
        if name in self.trained:
            return []
        titles = []
        kind, _, options = self.command(name).partition(" ")
        for seed in self.seeds(name) if seeds is None else seeds:
            title, folder = self.title(name, seed), self.folder(name, seed)
            titles.append(title)
            if title in self.jobs:
                continue
            needs: list[str] = []
            text = self._filled(options, name, seed, needs)
            where = {
                "fit": ["--run_dir", str(folder)],
                "collect": ["--out", str(folder)],
                "benchmark": ["--out", str(folder / "benchmark.json")],
            }
            words = (kind, *shlex.split(text), *where[kind])
            if kind == "fit" and "limit_test_batches" not in text:
                words += ("--trainer.limit_test_batches", "0")  # the study evaluates
            self.jobs[title] = Job(title, words, tuple(needs), folder, kind == "benchmark")
        return titles

    def _filled(self, text: str, name: str, seed: int | None, needs: list[str]) -> str:
        """Put in the seed and the folders of other runs, and note what is needed."""

        def of(match: re.Match[str]) -> str:
            other = match[1]
            if other == "seed":
                return str(seed)
            if other not in self.study.runs:
                raise UserError(f"runs.{name}: {unknown('name', other, [*self.study.names, *self.study.runs, 'seed'])}")
            if list(self.study.runs).index(other) >= list(self.study.runs).index(name):
                raise UserError(f"runs.{name} needs {other}, which must stand above it")
            seeds = self.seeds(other)
            if self.kind(other) != "collect" and len(seeds) > 1:
                if seed not in seeds:
                    raise UserError(f"runs.{name} needs {other} of seed {seed}, which has {seeds}")
                seeds = [seed]
            needs.extend(title for title in self._add(other) if title in {self.title(other, s) for s in seeds})
            return ",".join(str(self.folder(other, each)) for each in seeds)

        return NAME.sub(of, text)

    @staticmethod
    def title(name: str, seed: int | None) -> str:
        """Name of the job of a run and seed."""
        return name if seed is None else f"{name}_{seed}"
