"""Exact resume: a run that was stopped or killed and goes on equals the one that was not, bit by bit."""

import os
import random
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
from netllm_pl.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "class_path": "ViewportPrediction",
        "init_args": {
            "backbone": {
                "name": "llama",
                "pretrained": False,
                "dtype": "float32",
                "lora": {"rank": 4, "dropout": 0.2},
                "config": {
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 8,
                    "vocab_size": 32,
                },
            },
            "vision": {
                "name": "vit",
                "config": {
                    "image_size": [8, 16],
                    "patch_size": 4,
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                },
            },
            "stretch": 0.2,
            "width": 16,
            "optimizer": {"lr": 3e-3},
        },
    },
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
        "max_steps": 12,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
EPOCH = 5
"""Batches of an epoch."""


OFTEN = ("--save_every", "1", "--trainer.val_check_interval", "2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(folder / "cache"))
        yield folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """Folder of the run that nothing interrupts."""
    fit(config, config.parent / "whole", *OFTEN)
    return config.parent / "whole"


def arguments(config: Path, folder: Path, *more: str) -> list[str]:
    return ["fit", "--config", str(config), "--run_dir", str(folder), *more]


def fit(config: Path, folder: Path, *more: str) -> pd.DataFrame:
    """Train in this process; return what was logged, a row a step."""
    main([*arguments(config, folder, *more), "--debug"])
    return pd.read_csv(folder / "metrics.csv")


def column(frame: pd.DataFrame, name: str, after: int = 0) -> list[float]:
    """What was logged under a name behind that many steps."""
    rows = frame[(frame["step"] >= after) & frame[name].notna()]
    return list(rows[name])


def same_end(first: Path, second: Path) -> None:
    """The last checkpoints and the tables at the end are equal in every bit."""
    one, two = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (first, second))
    assert one["global_step"] == two["global_step"] and one["epoch"] == two["epoch"]
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    pd.testing.assert_frame_equal(*(_without_paths(folder / "summary.csv") for folder in (first, second)))


def _without_paths(file: Path) -> pd.DataFrame:
    frame = pd.read_csv(file)
    return frame.assign(policy=[Path(name).name for name in frame["policy"]])


