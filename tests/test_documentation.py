"""Every block of code in README, CONTRIBUTING, docs and the tasks' READMEs is run, or read by what would run it.

Bash expands the blocks of a page, with programs in place of the real ones that only note how they were called. Every
command of ours that comes out is read by the parser and run, small: those on public data on a part of them where they
are found; the language model is fetched from an index on this machine, which has a tiny one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import yaml
from jsonargparse import Namespace
from matplotlib.figure import Figure
from packaging.requirements import Requirement
from test_cli import EPISODES, SMALL
from test_fetch import local_index, offer, tiny_llama, write_gguf
from test_published_pool import Varied, published, save, simulator

from netllm_pl.cli import COMMANDS, main
from netllm_pl.collect import collect
from netllm_pl.data import NetDataModule
from netllm_pl.discovery import concrete_subclasses, discover
from netllm_pl.fetch import SOURCES
from netllm_pl.parsing import Parser
from netllm_pl.rollout import rollout
from netllm_pl.side_by_side import without_devices
from tasks.adaptive_bitrate import AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces

ROOT = Path(__file__).parents[1]
FOUND = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("tasks/*/README.md")]
PAGES = sorted(str(page.relative_to(ROOT)) for page in FOUND)
FENCED = re.compile(r'^( *)```(\w*)(?: title="([^"]+)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(python\s-m\snetllm_pl\s[^`]+)`")
OURS = ["python", "-m", "netllm_pl"]
LAUNCHERS = ("torchrun", "srun")
"""Start several processes of a command of ours, of which one is run."""
TOOLS = (*LAUNCHERS, "pip", "pre-commit", "pytest", "ruff", "mypy", "mkdocs", "tensorboard")
NOTE = r"""#!/bin/bash
printf '%s\x1f' "${0##*/}" "$@" >> "$CALLS"; printf '\x1e' >> "$CALLS"
if [[ "$*" =~ ^-m\ venv\ (.+) ]]; then mkdir -p "${BASH_REMATCH[1]}/bin"; touch "${BASH_REMATCH[1]}/bin/activate"; fi
if [[ "$*" =~ \ fit\ .*--run_dir\ ([^ ]+) ]]; then
    run=${BASH_REMATCH[1]}; mkdir -p "$run"; touch "$run/best.ckpt" "$run/last.ckpt"
    if [[ "$*" =~ --config\ ([^ ]+) ]]; then cp -n "${BASH_REMATCH[1]}" "$run/config.yaml"; fi
