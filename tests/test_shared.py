"""Tasks that share a language model: equal answers, weights that exist once, requests in any order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netllm_pl import timing
from netllm_pl.acting import ActingTask
from netllm_pl.backbone import LoRA
from netllm_pl.checkpoint import KEY, identity, load_task, trained_names
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError
from netllm_pl.export import export
from netllm_pl.quantize import parts_of, weight_bytes
from netllm_pl.shared import held_bytes, load_tasks, share
from netllm_pl.speed import switching
from netllm_pl.task import NetTask
from netllm_pl.testing import tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrate, AdaptiveBitrateData
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces
from tasks.job_scheduling import JobScheduling, JobSchedulingData
from tasks.job_scheduling.simulator import Rules as ClusterRules
from tasks.job_scheduling.synthetic import SyntheticWorkload
from tasks.viewport_prediction import ViewportGRU, ViewportPrediction, ViewportPredictionData
from tasks.viewport_prediction.synthetic import Synthetic

WIDE = {"hidden_size": 64, "intermediate_size": 2048, "head_dim": 16}
BACKBONE = tiny_backbone(config=WIDE)
"""Mostly frozen weights; head_dim and layers of whole blocks of NF4."""


def save(task: NetTask, file: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a task whose weights are as if it had learned something."""
    draw = torch.Generator().manual_seed(seed)
    learned = {name: weight for name, weight in task.state_dict().items() if name in trained_names(task)}
    for name, weight in learned.items():
        if "lora_" in name:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=draw))
    torch.save({KEY: identity(task), "state_dict": learned}, file)
    return file


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint of one task, an exported folder of the next, and a checkpoint of a third, with other adapters."""
    folder = tmp_path_factory.mktemp("shared")
    viewport = ViewportPrediction(backbone=BACKBONE, vision=None, width=16)
    bitrate = AdaptiveBitrate(backbone=replace(BACKBONE, lora=LoRA(rank=2)), width=16)
    jobs = JobScheduling(backbone=replace(BACKBONE, lora=LoRA(rank=8, targets=["o_proj"])), width=16, head_width=16)
    exported = export(save(bitrate, folder / "abr.ckpt", 1), folder / "abr")
    return [save(viewport, folder / "vp.ckpt"), exported, save(jobs, folder / "cjs.ckpt", 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[NetDataModule]:
    return [
        ViewportPredictionData(synthetic=Synthetic(videos=3, users=4, seconds=30, picture_height=8, picture_width=16)),
        AdaptiveBitrateData(
            synthetic=SyntheticTraces(traces=3, duration_s=60), experience=None, rules=Rules(chunks=6)
        ),
        JobSchedulingData(
            synthetic=SyntheticWorkload(queries=3, sizes=("2g",)), experience=None,
            rules=ClusterRules(jobs=3, executors=5, arrival_rate=2e-4), test_seeds=[1, 2], valid_seeds=[11],
        ),
    ]  # fmt: skip


def requests(task: NetTask, data: NetDataModule) -> Callable[[], Any]:
    """Requests one after the other: each call answers the next one."""
    if not isinstance(task, ActingTask):
        test = data.dataset("test")
        numbers = iter(range(10**6))

        def predict() -> Tensor:
            with torch.inference_mode():
                answer: Tensor = task.predict_step(test[[next(numbers) % len(test)]], 0)
            return answer

        return predict
    policy, env = task.as_policy(), data.simulator("test")
    policy.reset(2)
    seen = [env.reset([0, 1])]

    def act() -> Any:
        actions = policy.act(seen[-1])
        seen.append(env.step(actions)[0])
        return actions

    return act


def test_a_mixed_stream_is_answered_as_by_tasks_that_were_loaded_apart(
    paths: list[Path], data: list[NetDataModule]
) -> None:
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 5))
    streams = [
        [requests(task, own) for task, own in zip(tasks, data, strict=True)]
        for tasks in (load_tasks(paths), [load_task(path) for path in paths])
    ]
    answers = [[stream[number]() for number in order] for stream in streams]
    for together, apart in zip(*answers, strict=True):
        assert np.array_equal(together, apart)
    assert len({np.asarray(answer).tobytes() for answer in answers[0]}) > 3


def test_the_frozen_weights_exist_once(paths: list[Path]) -> None:
    tasks, apart = load_tasks(paths), [load_task(path) for path in paths]
    learned = sum(p.numel() * 4 for task in apart for p in task.parameters() if p.requires_grad)
    frozen = sum(p.numel() * 4 for p in apart[0].parameters() if not p.requires_grad)
    small = sum(b.numel() * b.element_size() for task in apart for b in task.buffers())
    assert held_bytes(apart) == learned + 3 * frozen + small
    assert held_bytes(tasks) == learned + frozen + small
    first, second = (dict(task.named_parameters()) for task in tasks[:2])
    for name, weight in first.items():
        if name.startswith("backbone.") and not weight.requires_grad:
            assert second[name] is weight


def test_they_move_and_learn_together_but_each_its_own(paths: list[Path], data: list[NetDataModule]) -> None:
    viewport, bitrate, _ = load_tasks(paths)
    batch = data[0].dataset("test")[[0, 1]]
    before = viewport(batch).detach()
    theirs = {name: p.detach().clone() for name, p in bitrate.named_parameters()}
    viewport.train()
    viewport.loss(viewport(batch), batch).backward()
    got = {name for name, p in viewport.named_parameters() if p.grad is not None}
    assert got == {name for name, p in viewport.named_parameters() if p.requires_grad}
    torch.optim.SGD([p for p in viewport.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(viewport.eval()(batch), before)
    assert all(torch.equal(p, theirs[name]) and p.grad is None for name, p in bitrate.named_parameters())
    viewport.double()
    frozen = {name: p for name, p in bitrate.named_parameters() if name in theirs and "layers.0.mlp" in name}
    assert frozen and all(p.dtype == torch.float64 for p in frozen.values())


@pytest.mark.parametrize("deep_first", [True, False])
def test_tasks_that_keep_fewer_layers_share_those(deep_first: bool, tmp_path: Path) -> None:
    from netllm_pl.backbone import Backbone

    whole = Backbone(replace(BACKBONE, lora=None))
    whole.model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    model = replace(BACKBONE, name=str(tmp_path / "model"), pretrained=True, config=None)
    files = []
    for layers in (None, 1):
        task = ViewportPrediction(backbone=replace(model, layers=layers), vision=None, width=16)
        files.append(save(task, tmp_path / f"{layers}.ckpt", seed=layers or 0))
    files = files if deep_first else files[::-1]
    tasks, apart = load_tasks(files), [load_task(file) for file in files]
    frozen = [sum(p.numel() * 4 for p in task.parameters() if not p.requires_grad) for task in apart]
    assert held_bytes(apart) - held_bytes(tasks) == min(frozen)
    assert [task.backbone.config.layers for task in tasks if task.backbone] == ([None, 1] if deep_first else [1, None])


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_quantised_weights_are_shared_too(bits: Any, tmp_path: Path, data: list[NetDataModule]) -> None:
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[bits])
    backbone = replace(BACKBONE, quantize=bits)
    files = [
        save(ViewportPrediction(backbone=backbone, vision=None, width=16), tmp_path / f"{seed}.ckpt", seed)
        for seed in (1, 2)
    ]
    tasks, apart = load_tasks(files), [load_task(file) for file in files]
    batch = data[0].dataset("test")[[0, 1, 2]]
    with torch.no_grad():
        for one, two in zip(tasks, apart, strict=True):
            assert torch.equal(one(batch), two(batch))
    frozen = [p for p in apart[0].parameters() if not p.requires_grad]
    saved = held_bytes(apart) - held_bytes(tasks)
    # bitsandbytes itself has one table for all weights.
    assert 0.99 * sum(map(weight_bytes, frozen)) < saved <= sum(map(weight_bytes, frozen))


def test_int8_weights_stay_shared_where_they_are_moved() -> None:
    """They are no plain tensors: torch moves the parts of such a weight and keeps the weight."""
    pytest.importorskip("torchao")
    tasks = [ViewportPrediction(backbone=replace(BACKBONE, quantize="int8"), vision=None, width=16) for _ in range(2)]
    share(tasks)
    tasks[0].to("meta")
    moved, other = ([p for p in task.parameters() if len(parts_of(p)) > 1] for task in tasks)
    assert len(moved) == 14 and all(one is two for one, two in zip(moved, other, strict=True))
    assert {part.device.type for weight in other for part in parts_of(weight)} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [None, "int8", "nf4"])
def test_on_a_gpu_the_frozen_weights_exist_once(bits: Any, data: list[NetDataModule]) -> None:
    backbone = replace(BACKBONE, quantize=bits, dtype="bfloat16")
    tasks = [ViewportPrediction(backbone=backbone, vision=None, width=16).eval() for _ in range(2)]
    share(tasks)
    for task in tasks:
        task.to("cuda")
    frozen = [
        [part.data_ptr() for p in task.parameters() if not p.requires_grad for part in parts_of(p)] for task in tasks
    ]
    assert frozen[0] == frozen[1]
    batch = {name: value.cuda() for name, value in data[0].dataset("test")[[0, 1]].items()}
    with torch.no_grad():
        assert all(task(batch).isfinite().all() for task in tasks)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 1}, "another language model"),
        ({"dtype": "bfloat16"}, r"another .*dtype bfloat16.* than .*dtype float32"),
        ({"config": {**(BACKBONE.config or {}), "hidden_size": 128}}, "another language model"),
    ],
)
def test_another_language_model_is_refused_and_nothing_is_changed(
    changes: dict[str, Any], text: str, paths: list[Path], tmp_path: Path
) -> None:
    other = save(ViewportPrediction(backbone=replace(BACKBONE, **changes), vision=None, width=16), tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=text) as error:
        load_tasks([*paths, other])
    assert str(error.value).startswith(f"{other} has another") and "\n" not in str(error.value)
    tasks = [load_task(path) for path in (paths[0], other)]
    before = held_bytes(tasks)
    with pytest.raises(UserError, match="ViewportPrediction has another"):
        share(tasks)
    assert held_bytes(tasks) == before


def test_other_architectures_and_tasks_that_share_nothing_are_refused() -> None:
    one = ViewportPrediction(backbone=BACKBONE, vision=None, width=16)
    cases: list[tuple[NetTask, str]] = [
        (ViewportPrediction(backbone=tiny_backbone("gpt2"), vision=None, width=16), r"another language model \(gpt2"),
        (ViewportGRU(width=8), "ViewportGRU has no language model"),
        (
            ViewportPrediction(backbone=replace(BACKBONE, lora=None, full=True), vision=None, width=16),
            "trained all weights",
        ),
    ]
    for other, text in cases:
        with pytest.raises(UserError, match=text):
            share([one, other])


# What a change costs --------------------------------------------------------------------------------------------------


def test_the_cost_of_taking_turns_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, last = [0.0], [-1]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(number: int) -> None:
        clock[0] += 0.001 if last == [number] else 0.011
        last[0] = number

    found = switching([lambda: call(0), lambda: call(1)], rounds=4)
    assert found == pytest.approx({"apart_ms": 2, "mixed_ms": 22, "switch_ms": 10})


def test_changing_between_tasks_moves_no_weights(paths: list[Path], data: list[NetDataModule]) -> None:
    tasks = load_tasks(paths)
    state = [(p.requires_grad, p.data_ptr(), p._version) for task in tasks for p in task.parameters()]
    calls = [requests(task, own) for task, own in zip(tasks[:2], data[:2], strict=True)]
    found = switching(calls, rounds=1)  # a session has six chunks
    assert min(found["apart_ms"], found["mixed_ms"]) > 0
    assert state == [(p.requires_grad, p.data_ptr(), p._version) for task in tasks for p in task.parameters()]


def test_modules_count_shared_storages_once() -> None:
    one, two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    assert held_bytes([one, two]) == 2 * 8 * 8 * 4
    two.weight = one.weight
    assert held_bytes([one, two]) == 8 * 8 * 4
