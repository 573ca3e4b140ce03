"""Measures a task in one run: training, decisions or predictions, the task's own works, and the machine's ceilings.

The file holds ``environment``, ``settings``, ``model``, ``training`` (as the config says), ``batches`` (training with
other numbers of samples, on a GPU), ``decision`` and ``rollout`` (tasks that act) or ``prediction`` (others),
``quantised`` (a base of 4 bits, on a GPU), ``published_style`` (the same tokens and weights in the published way,
`netllm_pl.published`), ``works`` (what `NetDataModule.benchmarks` lists), ``ceilings``, ``scaling`` if it is asked for,
and ``ratios``. Names end in units; a median has a ``_range`` beside it, the smallest and largest repeat; a ratio says
of what to what it is.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from netllm_pl.acting import ActingTask
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError, at_least, unknown
from netllm_pl.fast_paths import hasten, nothing_recomputed, quantised, training_or_plain
from netllm_pl.machine import can_write, ceilings, environment
from netllm_pl.paths import atomic
from netllm_pl.progress import is_quiet, output, status
from netllm_pl.published import can_restate, published_style
from netllm_pl.quantize import weight_bytes, weight_count
from netllm_pl.scaling import check as check_scaling
from netllm_pl.scaling import scaling
from netllm_pl.speed import decisions, many_episodes, predictions, training_batches
from netllm_pl.task import NetTask
from netllm_pl.timing import Entry, Work, measure, ratio

FORMAT = 1
RATIOS = "ratios.json"
"""File of docs/results/benchmark with the ratios of all others there (`regression`)."""
TRAINER = ("accelerator", "precision", "gradient_clip_val")
"""What of a config's trainer counts for the speed of a step."""
PARTS = ("published", "training", "batches", "answers", "rollout", "ceilings", "works", "quantised")
"""What is measured, the published way first; ``answers`` are decisions or predictions."""
MORE = ("batches", "quantised")
"""Parts of which a CPU is asked only by name: what they show is of GPUs, and takes long there."""
LARGER = (1, 4, 12)
"""Sizes of batches that are tried, in those of the config."""
ABOUT = ("format", "environment", "settings", "ratios")
"""Parts of the file that the table leaves out, or prints in its own way."""


