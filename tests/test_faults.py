"""Whatever ends a command, at whatever moment: no half-written file is taken for a whole one, and nothing is lost.

Here each command is hit a few times. `NETLLM_NIGHTLY=1 pytest tests/test_faults.py` hits those of all tasks more than a
hundred times, in about ten minutes; `NETLLM_SEED` draws other moments.
"""

import http.server
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from faults import Fault, Measured, Runner, check_whole, draw

from netllm_pl.compare import read_curves
from netllm_pl.experience import read_pool

NIGHTLY = os.environ.get("NETLLM_NIGHTLY", "0") != "0"
SEED = int(os.environ.get("NETLLM_SEED", "0"))
KINDS = ("kill", "term", "interrupt", "full", "memory")
FIT, OTHER = (18, 18) if NIGHTLY else (4, 2)
"""Faults of a run of `fit`, and of each of the other commands."""

LLM: dict[str, Any] = {
    "name": "llama", "pretrained": False, "dtype": "float32", "lora": {"rank": 2, "dropout": 0.1},
    "config": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32,
    },
}  # fmt: skip
VISION = {
    "name": "vit",
    "config": {
        "image_size": [8, 16], "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    },
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "viewport_prediction": {"vision": VISION, "stretch": 0.2, "width": 16},
    "adaptive_bitrate": {},
    "job_scheduling": {},
}
DATA: dict[str, dict[str, Any]] = {
    "viewport_prediction": {
        "synthetic": {"videos": 3, "users": 6, "seconds": 32, "picture_height": 8, "picture_width": 16},
        "batch_size": 4, "train_step": 10, "eval_batch_size": 3,
    },
    "adaptive_bitrate": {
        "synthetic": {"traces": 6, "duration_s": 60}, "rules": {"chunks": 8}, "valid_starts": 1, "lookahead": 5,
        "experience": {"policies": "bba,rate", "episodes": 16, "eval_episodes": 2, "explore": 0.3,
            "values": "hindsight"},
        "window": 8, "batch_size": 4, "eval_batch_size": 2,
    },
    "job_scheduling": {
        "synthetic": {"queries": 4, "sizes": ["2g", "5g"]}, "rules": {"jobs": 3, "executors": 6},
        "experience": {"policies": "fair", "episodes": 4, "eval_episodes": 1, "explore": 0.1, "values": "lookahead"},
        "window": 2, "test_seeds": [1, 2, 3], "valid_seeds": [11], "batch_size": 8, "eval_batch_size": 1,
    },
}  # fmt: skip
CLASSES = {
    "viewport_prediction": "ViewportPrediction", "adaptive_bitrate": "AdaptiveBitrate",
    "job_scheduling": "JobScheduling",
}  # fmt: skip


def config_of(task: str, folder: Path) -> str:
    """Write the configuration of a small run: 8 steps, about 2 epochs, an average of the weights, dropout."""
    optimizer = {"lr": 3e-3, "ema": 0.9}
    tree = {
        "seed_everything": 3,
        "model": {"class_path": CLASSES[task], "init_args": {"backbone": LLM, "optimizer": optimizer, **MODELS[task]}},
        "data": {"class_path": f"{CLASSES[task]}Data", "init_args": DATA[task]},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": 8, "val_check_interval": 2, "log_every_n_steps": 1,
            "gradient_clip_val": 1.0, "enable_progress_bar": False, "enable_model_summary": False,
        },
        "save_every": 1,
    }  # fmt: skip
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    (tmp_path / "work").mkdir()
    return Runner(tmp_path / "work", tmp_path / "work" / "cache")


def faults(number: int, task: str) -> Iterator[Fault]:
    """Draw so many, of all kinds in turn, kills most."""
    rng = np.random.default_rng([SEED, *task.encode()])
    for turn in range(number):
        yield draw(rng, KINDS[(turn + SEED) % len(KINDS)])


TASKS = tuple(CLASSES) if NIGHTLY else ("viewport_prediction",)


@pytest.mark.parametrize("task", TASKS)
def test_training_goes_on_to_the_same_bits(task: str, runner: Runner, tmp_path: Path) -> None:
    config, cut, work = config_of(task, tmp_path), runner.folder / "cut", runner.folder
    fit = ["fit", "--config", config, "--run_dir"]
    whole = runner([*fit, str(work / "whole")])
    whole = runner([*fit, str(work / "measured")])
    shutil.rmtree(work / "measured")
    for fault in faults(FIT, f"fit {task}"):
        last = cut / "last.ckpt"
        if not last.exists():
            shutil.rmtree(cut, ignore_errors=True)
        more = ["--ckpt_path", str(last)] if last.exists() else []
        if fault.kind == "memory":
            shutil.rmtree(runner.cache, ignore_errors=True)  # from time to time without what earlier runs have kept
        runner([*fit, str(cut), *more], fault, whole)
        check_whole(work)
        if last.exists() and torch.load(last, weights_only=True)["global_step"] == 8:
            shutil.rmtree(cut)
    last = cut / "last.ckpt"
    if not last.exists():
        shutil.rmtree(cut, ignore_errors=True)
    runner([*fit, str(cut), *(["--ckpt_path", str(last)] if last.exists() else [])])
    same_run(work / "whole", cut, faults=runner.hits)
    assert runner.hits >= FIT // 2


