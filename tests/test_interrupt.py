"""Ctrl-C and SIGTERM in training leave a checkpoint from which the run goes on as if nothing had happened."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from netllm_pl.cli import main
from netllm_pl.task import NetTask

ROOT = Path(__file__).parent.parent
EPOCH, STEPS = 5, 12
"""Batches of an epoch; steps of the run."""
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": {"class_path": "ViewportGRU", "init_args": {"width": 16, "stretch": 0.2, "optimizer": {"lr": 3e-3}}},
    "data": {
        "class_path": "ViewportPredictionData",
        "init_args": {
            "synthetic": {"videos": 3, "users": 6, "seconds": 32, "picture_height": 8, "picture_width": 16},
            "batch_size": 4,
            "train_step": 10,
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("interrupt")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(folder / "cache"))
        yield folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, Any]:
    """Last checkpoint of the run that nobody interrupts."""
    main(["fit", "--config", str(config), "--run_dir", str(config.parent / "whole")])
    return last(config.parent / "whole")


def last(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return found


def interrupted(
    config: Path, folder: Path, step: str, at: int, *more: str, times: int = 1, number: int = signal.SIGINT
) -> None:
    """Train until a signal comes in a method of the task, when so many steps are done."""
    original = getattr(NetTask, step)
    left = [times]

    def pressed(self: NetTask, batch: Any, batch_idx: int) -> Any:
        if self.global_step == at and left[0] and (step == "validation_step" or not self.trainer.sanity_checking):
            while left[0]:
                left[0] -= 1
                signal.raise_signal(number)
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetTask, step, pressed)
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(config), "--run_dir", str(folder), *more])
    assert stop.value.code == 128 + number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def command(text: str) -> list[str]:
    """The words of the command that was printed last, without how Python is called."""
    words = shlex.split(text.splitlines()[-1])
    assert words[:3] == ["python", "-m", "netllm_pl"]
    return words[3:]


@pytest.mark.parametrize(
    ("step", "at", "done"),
    [
        ("training_step", 2, 3),
        ("training_step", 3, 4),  # a validation comes behind it
        ("validation_step", 2, 2),
        ("training_step", EPOCH - 1, EPOCH),  # the last of an epoch
        ("validation_step", EPOCH + 2, EPOCH + 2),
        ("training_step", STEPS - 1, STEPS),
    ],
)
def test_an_interrupted_run_goes_on_with_the_printed_command(
    step: str, at: int, done: int, config: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.parent / f"{step}-{at}"
    interrupted(config, folder, step, at)
    text = capsys.readouterr().err
    assert "stopping after this step or validation; press Ctrl-C again" in text
    assert f"stopped at step {done}; go on with\n" in text and "Traceback" not in text
    assert last(folder)["global_step"] == done
    main(command(text))
    end = last(folder)
    assert end["global_step"] == STEPS == whole["global_step"]
    assert all(torch.equal(value, end["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert (folder / "summary.csv").is_file()


@pytest.mark.parametrize(("step", "at", "done"), [("training_step", EPOCH, EPOCH + 1), ("validation_step", 2, 2)])
def test_a_terminated_run_goes_on_with_the_printed_command(
    step: str, at: int, done: int, config: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """As clusters preempt; in the middle of an epoch."""
    folder = config.parent / f"terminated-{step}"
    interrupted(config, folder, step, at, number=signal.SIGTERM)
    text = capsys.readouterr().err
    assert "terminated: stopping after this step or validation" in text
    assert f"stopped at step {done}; go on with\n" in text and "Traceback" not in text
    assert last(folder)["global_step"] == done
    main(command(text))
    end = last(folder)
    assert all(torch.equal(value, end["state_dict"][name]) for name, value in whole["state_dict"].items())


def test_terminated_twice_or_early_it_stops_at_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(config, config.parent / "term-twice", "training_step", 1, times=2, number=signal.SIGTERM)
    assert capsys.readouterr().err.endswith("terminated; there is no checkpoint yet\n")
    interrupted(config, config.parent / "term-early", "validation_step", 0, number=signal.SIGTERM)
    assert capsys.readouterr().err.endswith("terminated; there is no checkpoint yet\n")


def test_a_resumed_run_validates_as_the_whole_one(config: Path, whole: dict[str, Any]) -> None:
    folder = config.parent / "training_step-2"
    parts = pd.concat([pd.read_csv(folder / name) for name in ("metrics-part1.csv", "metrics.csv")])
    expected = pd.read_csv(config.parent / "whole" / "metrics.csv")
    for name in ("train/loss", "val/mae_deg"):
        assert parts[name].dropna().tolist() == expected[name].dropna().tolist() != []


def test_gradients_that_add_up_are_not_lost(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two batches are a step: Ctrl-C in the first of them waits for the second."""
    more = ("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "5", "--trainer.max_steps", "4")
    main(["fit", "--config", str(config), "--run_dir", str(config.parent / "added"), *more])
    folder = config.parent / "added-stopped"
    interrupted(config, folder, "training_step", 1, *more)
    text = capsys.readouterr().err
    assert "stopped at step 2;" in text
    main(command(text))
    one, two = last(config.parent / "added"), last(folder)
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())


def test_pressed_twice_it_stops_at_once_with_the_last_checkpoint(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.parent / "twice"
    interrupted(config, folder, "training_step", EPOCH + 1, times=2)
    text = capsys.readouterr().err
    assert "interrupted; go on with\n" in text
    assert last(folder)["global_step"] == EPOCH
    assert command(text)[-1] == str(folder / "last.ckpt")


def test_before_the_first_step_there_is_nothing_to_go_on_with(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the check of the validation that precedes training."""
    folder = config.parent / "early"
    interrupted(config, folder, "validation_step", 0)
    assert capsys.readouterr().err.endswith("interrupted; there is no checkpoint yet\n")
    assert not (folder / "last.ckpt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_reaches_the_loader_processes_too(number: int, config: Path, whole: dict[str, Any]) -> None:
    """From a terminal, or a cluster."""
    folder = config.parent / f"group-{number}"
    words = ["fit", "--config", str(config), "--run_dir", str(folder), "--data.init_args.num_workers", "1"]
    run = [sys.executable, "-m", "netllm_pl", *words, "--trainer.max_steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        run, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not (folder / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, text
    step = last(folder)["global_step"]
    assert f"stopped at step {step}; go on with\n" in text and "Traceback" not in text
