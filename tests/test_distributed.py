"""Several processes train, validate, predict and go on as one does; when one dies, all end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from several import free_port, in_processes
from test_cli import words as small_run

from netllm_pl import launch
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.progress import is_first
from netllm_pl.run import CLI, prepare
from netllm_pl.task import NetTask

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)
ROOT = Path(__file__).parent.parent
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 16,
}  # fmt: skip
LORA = {"rank": 2, "dropout": 0.0}
BACKBONE = {"name": "llama", "pretrained": False, "dtype": "float32", "config": SHAPE, "lora": LORA}
OPTIMIZER = {"lr": 3e-3, "schedule": "constant", "warmup": 0.0}
PARTS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "viewport_prediction": (
        "ViewportPrediction",
        {"rotate": 0.0, "mirror": False, "width": 8},
        "ViewportPredictionData",
        {
            "synthetic": {"videos": 3, "users": 6, "seconds": 32, "picture_height": 8, "picture_width": 16},
            "train_step": 10, "eval_batch_size": 5, "batch_size": 4,
        },
    ),
    "adaptive_bitrate": (
        "AdaptiveBitrate",
        {"rescale": 0.0, "width": 8},
        "AdaptiveBitrateData",
        {
            "synthetic": {"traces": 5, "duration_s": 60}, "rules": {"chunks": 8}, "valid_starts": 1,
            "experience": {"policies": "bba,rate", "episodes": 12, "eval_episodes": 5, "values": "hindsight"},
            "window": 5, "eval_batch_size": 3, "batch_size": 4,
        },
    ),
    "job_scheduling": (
        "JobScheduling",
        {},
        "JobSchedulingData",
        {
            "synthetic": {"queries": 4, "sizes": ["2g", "5g"]}, "rules": {"jobs": 3, "executors": 6},
            "experience": {"policies": "fair,srpt_fair", "episodes": 6, "eval_episodes": 3, "values": "lookahead"},
            "test_seeds": [1, 2, 3], "window": 4, "eval_batch_size": 3, "batch_size": 4,
        },
    ),
}  # fmt: skip
STEPS = 6
NIGHTLY = pytest.mark.skipif(os.environ.get("NETLLM_NIGHTLY", "0") == "0", reason="takes a while; set NETLLM_NIGHTLY=1")
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2")


def config(task: str) -> dict[str, Any]:
    """A run in which nothing is drawn at random in training, with batches of 4."""
    model, settings, data, source = PARTS[task]
    return {
        "seed_everything": 1,
        "model": {"class_path": model, "init_args": {"backbone": BACKBONE, "optimizer": OPTIMIZER, **settings}},
        "data": {"class_path": data, "init_args": source},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": STEPS, "log_every_n_steps": 1, "val_check_interval": 2,
            "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
            "enable_progress_bar": False, "enable_model_summary": False,
        },
    }  # fmt: skip


def words(folder: Path, task: str, command: str, name: str | None, *more: str) -> list[str]:
    """Command line of a task; without a name, the folder of the run is named by the time."""
    where = [] if name is None else ["--run_dir", str(folder / task / name)]
    return [command, "--config", str(folder / f"{task}.yaml"), *where, *more]


def stopped(folder: Path, task: str, name: str, *more: str) -> None:
    """Train until all processes fail after three steps; a checkpoint of the second one is there."""
    original = NetTask.training_step

    def crash(self: NetTask, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise MemoryError
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetTask, "training_step", crash)
        with pytest.raises(MemoryError):
            main([*words(folder, task, "fit", name, *more), "--save_every", "1", "--debug"])


def evaluated(folder: Path, task: str, name: str, *more: str) -> dict[str, float]:
    """Metrics of the validation and test split, of the first run's last checkpoint."""
    found = {}
    for command in ("validate", "test"):
        path = str(folder / task / "one" / "last.ckpt")
        cli = CLI(words(folder, task, command, name, "--ckpt_path", path, *more))
        found |= {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    main(words(folder, task, "predict", name, "--ckpt_path", path, *more))
    return found


def rank_of_two(folder: Path) -> dict[str, Any]:
    """What one of two processes does, and what it has seen."""
    from netllm_pl import episodes

    os.environ["NETLLM_CACHE"] = str(folder / "cache")
    prepare()
    played, original = [0], episodes.rollout

    def counted(env: Any, policy: Any, seeds: Any, *more: Any, **named: Any) -> Any:
        played[0] += len(seeds)
        return original(env, policy, seeds, *more, **named)

    episodes.rollout = counted  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for task in PARTS:
        found[task] = evaluated(folder, task, "two_evaluated", *TWO)
        found[f"{task} played"], played[0] = played[0], 0
        main(words(folder, task, "fit", "two", *TWO, "--figures", "false"))
    last = str(folder / "adaptive_bitrate" / "one_stopped" / "last.ckpt")
    main([*words(folder, "adaptive_bitrate", "fit", "one_then_two", *TWO), "--ckpt_path", last])
    stopped(folder, "adaptive_bitrate", "two_stopped", *TWO)
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Runs of one process and of two, below a folder by task and name; and what each of two has seen."""
    folder = tmp_path_factory.mktemp("several")
    for task in PARTS:
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config(task)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(folder / "cache"))
        prepare()
        for task in PARTS:
            main(words(folder, task, "fit", "one", "--figures", "false"))
        stopped(folder, "adaptive_bitrate", "one_stopped")
        yield folder, in_processes(rank_of_two, folder / "ranks", folder)


def logged(folder: Path, name: str, after: int = 0) -> list[float]:
    frame = pd.read_csv(folder / "metrics.csv")
    return list(frame[(frame["step"] >= after) & frame[name].notna()][name])


@pytest.mark.parametrize("task", PARTS)
def test_two_processes_train_as_one_does(task: str, ran: tuple[Path, list[dict[str, Any]]]) -> None:
    one, two = (ran[0] / task / name for name in ("one", "two"))
    losses = logged(one, "train/loss")
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(logged(two, "train/loss"), losses, rtol=1e-5)
    main_metric = {"viewport_prediction": "val/mae_deg", "adaptive_bitrate": "val/qoe", "job_scheduling": "val/jct_s"}
    for name in ("val/loss", main_metric[task]):
        np.testing.assert_allclose(logged(two, name), logged(one, name), rtol=1e-5)
    names = [sorted(file.name for file in folder.iterdir() if "events" not in file.name) for folder in (one, two)]
    assert names[0] == names[1], "only the first process writes"


@pytest.mark.parametrize("task", PARTS)
def test_two_processes_validate_test_and_predict_as_one_does(
    task: str, ran: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = ran
    monkeypatch.setenv("NETLLM_CACHE", str(folder / "cache"))
    expected = evaluated(folder, task, "again")
    assert len(expected) >= 4
    for each in found:
        assert each[task].keys() == expected.keys()
        np.testing.assert_allclose(list(each[task].values()), [expected[key] for key in each[task]], rtol=1e-6)
    one, two = (pd.read_parquet(folder / task / name / "predictions.parquet") for name in ("again", "two_evaluated"))
    pd.testing.assert_frame_equal(one, two)


def test_each_process_plays_its_share_of_the_episodes(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    """Five of validation, of which the baselines see nothing, and five of test; then the table of the first process."""
    first, second = (each["adaptive_bitrate played"] for each in ran[1])
    assert (first - second, second) == (3 * 5 + 2, 2 + 2)
    assert ran[1][1]["viewport_prediction played"] == 0


def test_another_number_of_processes_goes_on(
    ran: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ran[0] / "adaptive_bitrate"
    monkeypatch.setenv("NETLLM_CACHE", str(ran[0] / "cache"))
    last = folder / "two_stopped" / "last.ckpt"
    main([*words(ran[0], "adaptive_bitrate", "fit", "two_then_one"), "--ckpt_path", str(last)])
    expected = logged(folder / "one", "train/loss")
    for name in ("one_then_two", "two_then_one"):
        losses = logged(folder / name, "train/loss")
        assert 2 < len(losses) < STEPS
        np.testing.assert_allclose(losses, expected[-len(losses) :], rtol=1e-5)


# Ends -----------------------------------------------------------------------------------------------------------------


def started(folder: Path, name: str, *launcher: str, **environment: str) -> tuple[subprocess.Popen[str], Path]:
    """Start a run of two processes that would train for hours; return it when it has a checkpoint."""
    command = [*(launcher or (sys.executable,)), "-m", "netllm_pl"]
    command += words(folder, "viewport_prediction", "fit", name, *TWO, "--trainer.max_steps", "100000")
    command += ["--save_every", "1", "--figures", "false", "--costs", "false"]
    inherited = {**os.environ, "NETLLM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=inherited | environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    last, deadline = folder / "viewport_prediction" / name / "last.ckpt", time.monotonic() + 300
    while not last.exists() and process.poll() is None:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)  # else it trains on, long behind this test
            raise AssertionError(f"no checkpoint: {process.communicate()[1]}")
        time.sleep(0.05)
    return process, last


def children(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the other processes of a run."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def end_of(process: subprocess.Popen[str]) -> str:
    """Wait until no process of a run is left, as all write to one pipe; return what they said."""
    began = time.monotonic()
    try:
        return process.communicate(timeout=60)[1]
    finally:
        if time.monotonic() - began >= 60:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    (folder / "viewport_prediction.yaml").write_text(yaml.safe_dump(config("viewport_prediction")))
    return folder


def test_a_terminated_run_of_two_processes_saves_once_and_stops(config_folder: Path) -> None:
    """Only the first process is told; the other one learns of it, and neither has the other one killed."""
    process, last = started(config_folder, "terminated")
    process.terminate()
    text = end_of(process)
    assert process.returncode == 128 + signal.SIGTERM, text
    step = torch.load(last, weights_only=True)["global_step"]
    assert text.count(f"stopped at step {step}; go on with\n") == 1 and text.count("stopping after this step") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("first", "launcher"),
    [
        (False, False),
        pytest.param(True, False, marks=NIGHTLY),
        pytest.param(False, True, marks=NIGHTLY),
        pytest.param(True, True, marks=NIGHTLY),
    ],
)
def test_when_a_process_dies_all_end(first: bool, launcher: bool, config_folder: Path) -> None:
    """Started by Lightning, or by torchrun."""
    run = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1")
    run += (f"--master_port={free_port()}",)
    process, last = started(config_folder, f"killed-{first}-{launcher}", *(run if launcher else ()))
    ranks = children(process) if launcher else [process.pid, *children(process)]
    assert len(ranks) == 2 and last.exists()
    os.kill(ranks[0 if first else 1], signal.SIGKILL)
    text = end_of(process)
    assert process.returncode, text
    assert torch.load(last, weights_only=True)["global_step"] > 0


@NIGHTLY
def test_an_error_in_one_process_ends_all_with_its_message(config_folder: Path) -> None:
    """Its windows cannot be read."""
    (config_folder / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n"
        "    from netllm_pl.task import NetTask\n"
        "    def broken(self, batch, batch_idx):\n"
        "        raise ValueError('the second process is broken')\n"
        "    NetTask.training_step = broken\n"
    )
    process, last = started(config_folder, "broken", PYTHONPATH=f"{ROOT}:{config_folder}")
    text = end_of(process)
    assert process.returncode and not last.exists()
    assert "error: ValueError: the second process is broken" in text


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    begin = "import subprocess, sys, time; from netllm_pl.launch import end_with_parent; end_with_parent(); "
    child, parent = begin + "print(0, flush=True); time.sleep(60)", begin
    parent += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"0\n"
        process.kill()
        began = time.monotonic()
        assert process.stdout.read() == b"" and time.monotonic() - began < 20, "nobody writes any more"


# Launchers ------------------------------------------------------------------------------------------------------------


def as_slurm(folder: Path) -> bool:
    """Train in two nodes with a task each, as srun starts them; return whether this is the first."""
    rank = os.environ["RANK"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    about = {"JOB_ID": 4711, "JOB_NAME": "job", "NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2, "LOCALID": 0}
    about |= {"PROCID": rank, "NODEID": rank, "NODELIST": "127.0.0.1", "JOB_NODELIST": "127.0.0.1"}
    os.environ |= {f"SLURM_{name}": str(value) for name, value in about.items()}
    os.environ["NETLLM_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    more = ("--trainer.num_nodes", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "2")
    main(words(folder, "viewport_prediction", "fit", None, *more, "--data.batch_size", "2"))
    return is_first()


def test_srun_starts_processes_of_one_run(config_folder: Path) -> None:
    assert in_processes(as_slurm, config_folder / "ranks", config_folder) == [True, False]
    (run,) = (config_folder / "runs").iterdir()
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2 and (run / "summary.csv").is_file()


def test_a_first_process_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(launch, "WAIT_S", 1.0)
    with pytest.raises(UserError, match=r"the processes do not find each other at 127\.0\.0\.1:\d+ .*give --run_dir"):
        launch.told_by_first(lambda: "folder")


def every_config(folder: Path, configs: list[Path]) -> None:
    """Train a few steps of each config in one of two processes."""
    os.environ["NETLLM_CACHE"] = str(folder / "cache")
    for file in configs:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            more = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "3"]
            main(["fit", *small_run(file), *more, "--run_dir", str(folder / file.stem), "--debug"])


@NIGHTLY
def test_every_config_trains_with_two_processes(tmp_path: Path) -> None:
    """Baselines that learn by playing, and several tasks on one language model, too."""
    configs = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/baselines/*.yaml")])
    in_processes(every_config, tmp_path / "ranks", tmp_path, configs, limit_s=900)
    for file in configs:
        assert torch.load(tmp_path / file.stem / "last.ckpt", weights_only=True)["global_step"] >= 1
