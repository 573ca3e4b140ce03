"""Pensieve trained by playing: it improves, resumes exactly, and its estimates are those of the formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from netllm_pl.checkpoint import load_task
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.ppo import advantages
from netllm_pl.testing import check_player
from tasks.adaptive_bitrate import AdaptiveBitrateData, Pensieve
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces

CONFIG: dict[str, Any] = {
    "model": {"class_path": "Pensieve", "init_args": {"hidden": 16, "group": 4, "minibatches": 2}},
    "data": {
        "class_path": "AdaptiveBitrateData",
        "init_args": {
            "experience": None,
            "rules": {"chunks": 12, "scale": 0.1},
            "synthetic": {"traces": 6, "duration_s": 60},
            "batch_size": 4,
            "sessions": 12,
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


def data(**arguments: Any) -> AdaptiveBitrateData:
    small = {"synthetic": SyntheticTraces(traces=4, duration_s=60), "rules": Rules(chunks=8)}
    return AdaptiveBitrateData(**{"experience": None, "batch_size": 2, "sessions": 8} | small | arguments)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize("relative", [True, False])
def test_it_keeps_the_contract(relative: bool) -> None:
    check_player(Pensieve(hidden=8, group=2, relative=relative), data())


def test_it_learns_to_take_what_a_steady_link_carries(tmp_path: Path) -> None:
    """On 6 Mbit/s the highest level is best all along; at first an untrained policy is far from it."""
    rows = [(f"link{k}", float(second), 6.0) for k in range(8) for second in range(40)]
    pd.DataFrame(rows, columns=["trace_name", "time_s", "bandwidth_mbps"]).to_parquet(tmp_path / "links.parquet")
    tree = {**CONFIG, "model": {"class_path": "Pensieve", "init_args": {"hidden": 32, "group": 8}}}
    tree["model"]["init_args"] |= {"optimizer": {"lr": 3.0e-3, "weight_decay": 0.0}, "entropy": [0.03, 0.001]}
    tree["data"] = {**CONFIG["data"], "init_args": CONFIG["data"]["init_args"] | {"sessions": 160}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    words = ["--config", str(tmp_path / "config.yaml"), "--data.traces", str(tmp_path / "links.parquet")]
    main(["fit", *words, "--trainer.max_epochs", "1", "--run_dir", str(tmp_path / "run"), "--debug"])
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    played = metrics["train/qoe"].dropna().to_numpy()
    table = pd.read_csv(tmp_path / "run" / "summary.csv").query("metric == 'qoe'").set_index("policy")["mean"]
    assert played[:3].mean() < 1 < 2.9 < table[str(tmp_path / "run" / "best.ckpt")]


def test_a_resumed_run_equals_the_uninterrupted_one(config: str, tmp_path: Path) -> None:
    """Draws of actions, order of sessions, entropy, learning rate and the trainer's steps."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(["fit", "--config", config, "--run_dir", str(whole), "--debug"])
    original = Pensieve.training_step

    def crash(self: Pensieve, *batch: Any) -> Any:
        if self.global_step == 5:
            raise MemoryError
        return original(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pensieve, "training_step", crash)
        with pytest.raises(MemoryError):
            main(["fit", "--config", config, "--run_dir", str(parts), "--debug"])
    main(["fit", "--config", config, "--run_dir", str(parts), "--ckpt_path", str(parts / "last.ckpt"), "--debug"])
    one, two = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole, parts))
    assert one["global_step"] == two["global_step"] == 9, "a step is a batch of sessions, whatever is learned from it"
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    losses = [pd.read_csv(folder / "metrics.csv")["train/loss"].dropna().tolist() for folder in (whole, parts)]
    assert losses[0][3:] == losses[1] and len(set(losses[0])) == 9


def test_validation_measures_the_checkpoint(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", config, "--run_dir", str(tmp_path / "run"), "--trainer.max_epochs", "1"])
    best = tmp_path / "run" / "best.ckpt"
    logged = pd.read_csv(tmp_path / "run" / "metrics.csv")["val/qoe"].dropna().item()
    valid = AdaptiveBitrateData(**{**CONFIG["data"]["init_args"], "rules": Rules(chunks=12, scale=0.1),
                                   "synthetic": SyntheticTraces(traces=6, duration_s=60)})  # fmt: skip
    assert valid.episodes(load_task(best), split="valid")["qoe"].mean() == pytest.approx(logged, rel=1e-5)
    capsys.readouterr()
    main(["validate", "--config", config, "--ckpt_path", str(best), "--run_dir", str(tmp_path / "again")])
    assert "val/loss" in capsys.readouterr().out


def test_advantages_are_sums_of_discounted_errors() -> None:
    rewards, values = (torch.from_numpy(np.random.default_rng(seed).normal(size=(6, 3))) for seed in (0, 1))
    after = torch.cat([values[1:], torch.zeros(1, 3)])
    errors = rewards + 0.9 * after - values
    expected = [sum((0.9 * 0.8) ** k * errors[t + k] for k in range(6 - t)) for t in range(6)]
    torch.testing.assert_close(advantages(rewards, values, 0.9, 0.8), torch.stack(expected))
    whole = [sum(0.9**k * rewards[t + k] for k in range(6 - t)) for t in range(6)]
    torch.testing.assert_close(advantages(rewards, values, 0.9, 1.0) + values, torch.stack(whole))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="group is 1"):
        Pensieve(group=1)
    with pytest.raises(UserError, match="made for 6 levels, the video that is played has 3"):
        data(video=_ladder_of_three(tmp_path)).episodes(Pensieve())
    with pytest.raises(UserError, match=r"set data.experience to null"):
        Pensieve().sessions({"action": torch.zeros(1, 1)})


def _ladder_of_three(folder: Path) -> str:
    video = '{"three": {"bitrate_kbps": [300, 900, 2000], "chunk_s": 4, "chunk_bytes": [[1, 2], [2, 3], [3, 4]]}}'
    (folder / "video.json").write_text(video)
    return str(folder / "video.json")
