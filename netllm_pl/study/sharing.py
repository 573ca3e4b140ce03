"""Studies share what they train and record: the same command is not run again for another of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from netllm_pl.study.plan import Plan, Study
from netllm_pl.study.runner import Record

PLACES = ("--run_dir", "--out")
SHARED = {"fit": "*.ckpt", "collect": "manifest.json"}
"""Commands, and files without which their result is of no use."""


def shared(study: Study, home: Path, trained: Mapping[str, str], data: str) -> dict[str, str]:
    """Find runs that studies beside this one have made by the same commands from the same data.

    Args:
        study: What is asked.
        home: Folder of its runs; those of the others lie beside it.
        trained: What is taken from elsewhere anyway.
        data: Where the data sets lie, as `Record` says it.

    Returns:
        Folders by name of the run, with ``{seed}`` for the seed, `trained` among them. What this study has begun to
        make itself is not there, and neither is what others have made of some seeds only.
    """
    made = _made(home, data)
    found = dict(trained)
    while made:
        plan = Plan(study, home, found)
        new = {name: place for name in study.runs if (place := _place(plan, name, made))}
        if not new:
            break
        found |= new  # commands that name these folders may be known, too
    return found


def _made(home: Path, data: str) -> dict[tuple[str, ...], Path]:
    made: dict[tuple[str, ...], Path] = {}
    for file in sorted(home.parent.glob("*/jobs/*.json")):
        try:
            record = Record(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # of no use to this study; its own says what is broken
        if file.parent.parent == home or record.code != 0 or record.data != data or record.words[0] not in SHARED:
            continue
        words, folder = _apart(record.words)
        if any(folder.glob(SHARED[record.words[0]])):
            made.setdefault(words, folder)
    return made


def _apart(words: Sequence[str]) -> tuple[tuple[str, ...], Path]:
    """A command without the place of its result, and that."""
    at = next(at for at, word in enumerate(words) if word in PLACES)
    return (*words[:at], *words[at + 2 :]), Path(words[at + 1])


def _place(plan: Plan, name: str, made: Mapping[tuple[str, ...], Path]) -> str | None:
    if name in plan.trained or plan.kind(name) == "benchmark":
        return None
    places = set()
    for seed in plan.seeds(name):
        job = plan.jobs[plan.title(name, seed)]
        folder = made.get(_apart(job.words)[0])
        if folder is None or job.folder.exists():
            return None
        text, end = str(folder), f"_{seed}"
        places.add(text if seed is None or not text.endswith(end) else text.removesuffix(end) + "_{seed}")
    return places.pop() if len(places) == 1 else None