fi
if [[ "$*" =~ \ (collect|export)\ .*--out\ ([^ ]+) ]]; then mkdir -p "${BASH_REMATCH[2]}"; fi
"""
"""Stands for a program: notes how it was called, and leaves the checkpoints and folders that the real one would."""
PUBLIC = re.compile(r"(fcc|jin2022|jin2022_baseline|tpch)\.yaml|/public_data/| fetch (jin2022|wu2017|tpch) ")
"""Needs public data, of which some are enough; what is there is not fetched."""
ELSEWHERE = {
    "docs/adding_a_task.md": "test_adding_a_task.py",
    "docs/tensorboard.md": "test_cli.py, test_tensorboard.py",
}
"""Pages whose commands other tests run: with data of their own; or their configs, as these commands take long."""
FEW_STEPS = """--data.init_args.batch_size 4 --trainer.accelerator cpu --trainer.limit_train_batches 2
    --trainer.limit_val_batches 1 --trainer.limit_test_batches 1 --trainer.val_check_interval 2"""


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    title: str
    text: str


class Parsed(BaseException):
    """Ends a command as soon as its command line has been read."""


@cache
def blocks(page: str) -> list[Block]:
    return [Block(*match.groups(default="")[1:]) for match in FENCED.finditer((ROOT / page).read_text())]


def titled(block: Block) -> bool:
    """Whether it shows a piece of a file of the repository, not a file that the reader is to write."""
    return bool(block.title) and (ROOT / block.title).is_file()


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[list[list[str]]]]]:
    """What bash makes of a page: the folder it worked in, and of each block the programs called, word by word."""
    programs = tmp_path_factory.mktemp("programs")
    for name in ("python", *TOOLS):
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)

    @cache
    def run(page: str) -> tuple[Path, list[list[list[str]]]]:
        folder = prepared(tmp_path_factory.mktemp("page"), page)
        notes = folder / "calls"
        lines = [f"printf '\\x1d' >> {notes}\n{text if kind == 'bash' else ''}" for kind, _, text in blocks(page)]
        variables = {"PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(notes), "NETLLM_DATA": "/public_data"}
        script = "set -euo pipefail\n" + "\n".join(lines)
        done = subprocess.run(["/bin/bash", "-c", script], cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{page}: {done.stderr}"
        text = notes.read_text() if notes.exists() else ""
        parts = [part.split("\x1e")[:-1] for part in text.split("\x1d")[1:]]
        return folder, [[call.split("\x1f")[:-1] for call in part] for part in parts]

    return run


def prepared(folder: Path, page: str) -> Path:
    """Give a page's folder the repository's configs, files that the page shows, and data that its reader has."""
    (folder / "configs").symlink_to(ROOT / "configs")
    if page.startswith("docs/results/"):
        shutil.copytree((ROOT / page).parent, (folder / page).parent)  # which some pages read and write
    for block in blocks(page):
        if block.title and not titled(block):
            (folder / block.title).write_text(block.text)
    if page == "docs/questions.md":
        time, random = np.arange(60.0), np.random.default_rng(0)
        for split, count in {"train": 4, "valid": 2, "test": 2}.items():
            (folder / "my_traces" / split).mkdir(parents=True)
            for number in range(count):
                rows = zip(time, random.uniform(0.5, 4, 60), strict=True)
                lines = [f"{second} {mbps:.3f}\n" for second, mbps in rows]
                (folder / "my_traces" / split / f"{split}{number}").write_text("".join(lines))
        seconds = np.arange(150) / 5
        angles = {"t": seconds, "roll": 0 * seconds, "pitch": 0 * seconds, "yaw": seconds}
        views = [pd.DataFrame({"video": video, "user": user, **angles}) for video in (1, 2, 3, 4) for user in (1, 2)]
        pd.concat(views).to_parquet(folder / "my_views.parquet")
        save(published(rollout(simulator(), Varied(), [0, 1], record=True)), folder / "exp_pool.pkl")
    if page == "docs/results/benchmark/README.md":
        few = AdaptiveBitrateData(synthetic=SyntheticTraces(traces=6, duration_s=60), rules=Rules(chunks=10))
        collect(few, {"bba": 1.0}, 6, folder / "pools" / "p1", values="hindsight")
    if page == "docs/results/viewport_jin2022/README.md":
        for setting in ("default", "unseen1", "unseen2", "unseen3"):
            learned = [f"runs/{name}_{seed}/best.ckpt" for name in ("gru15", "gru", "gruaug", "llm") for seed in "01"]
            rows = [
                (name, window, window // 2, window + len(name)) for name in ["static", *learned] for window in range(4)
            ]
            (folder / "results" / setting).mkdir(parents=True)
            table = pd.DataFrame(rows, columns=["policy", "window", "cluster", "mae_deg"])
            table.to_parquet(folder / "results" / setting / "episodes.parquet")
    return folder


def read(words: list[str]) -> Namespace | None:
    """Let the parser read a command line; None if it asked for help or for the configuration."""
    original = Parser.read

    def stop(self: Parser, options: Any) -> Namespace:
        raise Parsed(original(self, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "read", stop)
        try:
            main([*words, "--debug"])
        except Parsed as parsed:
            config: Namespace = parsed.args[0]
            return config.get(words[0], config)
        except SystemExit as ended:
            assert ended.code in (0, None)
            return None
    raise AssertionError(f"{words[0]} read no command line")


def commands(calls: list[list[str]]) -> list[list[str]]:
    """Those of ours: the words behind `python -m netllm_pl`, whoever starts it."""
    started = [call for call in calls if call[:3] == OURS or (call[0] in LAUNCHERS and "netllm_pl" in call)]
    return [call[call.index("netllm_pl") + 1 :] for call in started]


def without_numbers(words: list[str]) -> str:
    """Equal for commands of a loop, which differ in seeds."""
    return re.sub(r"\d+", "0", " ".join(words))


def check_names(words: list[str], config: Namespace) -> None:
    """Policies are known, and checkpoints those of an earlier command; what is fetched is known, too."""
    if words[0] == "fetch":
        discover()
        assert config.name in SOURCES
    policies = config.get("policies") or config.get("policy") or ""
    for name in filter(None, policies.split(",")):
        data = concrete_subclasses(NetDataModule)[config.data.class_path.rpartition(".")[2]]
        name = name.partition(":")[0]
        assert Path(name).exists() if "/" in name else name in data.baselines, f"{name} of {shlex.join(words)}"
    for name in filter(None, (config.get("ckpt_path"), config.get("checkpoint"), *config.get("runs", ()))):
        assert Path(name).exists(), f"{name} of {shlex.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_of_a_kind_that_is_checked(page: str) -> None:
    assert (ROOT / page).read_text().count("```") == 2 * len(blocks(page)), "not closed, or a malformed first line"
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml", "json", "text"), block
        if titled(block):
            assert f"\n{block.text}" in f"\n{(ROOT / block.title).read_text()}", f"{block.title} holds no such lines"
        elif block.language in ("yaml", "json"):
            yaml.safe_load(block.text) if block.language == "yaml" else json.loads(block.text)
            scripts = [text for kind, _, text in blocks(page) if kind == "bash"]
            assert block.title and any(f" {block.title} " in text for text in scripts), (
                f"nothing reads it: {block.text}"
            )
        elif block.language == "text":
            assert all((ROOT / line.split()[0]).exists() for line in block.text.splitlines())


@pytest.mark.parametrize("page", [page for page in PAGES if "```bash" in (ROOT / page).read_text()])
def test_each_command_is_one_that_the_parser_takes(page: str, called: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = called(page)
    monkeypatch.chdir(folder)
    found = {without_numbers(words): words for block in calls for words in commands(block)}
    assert found or page == "CONTRIBUTING.md"
    for words in found.values():
        config = read(words)
        if config is not None:
            check_names(words, config)


@pytest.mark.parametrize("page", [page for page in PAGES if "```bash" in (ROOT / page).read_text()])
def test_other_programs_come_with_the_project(page: str, called: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought = {Requirement(text).name for text in [*project["dependencies"], *chain(*extras.values())]}
    for name, *words in (call for block in called(page)[1] for call in block if call[:3] != OURS):
        if name == "pip":
            assert words[0] == "install" and (ROOT / words[words.index("-c") + 1]).is_file()
            chosen = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[words.index("-e") + 1])
            assert chosen and set((chosen[1] or "").split(",")) - {""} <= extras.keys()
        elif name == "python":
            assert words[:2] == ["-m", "venv"]
        elif name == "torchrun":  # comes with torch
            from torch.distributed.run import parse_args

            parsed = parse_args(words)
            assert parsed.module and parsed.training_script == "netllm_pl"
        elif name == "srun":  # of the cluster
            assert words[words.index("python") :][:3] == OURS
        else:
            assert name in brought, name


def small(words: list[str]) -> list[str]:
    """The same command with few steps, few data and a tiny language model."""
    if words[0] == "study":  # which tests/test_study.py runs
        return [*words, "--list"]
    config = read(words)
    if config is None or "data" not in config:
        return words
    more = [*SMALL.get(config.data.class_path.rpartition(".")[2], [])]
    if words[0] != "collect":
        more += EPISODES if config.data.init_args.get("experience") else []
    if words[0] == "benchmark":
        more += ["--backbone", str(ROOT / "configs" / "llm" / "tiny_random.yaml"), "--trainer.accelerator", "cpu"]
        more += ["--quick", "--repeats", "1", *(["--scaling", "100"] if config.scaling else [])]
    if words[0] in ("fit", "validate", "test", "predict"):
        more += [*shlex.split(FEW_STEPS), "--trainer.max_steps", "4" if config.get("ckpt_path") else "2"]
        if config.model.init_args.get("backbone") and not config.model.init_args.backbone.full:
            more += ["--model.init_args.backbone", str(ROOT / "configs" / "llm" / "tiny_random.yaml")]
            more += ["--model.init_args.backbone.quantize", "null"]  # rows of the tiny one are shorter than a block
        if config.trainer.devices != "auto":
            more += ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto"]
    if words[0] == "collect":
        more += ["--episodes", "6", "--parallel", "3"]
    # tests/test_shards.py starts processes
    return [*(without_devices(words) if config.get("devices") else words), *more]


def made(words: list[str]) -> Path | None:
    """Folder of a run or pool that a command makes."""
    option = {"fit": "--run_dir", "collect": "--out"}.get(words[0])
    return Path(words[words.index(option) + 1]) if option in words else None


def with_code() -> list[Any]:
    """Pages with code that needs nothing, and again those with commands on public data."""
    pages = [page for page in PAGES if any(block.language != "text" for block in blocks(page))]
    also = [page for page in pages if re.search(PUBLIC.pattern + r"|\$NETLLM_DATA", (ROOT / page).read_text())]
    return [*((page, False) for page in pages), *((page, True) for page in also if page not in ELSEWHERE)]


@pytest.mark.parametrize(("page", "public"), with_code())
def test_commands_run(
    page: str,
    public: bool,
    called: Any,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(prepared(tmp_path, page))
    if public:
        monkeypatch.setenv("NETLLM_DATA", str(request.getfixturevalue("little_data")))
    elif "fetch smollm2-135m" in (ROOT / page).read_text():
        index = local_index(tmp_path / "index", monkeypatch)
        write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
        offer(index, "smollm2-135m", tmp_path / "tiny.gguf", monkeypatch)
    done: dict[str, Path | None] = {}
    for block, calls in zip(blocks(page), called(page)[1], strict=True):
        if block.language == "python" and not titled(block) and not public:
            names: dict[str, Any] = {}
            exec(compile(block.text, page, "exec"), names)
            if "figures" in names:
                watched = {"static": {"episodes": pd.DataFrame({"mae": [1.0, 2.0]})}}
                assert isinstance(names["figures"](None, watched)["errors"], Figure)
        for words in commands(calls) if page not in ELSEWHERE else ():
            text = f" {shlex.join(words)} "
            if bool(PUBLIC.search(text)) != public:
                continue
            like, place = without_numbers(words), made(words)
            if like not in done:
                done[like] = place
                run(small([word.replace("/public_data", os.environ.get("NETLLM_DATA", "")) for word in words]))
            elif place is not None and not place.exists():  # what a loop makes is made once
                place.symlink_to(done[like].resolve())
    capsys.readouterr()


@pytest.mark.parametrize("page", [page for page in PAGES if INLINE.search((ROOT / page).read_text())])
def test_commands_within_text_run_too(
    page: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(prepared(tmp_path, page))
    for command in INLINE.findall((ROOT / page).read_text()):
        words = shlex.split(command)[3:]
        if len(words) == 1:
            assert words[0] in COMMANDS
            continue
        if words[0] == "fetch":
            monkeypatch.setenv("NETLLM_DATA", str(request.getfixturevalue("little_data")))
        words = small(words)
        if "--shard" in words or "--merge" in words:  # as many rounds of episodes as there are machines
            words += ["--episodes", "8", "--parallel", "1"]
        place = words.index("--shard") + 1 if "--shard" in words else 0
        count = int(words[place].partition("/")[2]) if place else 1
        for number in range(count):
            run([*words[:place], f"{number + 1}/{count}", *words[place + 1 :]] if place else words)


def run(words: list[str]) -> None:
    try:
        main([*words, "--quiet", "--debug"])
    except SystemExit as ended:
        assert ended.code in (0, None), shlex.join(words)


def dotted(file: Path) -> str:
    """Name of a module."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_the_site_builds_without_a_warning_and_shows_every_page_and_module(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site's builder comes with the extra 'docs'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    titles = {page: re.search(r"^# (.+)$", (ROOT / page).read_text(), re.MULTILINE) for page in PAGES}
    shown = {file.parent.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("index.html")}
    for page, title in titles.items():
        assert title and any(f">{title[1]}<" in text for text in shown.values()), page
    modules = chain(*((ROOT / package).rglob("[a-z]*.py") for package in ("netllm_pl", "tasks", "callbacks")))
    assert all((tmp_path / "reference" / dotted(file)).is_dir() for file in modules)
    assert "The language model; null for a learned baseline that has none" in shown[Path("reference/netllm_pl.task")]