@pytest.mark.parametrize(
    ("stop", "workers", "step"),
    [
        (2, 0, "validation_step"),
        (3, 0, "training_step"),
        (4, 0, "training_step"),
        (EPOCH, 0, "training_step"),
        (EPOCH + 2, 0, "training_step"),
        (EPOCH + 2, 0, "validation_step"),
        (3, 2, "training_step"),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(stop: int, workers: int, step: str, whole: Path, config: Path) -> None:
    """In mid-epoch, before and in a validation, at the border of two epochs, in the second one, and with workers.

    Dropout, augmentation, warm-up and decay of the learning rate are all on.
    """
    expected = pd.read_csv(whole / "metrics.csv")
    losses = column(expected, "train/loss")
    assert len(losses) == 12 == len(set(losses))
    assert expected.dropna(subset="train/loss")["epoch"].tolist() == [step // EPOCH for step in range(12)]
    folder = config.parent / f"stopped-{stop}-{workers}-{step}"
    more = (*OFTEN, "--data.init_args.num_workers", str(workers))
    last = _stop(config, folder, stop, *more, step=step)
    done = torch.load(last, weights_only=True)["global_step"]
    assert done == (stop if step == "training_step" else stop - 1)  # a save waits for the validation
    resumed = fit(config, folder, *more, "--ckpt_path", str(last))
    assert column(resumed, "train/loss", done) == losses[done:]
    for name in ("val/loss", "val/mae_deg"):
        assert column(resumed, name, done) == column(expected, name, done) != []
    same_end(whole, folder)


def _stop(config: Path, folder: Path, stop: int, *more: str, step: str = "training_step") -> Path:
    """Interrupt a run after that many steps, by an exception as a crash would; return its last checkpoint."""
    from netllm_pl.task import NetTask

    original = getattr(NetTask, step)

    def crash(self: NetTask, batch: Any, batch_idx: int) -> Any:
        if self.global_step == stop:
            raise MemoryError
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetTask, step, crash)
        with pytest.raises(MemoryError):
            main([*arguments(config, folder, *more), "--debug"])
    return folder / "last.ckpt"


def test_a_run_that_averages_its_weights_goes_on_too(config: Path) -> None:
    """In mid-epoch, and in a validation, for which the average stands in the model."""
    more = (*OFTEN, "--model.init_args.optimizer.ema", "0.9")
    expected = fit(config, config.parent / "averaged", *more)
    for stop, step in ((3, "training_step"), (EPOCH + 2, "validation_step")):
        folder = config.parent / f"averaged-{stop}"
        last = _stop(config, folder, stop, *more, step=step)
        done = torch.load(last, weights_only=True)["global_step"]
        resumed = fit(config, folder, *more, "--ckpt_path", str(last))
        for name in ("train/loss", "val/mae_deg"):
            assert column(resumed, name, done) == column(expected, name, done) != []
        same_end(config.parent / "averaged", folder)
        one, two = (_latest(config.parent / name) for name in ("averaged", folder.name))
        assert one and all(torch.equal(value, two[name]) for name, value in one.items())


def _latest(folder: Path) -> dict[str, Any]:
    """The weights that training goes on with, which the last checkpoint keeps beside the average."""
    callbacks = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = (value for name, value in callbacks.items() if "MovingAverage" in name)
    return dict(state["learning"])


def test_without_the_random_states_a_resumed_run_differs(whole: Path, config: Path) -> None:
    """Shows that the test above would notice."""
    last = _stop(config, config.parent / "forgetful", 3, *OFTEN)
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "ExactResume" not in k}
    torch.save(checkpoint, last)
    resumed = fit(config, config.parent / "forgetful", *OFTEN, "--ckpt_path", str(last))
    assert column(resumed, "train/loss", 3) != column(pd.read_csv(whole / "metrics.csv"), "train/loss", 3)


def test_a_fresh_run_does_not_write_over_another(whole: Path, config: Path) -> None:
    before = {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=r"whole holds a run already; .*--ckpt_path .*whole/last\.ckpt"):
        fit(config, whole, *OFTEN)
    assert {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()} == before


def test_a_resumed_run_keeps_the_metrics_of_its_parts(whole: Path, config: Path) -> None:
    folder = config.parent / "parts"
    losses = column(pd.read_csv(whole / "metrics.csv"), "train/loss")
    last = _stop(config, folder, 3, *OFTEN)
    _stop(config, folder, 7, *OFTEN, "--ckpt_path", str(last))
    fit(config, folder, *OFTEN, "--ckpt_path", str(last))
    files = sorted(file.name for file in folder.glob("metrics*.csv"))
    assert files == ["metrics-part1.csv", "metrics-part2.csv", "metrics.csv"]
    assert [loss for name in files for loss in column(pd.read_csv(folder / name), "train/loss")] == losses


def test_a_killed_run_goes_on_to_the_same_end(whole: Path, config: Path) -> None:
    folder = config.parent / "killed"
    command = [sys.executable, "-m", "netllm_pl", *arguments(config, folder, *OFTEN)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    last, deadline = folder / "last.ckpt", time.monotonic() + 90
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.2 * random.SystemRandom().random())  # another moment in each run of this test
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = torch.load(last, weights_only=True)["global_step"]
    resumed = fit(config, folder, *OFTEN, "--ckpt_path", str(last))
    assert 1 <= done <= 12
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None, "its config begins a run anew"
    assert column(resumed, "train/loss", done) == column(pd.read_csv(whole / "metrics.csv"), "train/loss", done)
    same_end(whole, folder)