def run(
    task: NetTask,
    data: NetDataModule,
    out: Path,
    repeats: int = 5,
    quick: bool = False,
    trainer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    parts: Collection[str] | None = None,
    largest: int | None = None,
    fast: bool = True,
) -> Entry:
    """Measure, write the file, print a table and where the file lies.

    Args:
        task: What is trained and asked; its weights change.
        data: Its data.
        out: The JSON file.
        repeats: Measurements behind each median.
        quick: Measure for a shorter time, and fewer episodes.
        trainer: The trainer's part of a config, of which `TRAINER` counts.
        config: What to note as the configuration.
        parts: What to measure, of `PARTS`; null leaves out `MORE` on a CPU.
        largest: Also measure how cost grows with size (`netllm_pl.scaling`), up to this one; null does not.
        fast: On a GPU, take the fast paths that the config leaves open (`hasten`).

    Returns:
        What the file holds.
    """
    parts = chosen_parts(None) if parts is None else parts
    check(out, repeats, parts)
    if largest is not None:
        check_scaling(data, largest)
    settings = {name: value for name, value in (trainer or {}).items() if name in TRAINER and value is not None}
    device = torch.device("cuda" if torch.cuda.is_available() and settings.get("accelerator") != "cpu" else "cpu")
    with status("reading the data, recording experience"):
        len(data.dataset("train"))  # not part of the first step
        works = data.benchmarks()
    found: Entry = {
        "format": FORMAT,
        "environment": environment(device),
        "settings": {"repeats": repeats, "quick": quick, "parts": sorted(parts), "config": _noted(config)},
        "model": describe(task),
    }
    if "published" in parts and can_restate(task):
        with status("the published way"):
            found["published_style"] = _restated(task, data, repeats, quick, settings)
    if fast and device.type == "cuda" and task.backbone is not None:
        found["settings"]["fast_paths"] = hasten(task.backbone, settings)
    found["settings"]["trainer"] = settings
    if "training" in parts:
        with status("training"):
            found["training"], device = training_or_plain(task, data, repeats, quick, settings)
    if "batches" in parts:
        with status("training with larger batches"), nothing_recomputed(task):
            sizes = [data.batch_size * factor for factor in LARGER]
            found["batches"] = training_batches(task, data, sizes, repeats, quick, settings)
    task.to(device).eval()
    if "answers" in parts and isinstance(task, ActingTask):
        with status("single decisions"):
            found["decision"] = decisions(task, data, repeats)
    elif "answers" in parts:
        with status("predictions"):
            found["prediction"] = predictions(task, data, repeats, quick)
    if "rollout" in parts and isinstance(task, ActingTask):
        with status("many episodes"):
            found["rollout"] = many_episodes(task, data, 20 if quick and device.type == "cpu" else 100, repeats)
    if "ceilings" in parts:
        with status("the machine"):
            dtype = torch.float32 if task.backbone is None else task.backbone.dtype
            found["ceilings"] = ceilings(device, dtype, repeats, quick)
        if task.backbone is not None:  # each answer reads all of its weights
            read = found["model"]["backbone_gb"] / found["ceilings"]["copy_gb_per_s"]
            found["ceilings"]["weights_read_ms"] = 1000 * read
    if "works" in parts:
        with status("the task's own works"):
            found["works"] = measure(works, repeats, 0.1 if quick else 0.5)
    if largest is not None:
        with status("growing numbers of episodes and steps"):
            found["scaling"] = scaling(task, data, largest)
    if "quantised" in parts and can_restate(task):
        with status("a base of 4 bits"):
            found["quantised"] = quantised(task, data, repeats, quick, settings)
    found["ratios"] = ratios(found, works)
    with atomic(out) as temporary:
        temporary.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    if not is_quiet():
        print_table(found)
    print(f"wrote {out}")
    return found


def _restated(task: NetTask, data: NetDataModule, repeats: int, quick: bool, settings: Mapping[str, Any]) -> Entry:
    """Measure the published way; that it does not fit into memory is a result, too."""
    try:
        return published_style(task, data, repeats, quick, settings)
    except (UserError, torch.OutOfMemoryError) as error:
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        return {"out_of_memory": True}


def chosen_parts(words: str | None, published: bool = True) -> list[str]:
    """Return what to measure.

    Args:
        words: Names with commas; null for all, without `MORE` on a CPU.
        published: Whether the published way is among them.
    """
    if words is None:
        parts = [part for part in PARTS if torch.cuda.is_available() or part not in MORE]
    else:
        parts = [part.strip() for part in words.split(",")]
    return [part for part in parts if published or part != "published"]


