"""Fast paths that the benchmark takes on a GPU, as far as a CPU can tell."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from netllm_pl import fast_paths, speed
from netllm_pl.backbone import Backbone, BackboneConfig
from netllm_pl.fast_paths import hasten, nothing_recomputed, training_or_plain
from netllm_pl.graphs import uncached_autocast
from netllm_pl.loading import configuration
from netllm_pl.recording import Experience
from netllm_pl.speed import Staying, StepTimer, training_batches
from netllm_pl.testing import tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.viewport_prediction import ViewportPrediction, ViewportPredictionData
from tasks.viewport_prediction.synthetic import Synthetic

CPU = {"accelerator": "cpu"}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_paths, "compile_layers", lambda model: None)


def data(batch_size: int = 4) -> ViewportPredictionData:
    return ViewportPredictionData(
        dataset="synthetic", synthetic=Synthetic(videos=3, users=4, seconds=20), batch_size=batch_size
    )


def recomputing(backbone: Backbone) -> list[bool]:
    layers = [layer for layer in backbone.modules() if hasattr(layer, "gradient_checkpointing")]
    return [bool(layer.gradient_checkpointing) for layer in layers if type(layer).__name__.endswith("Layer")]


def test_small_models_train_in_graphs_and_what_a_config_says_stays() -> None:
    settings: dict[str, Any] = {}
    small = Backbone(tiny_backbone(dtype="bfloat16"))
    chosen = hasten(small, settings)
    assert chosen == {
        "compile": True, "graphs": True, "training_graph": True, "checkpointing": False, "precision": "bf16-mixed",
    }  # fmt: skip
    assert small.config.compile and small.config.graphs and small.config.training_graph
    assert settings == {"precision": "bf16-mixed"}
    settings = {"precision": "bf16-true"}
    assert not hasten(Backbone(tiny_backbone(checkpointing=0.5)), settings)["training_graph"]
    assert settings == {"precision": "bf16-true"}


def test_activations_are_kept_for_a_while() -> None:
    task = ViewportPrediction(tiny_backbone(checkpointing=0.5), width=16)
    assert task.backbone is not None
    before = recomputing(task.backbone)
    assert sum(before) == 1
    with nothing_recomputed(task):
        assert not any(recomputing(task.backbone)) and not task.backbone.config.checkpointing
    assert recomputing(task.backbone) == before and task.backbone.config.checkpointing == 0.5


def test_a_graph_that_cannot_be_captured_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    task = ViewportPrediction(tiny_backbone(training_graph=True), width=16)
    assert task.backbone is not None

    def train(task: Any, *given: Any) -> Any:
        if task.backbone.config.training_graph:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return {"steps_per_s": 1.0}, torch.device("cpu")

    monkeypatch.setattr(fast_paths, "training", train)
    found, _ = training_or_plain(task, data(), 1, True, CPU)
    assert found == {"steps_per_s": 1.0, "training_graph_failed": "operation not permitted"}


def test_sizes_of_batches_end_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    task, own = ViewportPrediction(tiny_backbone(), width=16), data(4)
    step = ViewportPrediction.training_step

    def limited(self: Any, batch: Any, number: int) -> Any:
        if len(batch["history"]) > 8:
            raise torch.OutOfMemoryError
        return step(self, batch, number)

    monkeypatch.setattr(ViewportPrediction, "training_step", limited)
    found = training_batches(task, own, [16, 8], 1, True, CPU)
    assert list(found["by_batch"]) == ["8"] and found["best"]["batch_samples"] == 8 and own.batch_size == 4
    assert training_batches(task, own, [16], 1, True, CPU) == {"out_of_memory": True}


def test_a_model_stays_where_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it would else be brought to the CPU."""
    moved: list[bool] = []
    monkeypatch.setattr(ViewportPrediction, "cpu", lambda self: moved.append(True))
    for strategy in ("auto", Staying(torch.device("cpu"))):
        timer = StepTimer(1, 1, 0.0)
        timer.start()
        options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **CPU}
        trainer = Trainer(strategy=strategy, max_steps=2, limit_val_batches=0, callbacks=[timer], **options)
        trainer.fit(ViewportPrediction(tiny_backbone(), width=16), datamodule=data())
        assert timer.steps == 2
    assert moved == [True], "by the first one only"


def test_gradients_are_gone_when_the_next_pass_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    task, held = ViewportPrediction(tiny_backbone(), width=16), []
    step = ViewportPrediction.training_step

    def watched(self: Any, batch: Any, number: int) -> Any:
        held.append(sum(weight.grad is not None for weight in self.parameters()))
        return step(self, batch, number)

    monkeypatch.setattr(ViewportPrediction, "training_step", watched)
    found, _ = speed.training(task, data(), 1, True, CPU)
    assert found["steps_measured"] > 1 and not any(held)


class Waiting(TorchDispatchMode):
    """Notes what a GPU and the program would have to wait for each other for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        picks = name.startswith("aten.index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if picks or any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("objective", ["values", "imitation", None])
def test_a_training_step_waits_for_nothing(objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and metrics included: the next kernels are launched while the last ones run."""
    own: Any = data()
    task: Any = ViewportPrediction(tiny_backbone(), width=16)
    if objective is not None:
        own = AdaptiveBitrateData(
            synthetic=SyntheticTraces(traces=4, duration_s=60), rules=Rules(chunks=12), window=8, batch_size=4,
            experience=Experience(policies="bba", episodes=12, eval_episodes=3, values="hindsight"),
        )  # fmt: skip
        task = AdaptiveBitrate(tiny_backbone(), width=16, objective=objective)
    step, waits = type(task).training_step, Waiting()
    # Only a CPU looks at the numbers here.
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda given, count: torch.eye(count).long()[given])

    def watched(self: Any, batch: Any, number: int) -> Any:
        with waits:
            return step(self, batch, number)

    monkeypatch.setattr(type(task), "training_step", watched)
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **CPU}
    Trainer(max_steps=2, limit_val_batches=0, **options).fit(task, datamodule=own)
    assert not waits.found


def test_mixed_precision_casts_anew_while_a_graph_is_captured() -> None:
    with torch.autocast("cpu", torch.bfloat16), uncached_autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with uncached_autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")


def test_random_weights_of_a_model_behind_a_permission_need_no_network() -> None:
    source, shape = configuration(BackboneConfig(name="meta-llama/Llama-2-7b-hf", pretrained=False))
    assert source == "llama" and (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size) == (4096, 32, 32000)
    _, cut = configuration(BackboneConfig(name="meta-llama/Llama-2-7b-hf", pretrained=False, config={"vocab_size": 8}))
    assert cut.vocab_size == 8