def same_run(first: Path, second: Path, faults: int) -> None:
    """The ends of two runs are equal in every bit, their tables and curves too."""
    one, two = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (first, second))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(one[part], two[part]), part
    for name, state in one["callbacks"].items():
        if name.startswith(("MovingAverage", "ExactResume")):
            assert same(state, two["callbacks"][name]), name
    summaries = [pd.read_csv(folder / "summary.csv") for folder in (first, second)]
    for table in summaries:
        table["policy"] = [Path(name).name for name in table["policy"]]
    pd.testing.assert_frame_equal(*summaries)
    for name in ("train/loss", "val/loss"):
        one, two = (read_curves(folder).set_index("step")[name].dropna() for folder in (first, second))
        # What is logged of a step comes right behind its checkpoint: a kill between the two loses it.
        assert len(one) - len(two) <= faults and one[two.index].tolist() == two.tolist(), name
    assert not list(second.glob(".*")), "what killed processes left is cleared away"


def same(one: Any, two: Any) -> bool:
    """Whether trees of tensors and plain values are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def repeat(
    runner: Runner, words: list[str], out: Path, name: str, number: int, check: Callable[[], None],
    finished: Callable[[Path], bool] = lambda out: False,
) -> None:  # fmt: skip
    """Run a command until it ends, under faults, so often that so many faults were drawn.

    It may be hit when the results are there already, which ``finished`` tells.
    """
    whole = runner([*words, str(out)])
    check()
    whole = Measured(whole.seconds / 2, whole.operations, whole.largest, whole.memory)  # the first one starts slowly
    shutil.rmtree(out)
    for fault in faults(number, name):
        runner([*words, str(out)], fault, whole)
        check_whole(runner.folder)
        if runner.finished or finished(out):
            check()
            shutil.rmtree(out)
    runner([*words, str(out)])
    check()
    assert not list(out.parent.glob(f"{out.name}.parts")) and not (out / "parts").exists()


@pytest.mark.parametrize("task", TASKS[1:] or ("adaptive_bitrate",))
def test_a_collection_goes_on_to_the_same_pool(
    task: str, runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "own"))
    policies = {"adaptive_bitrate": "bba,robust_mpc", "job_scheduling": "fair,sjf"}[task]
    words = ["collect", "--config", config_of(task, tmp_path), "--policy", policies, "--episodes", "15"]
    words += ["--explore", "0.3", "--parallel", "4", "--seed", "5", "--out"]
    seen: list[tuple[pd.DataFrame, pd.DataFrame]] = []

    def check() -> None:
        pool = read_pool(runner.folder / "pool")
        seen.append((pool.episodes, pd.concat([pd.read_parquet(f) for f in sorted(pool.folder.glob("part-*"))])))
        for one, two in zip(seen[0], seen[-1], strict=True):
            assert one.to_json() == two.to_json()
        del seen[1:]

    repeat(runner, words, runner.folder / "pool", f"collect {task}", OTHER, check, Path.exists)


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_goes_on_to_the_same_table(task: str, runner: Runner, tmp_path: Path) -> None:
    policies = {"viewport_prediction": "static,ridge", "adaptive_bitrate": "bba,robust_mpc_published,rate"}
    words = [
        "evaluate",
        "--config",
        config_of(task, tmp_path),
        "--policies",
        policies.get(task, "fair,random"),
        "--out",
    ]
    seen: list[dict[str, bytes]] = []

    def check() -> None:
        folder = runner.folder / "results"
        seen.append({file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()})
        assert seen[0].keys() == seen[-1].keys()
        for name in ("summary.csv", "paired.csv"):
            assert seen[0][name] == seen[-1][name]
        one, two = (pd.read_parquet(io.BytesIO(files["episodes.parquet"])) for files in (seen[0], seen[-1]))
        pd.testing.assert_frame_equal(one, two)
        del seen[1:]

    repeat(runner, words, runner.folder / "results", f"evaluate {task}", OTHER, check)


@pytest.fixture
def archive() -> Iterator[tuple[str, dict[str, Any]]]:
    """Address of a server on this machine, and what it is to do: the ``body``, and where it is ``cut`` off."""
    state: dict[str, Any] = {"body": b"", "cut": None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, cut = state["body"], state["cut"]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            state["asked"] = state.get("asked", 0) + 1
            try:
                for start in range(0, len(body if cut is None else body[:cut]), 4096):
                    self.wfile.write(body[start : start + 4096][: None if cut is None else cut - start])
            except OSError:
                return  # whoever asked is dead

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/archive.tar.gz", state
    server.shutdown()
    server.server_close()


def published() -> bytes:
    """An archive that holds the layout of Jin2022, but other traces."""
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for user in range(1, 9):
            rows = np.column_stack([np.arange(600) / 5, rng.normal(size=(600, 3))])
            body = "\n".join(",".join(f"{value:.6f}" for value in row) for row in rows.tolist()).encode()
            path = f"NetLLM-0/viewport_prediction/data/viewports/Jin2022/video1/5Hz/simple_5Hz_user{user}.csv"
            member = tarfile.TarInfo(path)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def test_a_download_begins_again_and_is_whole(
    runner: Runner, archive: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is not the published data nothing is kept, of what was cut off neither."""
    url, state = archive
    state["body"] = published()
    data = runner.folder / "data"
    words = ["fetch", "jin2022", "--url", url, "--data_dir"]
    runner.any_sum = True
    seen: list[bytes] = []

    def check() -> None:
        (file,) = (file for file in data.rglob("*") if file.is_file() and ".partial" not in str(file))
        seen.append(file.read_bytes())
        assert seen[0] == seen[-1]

    repeat(runner, words, data, "fetch", OTHER, check)
    asked = state["asked"]
    runner([*words, str(data)])
    assert state["asked"] == asked, "what is there is not asked for again"
    shutil.rmtree(data)
    state["cut"] = len(state["body"]) // 2
    runner([*words, str(data)], fails="cannot download")
    assert not any(file.is_file() for file in data.rglob("*"))
    state["cut"] = None
    runner([*words, str(data)])
    check()