def check(out: Path, repeats: int, parts: Collection[str]) -> None:
    """Refuse what would fail only after everything has been measured.

    Raises:
        UserError: Nothing can be written there, there is nothing to take a median of, or a part is unknown.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS, "Give some of them to --parts, separated by commas.")
    at_least(1, "--", repeats=repeats)
    if not can_write(out):
        raise UserError(f"--out {out} cannot be written: give the path of a file, such as results/benchmark.json")


def describe(task: NetTask) -> Entry:
    """Say what is measured: class, and size of the language model."""
    found: Entry = {"task": type(task).__name__, "trained_parameters": _count(task, trained=True)}
    if task.published_overlay is not None:
        found["tokens_as_published"] = f"with --config {task.published_overlay}"
    if task.backbone is not None:
        config, model = task.backbone.config, task.backbone.model
        found |= {
            "backbone": config.name,
            "backbone_pretrained": config.pretrained,
            "backbone_layers": config.layers,
            "backbone_dtype": str(task.backbone.dtype).removeprefix("torch."),
            "backbone_parameters": _count(model),
            "backbone_gb": sum(map(weight_bytes, model.parameters())) / 1e9,
        }
    return found


def ratios(found: Mapping[str, Any], works: Mapping[str, Work]) -> Entry:
    """Divide what belongs together; a ratio whose parts were not measured is left out."""
    wanted = {
        "training_to_matmul": ("training.tflop_per_s", "ceilings.matmul_tflop_per_s"),
        "recomputation_to_streaming": ("decision.full_recomputation.median_ms", "decision.streaming.median_ms"),
        "decision_to_weights_read": ("decision.streaming.median_ms", "ceilings.weights_read_ms"),
        "prediction_to_weights_read": ("prediction.single.median_ms", "ceilings.weights_read_ms"),
        "best_training_to_matmul": ("batches.best.tflop_per_s", "ceilings.matmul_tflop_per_s"),
        "best_training_to_published": ("batches.best.samples_per_s", "published_style.training.samples_per_s"),
        "training_to_published": ("training.samples_per_s", "published_style.training.samples_per_s"),
        "published_memory_to_ours": ("published_style.training.peak_memory_gb", "training.peak_memory_gb"),
        "published_decision_to_streaming": ("published_style.decision.median_ms", "decision.streaming.median_ms"),
        "rollout_to_published": ("rollout.decisions_per_s", "published_style.decision.decisions_per_s"),
        "published_prediction_to_single": ("published_style.prediction.median_ms", "prediction.single.median_ms"),
    }
    if found.get("environment", {}).get("device_type") == "cpu":  # there it is the peak of both together
        del wanted["published_memory_to_ours"]
    for name, work in works.items():
        if work.beside is not None:
            other = works[work.beside]
            places = (f"works.{name}.{work.unit}_per_s", f"works.{work.beside}.{other.unit}_per_s")
            wanted[f"{name}_to_{work.beside}"] = places
    known = {place for place, _ in leaves(found)}
    return {name: ratio(found, *places) for name, places in wanted.items() if known.issuperset(places)}


def regression(folder: Path) -> dict[str, dict[str, float]]:
    """Collect the ratios of all files of a folder that `run` wrote, four digits each: what later runs are held against.

    Args:
        folder: It also holds ``ratios.json``, which is what this gives.

    Raises:
        UserError: A file is none of this format.
    """
    found: dict[str, dict[str, float]] = {}
    for file in sorted(set(folder.glob("*.json")) - {folder / RATIOS}):
        held = json.loads(file.read_text())
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise UserError(f"{file} is no benchmark of format {FORMAT}; measure it again")
        found[file.stem] = {name: float(f"{entry['ratio']:.4g}") for name, entry in held["ratios"].items()}
    return found


def leaves(entries: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is measured with its place, with dots."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def print_table(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the medians and, below, the ratios."""
    console = console or output()
    about = found["environment"]
    table = Table(title=f"{about['device']}, torch {about['torch']}, threads: {about['torch_threads']}")
    table.add_column("measured", no_wrap=True)
    table.add_column("median", justify="right")
    table.add_column("spread", justify="right")
    places = dict(leaves({name: part for name, part in found.items() if name not in ABOUT}))
    for place, value in places.items():
        if isinstance(value, float):
            low, high = places.get(f"{place}_range", (None, None))
            table.add_row(place, _number(value), "" if low is None else f"{100 * (high - low) / value:.0f} %")
    console.print(table)
    for entry in found["ratios"].values():
        console.print(f"{entry['of']} / {entry['to']} = {_number(entry['ratio'])}", soft_wrap=True, highlight=False)


def _noted(config: Mapping[str, Any] | None) -> Any:
    """Write as text what JSON cannot hold, such as an infinite number."""
    return json.loads(json.dumps(config, default=str), parse_constant=str)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _count(module: torch.nn.Module, trained: bool = False) -> int:
    return sum(weight_count(weight) for weight in module.parameters() if weight.requires_grad or not trained)
