"""The report of a study: one CSV, one page, a picture a part."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from netllm_pl.compare import Run
from netllm_pl.drawing import pixels
from netllm_pl.paths import atomic
from netllm_pl.progress import in_words
from netllm_pl.study.figures import clock, draw
from netllm_pl.study.plan import Part, Plan
from netllm_pl.study.results import Found, collect, measured, rows, seconds, trained
from netllm_pl.timing import look_up

BENCHMARKED = {
    "language model, weights": "model.backbone_parameters",
    "language model, GB": "model.backbone_gb",
    "weights that learn": "model.trained_parameters",
    "samples/s": "training.samples_per_s",
    "peak memory, GB": "training.peak_memory_gb",
    "one prediction, ms": "prediction.single.median_ms",
    "one decision, ms": "decision.streaming.median_ms",
}
"""Numbers of `benchmark` in a study's report, as far as a file has them."""
REMARK = re.compile(r"<!-- remark -->.*?<!-- end of remark -->", re.DOTALL)
"""What someone wrote into a page; it stays there when the report is written again."""
SECTION = re.compile(r"^(?=## )", re.MULTILINE)


def write(plan: Plan, name: str, out: Path, warning: str = "", command: str = "") -> list[Path]:
    """Write NAME.csv, NAME.md, NAME.png of the first part and NAME_PART.png of others; TensorBoard has pictures, too.

    Args:
        plan: The study, of which as much as there is is told.
        name: What it is called.
        out: Folder of the files.
        warning: What stands above all else.
        command: As the page repeats it; none is that of a study of ours.

    Returns:
        The files.
    """
    first = next(iter(plan.study.parts), None)
    found, runs = collect(plan), trained(plan)
    pictures: dict[str, Path] = {}
    for part, told in found.items():
        figure = draw(plan, plan.parts[part], told, runs)
        if figure is None:
            continue
        pictures[part] = out / (f"{name}.png" if part == first else f"{name}_{part}.png")
        with atomic(pictures[part]) as file:
            figure.savefig(file, dpi=110, format="png")
        _show(plan.home, part, pixels(figure))
    table, page = out / f"{name}.csv", out / f"{name}.md"
    with atomic(table) as file:
        rows(found).to_csv(file, index=False, float_format="%.6g")
    old = page.read_text() if page.is_file() else ""
    with atomic(page) as file:
        file.write_text(_remarked(_page(plan, name, found, runs, pictures, warning, command), old))
    return [table, page, *pictures.values()]


def _show(home: Path, part: str, image: Any) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(home / "tensorboard")) as writer:
        writer.add_image(f"study/{part}", image, dataformats="HWC")


