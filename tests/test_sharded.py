"""A backbone whose layers are shared out over two processes, against the same training in one."""

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from several import in_processes
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.resume import ExactResume, SaveOften
from netllm_pl.backbone import Backbone, BackboneConfig, LoRA, is_sharded
from netllm_pl.checkpoint import AtomicCheckpointIO, load_task
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.recording import Experience
from netllm_pl.run import prepare as quietly
from netllm_pl.sharded import Sharded, prepare, shard
from netllm_pl.task import NetTask, OptimizerConfig
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData
from tasks.adaptive_bitrate.hindsight_mlp import HindsightMLP
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.viewport_prediction import ViewportPrediction, ViewportPredictionData
from tasks.viewport_prediction.synthetic import Synthetic

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
WORDS = ("adaptive_bitrate", "viewport_prediction")


def backbone(**changes: Any) -> BackboneConfig:
    defaults = {"dtype": "float32", "lora": LoRA(rank=4, dropout=0.0), "draw_on": "anywhere"}
    return BackboneConfig(name="llama", pretrained=False, config=SHAPE, **(defaults | changes))


def built(name: str, batch: int, **changes: Any) -> tuple[NetTask, Any]:
    """A task that draws nothing at random in training, and its data."""
    optimizer = OptimizerConfig(lr=1e-3, schedule="constant")
    pl.seed_everything(0)
    if name == "viewport_prediction":
        synthetic = Synthetic(videos=3, users=4, seconds=30, picture_height=8, picture_width=16)
        data: Any = ViewportPredictionData(
            dataset="synthetic", synthetic=synthetic, batch_size=batch, eval_batch_size=9
        )
        return ViewportPrediction(backbone(**changes), optimizer, rotate=0.0, mirror=False), data
    data = AdaptiveBitrateData(
        synthetic=SyntheticTraces(traces=4, duration_s=60),
        experience=Experience(policies="bba,rate:2", episodes=16, eval_episodes=3, explore=0.3, values="hindsight"),
        rules=Rules(chunks=6),
        window=5,
        batch_size=batch,
        eval_batch_size=8,
    )
    return AdaptiveBitrate(backbone(**changes), optimizer, rescale=0.0), data


class Losses(pl.Callback):
    """The mean loss over all processes, of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *more: Any) -> None:
        loss: Tensor = outputs["loss"].detach().clone() * trainer.accumulate_grad_batches
        self.values.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))


def train(
    name: str, steps: int, save: Path | None = None, ckpt: Path | None = None, together: bool = False, **changes: Any
) -> dict[str, Any]:
    """Train with eight samples a step, and tell what came of it."""
    quietly()
    settings = {key: changes.pop(key) for key in ("accumulate_grad_batches", "gradient_clip_val") if key in changes}
    size = 8 // settings.get("accumulate_grad_batches", 1)
    task, data = built(name, size // 2 if together else size, **changes)
    losses, callbacks = Losses(), [ExactResume()]
    if save is not None:
        where = {"dirpath": save.parent, "filename": save.stem, "enable_version_counter": False}
        callbacks.append(SaveOften(every_n_train_steps=steps, **where))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2 if together else 1, strategy="sharded" if together else "auto", max_steps=steps,
        callbacks=[losses, *callbacks], logger=False, enable_checkpointing=save is not None, limit_val_batches=4,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2,
        check_val_every_n_epoch=None, use_distributed_sampler=False, plugins=[AtomicCheckpointIO()], **settings,
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=ckpt, weights_only=True)
    frozen = [weight for weight in task.backbone.parameters() if not weight.requires_grad]  # type: ignore[union-attr]
    own = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in frozen)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    return {"losses": losses.values, "own": own, "sharded": is_sharded(task), "val": metrics}


def close(a: list[float], b: list[float], by: float = 1e-5) -> bool:
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=by, atol=by))


def both_ways(folder: Path, alone: Path) -> list[dict[str, Any]]:
    """In each of two processes: train from the start, and go on with what one process has begun."""
    found = []
    for name in WORDS:
        found.append(train(name, 3, save=folder / f"{name}.ckpt", together=True))
        found.append(train(name, 5, ckpt=alone / f"{name}.ckpt", together=True))
    return found


def test_two_processes_do_what_one_does_and_go_on_with_its_checkpoints(tmp_path: Path) -> None:
    """Losses, validation by batches and by episodes, checkpoints; from one process to two and from two to one."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    whole, begun = {}, {}
    for name in WORDS:
        whole[name] = train(name, 5)
        begun[name] = train(name, 3, save=alone / f"{name}.ckpt")
    ranks = in_processes(both_ways, tmp_path / "results", together, alone)
    for index, name in enumerate(WORDS):
        (begun_0, resumed_0), (begun_1, _) = (rank[2 * index : 2 * index + 2] for rank in ranks)
        assert begun_0["sharded"] and begun_0["losses"] == begun_1["losses"] and begun_0["val"] == begun_1["val"]
        assert close(begun_0["losses"], whole[name]["losses"][:3])
        assert close(resumed_0["losses"], whole[name]["losses"][3:])
        assert begun_0["val"].keys() == begun[name]["val"].keys()
        # Two processes validate twice as many samples, and play the same episodes.
        assert name != "adaptive_bitrate" or begun_0["val"]["val/qoe"] == pytest.approx(begun[name]["val"]["val/qoe"])
        # All but the last norm is shared out.
        assert begun_0["own"] + begun_1["own"] == begun[name]["own"] + SHAPE["hidden_size"]
        assert begun_0["own"] == begun_1["own"]

        file = together / f"{name}.ckpt"
        saved, other = (torch.load(each, weights_only=True) for each in (file, alone / f"{name}.ckpt"))
        assert saved["state_dict"].keys() == other["state_dict"].keys()
        assert all(type(value) is Tensor for value in saved["state_dict"].values())
        assert saved["netllm_pl"]["frozen"] == other["netllm_pl"]["frozen"]
        assert not is_sharded(load_task(file))
        assert close(train(name, 5, ckpt=file)["losses"], whole[name]["losses"][3:])


VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed activations": {"checkpointing": True, "gradient_clip_val": 0.01},
    "compiled": {"compile": True, "checkpointing": 0.5},
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01},
    "bfloat16": {"dtype": "bfloat16"},
    "no LoRA": {"lora": None},
    "loaded": {"draw_on": "cpu"},
}


def varied() -> list[dict[str, Any]]:
    """In each of two processes: train in all variants."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[misc]  # seconds, not a minute
    return [train("adaptive_bitrate", 2, together=True, **changes) for changes in VARIANTS.values()]


def test_variants_learn_as_in_one_process(tmp_path: Path) -> None:
    """Whatever is done to layers goes together with their being put together and apart."""
    ranks = in_processes(varied, tmp_path)
    for (name, changes), found in zip(VARIANTS.items(), ranks[0], strict=True):
        alone = train("adaptive_bitrate", 2, **(changes | ({"compile": False} if name == "compiled" else {})))
        assert close(found["losses"], alone["losses"], 2e-2 if name == "bfloat16" else 1e-5), name
        assert len(set(found["losses"])) > 1, name


def commands(folder: Path) -> None:
    """In each of two processes: train and test from the command line."""
    words = ["--config", "configs/adaptive_bitrate.yaml", "--config", "configs/overlays/smoke.yaml"]
    words += ["--model.init_args.backbone", "configs/llm/tiny_random.yaml", "--data.init_args.window", "5"]
    words += ["--data.init_args.synthetic", "{traces: 4, duration_s: 60}", "--data.init_args.rules.chunks", "6"]
    words += ["--data.init_args.experience", "{policies: bba, episodes: 16, eval_episodes: 3, values: hindsight}"]
    words += ["--trainer.strategy", "sharded", "--trainer.devices", "2"]
    main(["--quiet", "fit", *words, "--run_dir", str(folder)])
    main(["--quiet", "test", *words, "--run_dir", str(folder / "test"), "--ckpt_path", str(folder / "best.ckpt")])


def test_commands_end_with_the_table_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes make the passes of the table, which the first one writes."""
    monkeypatch.chdir(Path(__file__).parents[1])
    run = tmp_path / "run"
    in_processes(commands, tmp_path / "results", run)
    config = ["--config", str(run / "config.yaml")]
    main(["--quiet", "evaluate", *config, "--policies", f"bba,{run / 'best.ckpt'}", "--out", str(tmp_path / "alone")])
    alone = pd.read_csv(tmp_path / "alone" / "summary.csv").query("policy != 'bba'")["mean"].to_numpy()
    for folder in (run, run / "test"):
        table = pd.read_csv(folder / "summary.csv")
        own = table[~table["policy"].isin(["bba", "robust_mpc"])]["mean"].to_numpy()
        np.testing.assert_allclose(own, alone, rtol=1e-5)


@pytest.mark.parametrize("setting", ["full", "quantize", "training_graph"])
def test_weights_that_cannot_be_shared_out_are_refused(setting: str) -> None:
    """By name, before anything is sent."""
    model = Backbone(backbone(lora=None))
    object.__setattr__(model.config, setting, True)
    with pytest.raises(UserError, match=f"drop backbone.{setting}"):
        shard(model, None, torch.device("cpu"))  # type: ignore[arg-type]


def test_strategies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A task without a backbone, and Lightning's strategy that would write a folder of pieces."""
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    task: Any = HindsightMLP()
    task._trainer = pl.Trainer(strategy="sharded", **settings)
    assert isinstance(task.trainer.strategy, Sharded)
    with pytest.raises(UserError, match="HindsightMLP has no backbone"):
        prepare(task)
    from lightning.pytorch.strategies import ModelParallelStrategy

    task._trainer = pl.Trainer(strategy=ModelParallelStrategy(), **settings)
    with pytest.raises(UserError, match="set it to sharded"):
        prepare(task)
