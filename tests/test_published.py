"""The published way of running a task gives the same answers of the same model; only how it runs differs."""

import gc
import weakref
from typing import Any

import pytest
import torch

from netllm_pl import published
from netllm_pl.published import Recomputing, can_restate, one_by_one, restated
from netllm_pl.rollout import rollout
from netllm_pl.testing import tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrate
from tasks.adaptive_bitrate.simulator import Rules, Simulator
from tasks.adaptive_bitrate.synthetic import SyntheticTraces, generate
from tasks.adaptive_bitrate.videos import generated_video
from tasks.viewport_prediction import ViewportGRU, ViewportPrediction, ViewportPredictionData
from tasks.viewport_prediction.synthetic import Synthetic


def trained(task: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, weight in task.named_parameters():
            if "lora_B" in name or "head" in name:
                weight.add_(0.05 * torch.randn_like(weight))


def test_a_viewport_takes_as_many_passes_as_it_has_steps() -> None:
    torch.manual_seed(0)
    task = ViewportPrediction(tiny_backbone(), horizon=6, width=16).eval()
    trained(task)
    batch = {"history": torch.randn(2, 10, 3).cumsum(1) * 5}
    lengths: list[int] = []
    assert task.backbone is not None
    task.backbone.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    with torch.no_grad():
        answers = one_by_one(task, batch)
        assert lengths == [11, 12, 13, 14, 15, 16]
        torch.testing.assert_close(answers, task(batch), rtol=1e-5, atol=1e-4)


def test_decisions_run_the_context_again() -> None:
    env = Simulator(generate(SyntheticTraces(traces=2), "test"), generated_video(), Rules(chunks=9), "fixed")
    torch.manual_seed(0)
    task = AdaptiveBitrate(tiny_backbone(), lookahead=0, width=16, context=4, returns=True, actions=True).eval()
    trained(task)
    lengths: list[int] = []
    assert task.backbone is not None
    task.backbone.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    rollout(env, Recomputing(task), [0])
    assert lengths == [4, 8, 12, 16, 16, 16, 16, 16], "return, two of the state, action; for no more than four steps"
    whole = AdaptiveBitrate(tiny_backbone(), lookahead=0, width=16, context=8, returns=True, actions=True).eval()
    whole.load_state_dict(task.state_dict())
    played = [rollout(env, policy, [0, 1]).actions.tolist() for policy in (Recomputing(whole), whole.as_policy())]
    assert played[0] == played[1]


def test_the_copy_is_plain_float32_and_the_task_stays_as_it_is() -> None:
    task = ViewportPrediction(tiny_backbone(dtype="bfloat16", compile=True, training_graph=True), width=16)
    twin = restated(task)
    assert task.backbone is not None and twin.backbone is not None
    assert {weight.dtype for weight in twin.parameters()} == {torch.float32} == {twin.backbone.dtype}
    assert task.backbone.dtype == next(task.backbone.model.parameters()).dtype == torch.bfloat16
    recomputed = [getattr(layer, "gradient_checkpointing", False) for layer in twin.modules()]
    assert sum(recomputed) >= 2 and not any(getattr(layer, "gradient_checkpointing", False) for layer in task.modules())
    batch = {"history": torch.randn(2, 10, 3).cumsum(1), "future": torch.randn(2, 20, 3)}
    twin.loss(twin(batch), batch).backward()
    learned = {name for name, weight in twin.named_parameters() if weight.grad is not None}
    assert learned == {name for name, weight in task.named_parameters() if weight.requires_grad}


def test_what_has_no_published_way_is_left_out() -> None:
    assert can_restate(ViewportPrediction(tiny_backbone(), width=16))
    assert not can_restate(ViewportGRU())


def test_the_copy_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would lie on the GPU while the task itself is measured."""
    copies: list[Any] = []

    def noted(task: Any) -> Any:
        twin = restated(task)
        copies.append(weakref.ref(twin))
        return twin

    monkeypatch.setattr(published, "restated", noted)
    data = ViewportPredictionData(dataset="synthetic", synthetic=Synthetic(videos=3, users=4, seconds=20), batch_size=4)
    task = ViewportPrediction(tiny_backbone(), width=16)
    found = published.published_style(task, data, 1, True, {"accelerator": "cpu"})
    assert found["training"]["batch_samples"] == 1 and data.batch_size == 4
    gc.collect()
    assert [copy() for copy in copies] == [None]