def _page(
    plan: Plan,
    name: str,
    found: Mapping[str, Mapping[str, Found]],
    runs: Mapping[str, Sequence[Run]],
    pictures: Mapping[str, Path],
    warning: str,
    command: str,
) -> str:
    study = plan.study
    spent = seconds(plan.home)
    parts = [f"# {study.title}", f"**{warning}**" if warning else "", study.about.strip()]
    for part, told in found.items():
        parts.append(f"## {study.labels.get(part, part)}")
        parts += [_verdict(plan, plan.parts[part], told), plan.parts[part].note.strip()]
        if part in pictures:
            parts.append(f"![{study.labels.get(part, part)}]({pictures[part].name})")
        if told:
            parts += _tables(plan, plan.parts[part], told)
        if "progress" in plan.parts[part].figures:
            parts += _time_to_quality(plan, plan.parts[part], runs)
    parts += _costs(plan, runs, spent)
    kept = f"All numbers are in `{name}.csv`; runs, logs and episodes in `{plan.home}`."
    took = f"{len(spent)} commands, {in_words(sum(spent.values()))} in all if one after the other."
    command = command or f"python -m netllm_pl study {name}"
    parts += ["## Command", f"```bash\n{command}\n```", f"{took} {kept}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _remarked(page: str, old: str) -> str:
    """A page with the remarks of an old one: below the same heading; where that is gone, on top."""
    sections = SECTION.split(page)
    places = {section.partition("\n")[0]: place for place, section in enumerate(sections)}
    for section in SECTION.split(old):
        if remarks := "\n\n".join(REMARK.findall(section)):
            place = places.get(section.partition("\n")[0], 0)
            head, _, rest = sections[place].partition("\n\n")
            above = (head, rest.strip(), remarks) if place == 0 else (head, remarks, rest.strip())
            sections[place] = "\n\n".join(filter(None, above)) + "\n\n"
    return "".join(sections).rstrip() + "\n"


def _called(plan: Plan, name: str) -> str:
    """Label of a policy; of a run, too, whose checkpoint has one."""
    labels = plan.study.labels
    return labels.get(name) or next((labels[key] for key in labels if key.startswith(f"{name}/")), f"`{name}`")


def _verdict(plan: Plan, part: Part, found: Mapping[str, Found]) -> str:
    """Say first what the reference does not win."""
    if not found:
        return "Not measured yet."
    lines = []
    for setting, told in found.items():
        table = told.table[told.table["metric"] == told.main.name]
        sides: dict[str, list[str]] = {"loses to": [], "ties with": [], "beats": [], "cannot be told from": []}
        for row in table[table["policy"] != part.reference].itertuples():
            unknown = math.isnan(row.gain_low)
            how = "beats" if row.gain_low > 0 else "loses to" if row.gain_high < 0 else "ties with"
            sides["cannot be told from" if unknown else how].append(_called(plan, row.policy))
        said = "; ".join(f"{how} {', '.join(names)}" for how, names in sides.items() if names) or "stands alone"
        missing = f" (not evaluated: {', '.join(_called(plan, name) for name in told.missing)})" if told.missing else ""
        lines.append(f"* {setting}: {_called(plan, part.reference)} {said}{missing}.")
    return "\n".join(lines)


def _tables(plan: Plan, part: Part, found: Mapping[str, Found]) -> list[str]:
    first = next(iter(found.values()))
    direction = "more" if first.main.better == "max" else "less"
    count = ", ".join(f"{setting} {told.table['n'].iloc[0]}" for setting, told in found.items())
    named = _called(plan, part.reference)
    about = (
        f"`{first.main.name}`, {direction} is better; mean over seeds [95 % interval by bootstrap over clusters of "
        f"episodes], and by how much {named} is better, paired. Episodes: {count}."
    )
    names = list(dict.fromkeys(name for told in found.values() for name in told.episodes))
    lines = ["| | seeds | " + " | ".join(f"{s} | better by" for s in found) + " |"]
    lines.append("|---" * (2 + 2 * len(found)) + "|")
    for name in names:
        cells: list[str] = []
        seeds = ""
        for told in found.values():
            table = told.table[(told.table["metric"] == told.main.name) & (told.table["policy"] == name)]
            row = None if table.empty else table.iloc[0]
            seeds = seeds if row is None else str(row["seeds"])
            cells += ["", ""] if row is None else [_cell(row, "mean", "low", "high"), _gain(row, name, part)]
        bold = "**" if name == part.reference else ""
        lines.append(f"| {bold}{_called(plan, name)}{bold} | {seeds} | {' | '.join(cells)} |")
    return [about, "\n".join(lines), *_others(plan, found)]


def _others(plan: Plan, found: Mapping[str, Found]) -> list[str]:
    """Means of the other metrics, and of extra columns, by setting."""
    tables = []
    for setting, told in found.items():
        table = told.table[told.table["metric"] != told.main.name]
        if table.empty:
            continue
        wide = table.pivot(index="policy", columns="metric", values="mean").reindex(list(told.episodes))
        wide = wide[list(dict.fromkeys(table["metric"]))]
        lines = [f"| {setting} | {' | '.join(wide.columns)} |", "|---" * (1 + len(wide.columns)) + "|"]
        for name, row in wide.iterrows():
            lines.append(f"| {_called(plan, str(name))} | {' | '.join(_short(v) for v in row)} |")
        tables.append("\n".join(lines))
    return tables


def _time_to_quality(plan: Plan, part: Part, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """How long each training took to be as good in validation as the worst one at its best."""
    own = {policy.run: policy.name for policy in plan.policies(part) if policy.run in runs}
    curves: dict[str, list[tuple[Any, Any, float]]] = {}
    for run, name in own.items():
        for one in runs[run or ""]:
            metric, more = one.monitored
            ticks = clock(one)
            if metric not in one.curves or ticks is None:
                continue
            shown = one.curves[["step", metric]].dropna()
            share = one.curves.get("cost/playing_share")
            values = shown[metric].to_numpy() * (1 if more else -1)
            playing = float("nan") if share is None else float(share.mean())
            curves.setdefault(name, []).append((np.interp(shown["step"], *ticks), values, playing))
    if len(curves) < 2:
        return []
    best = {name: float(np.median([values.max() for _, values, _ in seeds])) for name, seeds in curves.items()}
    aim = min(values.max() for seeds in curves.values() for _, values, _ in seeds)
    played = any(not math.isnan(share) for seeds in curves.values() for _, _, share in seeds)
    heads = ["training", "best in validation", "time until it is as good as the worst of them"]
    heads += ["time that playing took"] * played
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, seeds in curves.items():
        took = [seconds[values >= aim][0] if (values >= aim).any() else math.inf for seconds, values, _ in seeds]
        median, share = float(np.median(took)), float(np.mean([playing for _, _, playing in seeds]))
        cells = [_called(plan, name), _short(abs(best[name])), in_words(median)]
        cells += ["" if math.isnan(share) else f"{100 * share:.0f} %"] * played
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    return [
        "\n".join(
            [*lines, "Medians over seeds; without validations, and without what recording experience took (below)."]
        )
    ]


def _costs(plan: Plan, runs: Mapping[str, Sequence[Run]], spent: Mapping[str, float]) -> list[str]:
    """What trainings took, what experience took, and what was measured."""
    parts = ["## Cost"]
    lines = ["| training | seeds | device | steps | time | samples/s | peak memory, GB | weights that learn |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, seeds in runs.items():
        table = pd.DataFrame([run.row() | _logged(run) for run in seeds])
        mean = table.select_dtypes("number").mean()
        share = mean.get("trainable_share")
        device = ", ".join(dict.fromkeys(str(run.note.get("device", "?")) for run in seeds))
        took = mean.get("train_s")
        cells = [
            _called(plan, name), str(len(seeds)), device, _short(mean["steps"]),
            "" if took is None or math.isnan(took) else in_words(took), _short(mean.get("samples_per_s")),
            _short(mean.get("peak_memory_gb")), "" if share is None or math.isnan(share) else f"{100 * share:.2f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    parts += ["\n".join(lines)] if runs else []
    pools = {
        name: [spent[title] for seed in plan.seeds(name) if (title := plan.title(name, seed)) in spent]
        for name in plan.study.runs
        if plan.kind(name) == "collect"
    }
    lines = ["| experience | commands | time, one after the other |", "|---|---|---|"]
    lines += [f"| `{name}` | {len(took)} | {in_words(sum(took))} |" for name, took in pools.items() if took]
    parts += ["\n".join(lines)] if len(lines) > 2 else []
    files = measured(plan)
    if files:
        columns = [
            key for key, place in BENCHMARKED.items() if any(_at(file, place) is not None for file in files.values())
        ]
        lines = [f"| measured alone | device | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        for name, file in files.items():
            numbers = " | ".join(_short(_at(file, BENCHMARKED[key])) for key in columns)
            lines.append(f"| {_called(plan, name)} | {file['environment']['device']} | {numbers} |")
        parts.append("\n".join(lines))
    return parts if len(parts) > 1 else []


def _logged(run: Run) -> dict[str, float]:
    """Costs of a training, from its metrics: the median speed, the peak of memory."""
    found = {}
    for column, take in (("samples_per_s", "median"), ("peak_memory_gb", "max")):
        if f"cost/{column}" in run.curves:
            found[column] = float(getattr(run.curves[f"cost/{column}"], take)())
    return found


def _at(file: Mapping[str, Any], place: str) -> float | None:
    try:
        return look_up(file, place)
    except (KeyError, TypeError):
        return None


def _cell(row: Any, mean: str, low: str, high: str) -> str:
    value = _short(row[mean])
    return value if math.isnan(row[low]) else f"{value} [{_short(row[low])}, {_short(row[high])}]"


def _gain(row: Any, name: str, part: Part) -> str:
    return "" if name == part.reference else _cell(row, "gain", "gain_low", "gain_high")


def _short(value: Any) -> str:
    if value is None or pd.isna(value):
        return ""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
