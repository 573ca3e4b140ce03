"""Contract testers, public, for authors of tasks: one call shows that a task or a policy keeps its promises.

Each raises AssertionError with a sentence that says what is broken. Shapes: B batch.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from netllm_pl.backbone import BackboneConfig, LoRA
from netllm_pl.checkpoint import KEY, AtomicCheckpointIO, check_identity, load_task, read_checkpoint, trained_names
from netllm_pl.data import Batch, NetDataModule
from netllm_pl.errors import UserError
from netllm_pl.export import export
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.quantize import parts_of
from netllm_pl.ragged import select
from netllm_pl.rollout import Array, Environment, Observations
from netllm_pl.task import NetTask

Act = Callable[[Observations], Array]
Rows = Sequence[int]

STEPS = 4
"""Optimiser steps after which every trainable weight must have had a gradient: heads and adapters may start at zero."""

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}

TINY: dict[str, dict[str, Any]] = {
    "opt": {**_OPT, "vocab_size": 64, "max_position_embeddings": 256},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    "llava": {
        "text_config": {"model_type": "llama", **_LLAMA},
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 16, "patch_size": 8},
    },
}
"""Small sizes of the architectures that do not name them as Llama does."""


def tiny_backbone(architecture: str = "llama", **changes: Any) -> BackboneConfig:
    """Configure a language model of two layers with random weights, for tests that take milliseconds.

    Args:
        architecture: What transformers calls it: llama, mistral, qwen2, qwen3, opt, gpt2, t5, llava, ...
        changes: Fields of `BackboneConfig` to set otherwise; entries of ``config`` are merged with the small sizes.
    """
    sizes = {**TINY.get(architecture, _LLAMA), **changes.pop("config", {})}
    settings = {"pretrained": False, "dtype": "float32", "lora": LoRA(rank=4), "config": sizes}
    return BackboneConfig(**{"name": architecture, **settings, **changes})


def check_task(task_class: type[NetTask], data: NetDataModule, **init_args: Any) -> None:
    """Check what every task promises, on one small training batch and a few steps.

    Predictions are finite and do not depend on the rest of the batch; the loss is finite, falls, and moves every
    trainable weight and no frozen one; checkpoints and exports hold what learns and nothing else, load back to equal
    predictions, and refuse another backbone; the monitored metric is logged. A task that learns by playing (it has no
    automatic optimisation) is checked by `check_player` instead.

    Args:
        task_class: The task or learned baseline.
        data: Small data of that task.
        init_args: Arguments of the class; a backbone that is not given is a tiny one.
    """
    if "backbone" in inspect.signature(task_class).parameters:
        init_args = {"backbone": tiny_backbone(), **init_args}
    pl.seed_everything(0, verbose=False)
    task = task_class(**init_args)
    if not task.automatic_optimization:
        return check_player(task, data)
    batch = _first(data)
    check_predictions(task, batch)
    check_gradients(task, batch)
    check_overfits(task, batch)
    with TemporaryDirectory() as folder:
        checkpoint = check_logging(task, data, Path(folder))
        _check_checkpoint(task, batch, checkpoint)
        _check_export(task, batch, checkpoint, Path(folder) / "exported")
        if task.backbone is not None:
            _check_refusal(task_class, init_args, checkpoint)


def check_player(task: NetTask, data: NetDataModule) -> None:
    """Check a task that learns by playing: two steps move every trainable weight and log what they must.

    Its checkpoints and exports hold what learns and play the same episodes.
    """
    before = {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
    with TemporaryDirectory() as folder:
        checkpoint = check_logging(task, data, Path(folder))
        stuck = [name for name, p in task.named_parameters() if name in before and torch.equal(before[name], p)]
        assert before and not stuck, f"the trainable weight {min(stuck, default='(none)')} did not change in training"
        _check_weights(task, read_checkpoint(checkpoint))
        exported = export(checkpoint, Path(folder) / "exported")
        played = data.episodes(task)
        for source in (checkpoint, exported):
            same = played.equals(data.episodes(load_task(source)))
            assert same, f"what is loaded from {source.name} plays other episodes than the task it was saved from"


def check_predictions(task: NetTask, batch: Batch) -> None:
    """Check that predictions are finite, repeatable, and the same whatever else is in the batch."""
    size = _size(batch)
    assert size >= 2, f"the batch holds {size} samples; give data with batches of at least 2"
    together = _predict(task, batch)
    for tensor, again in zip(together, _predict(task, batch), strict=True):
        assert tensor.shape[0] == size, f"forward gives {tensor.shape[0]} predictions for {size} samples"
        assert torch.isfinite(tensor).all(), "forward gives predictions that are not finite"
        assert torch.equal(tensor, again), "two calls in evaluation mode give different predictions"
    for part in (slice(0, 1), slice(size // 2, size)):
        alone = _predict(task, select(batch, part))
        error = _difference([tensor[part] for tensor in together], alone)
        assert error <= 1e-4, (
            f"a prediction depends on the other samples in the batch (relative difference {error:.1e})"
        )


def check_gradients(task: NetTask, batch: Batch) -> None:
    """Check that a few steps move every trainable weight and leave the frozen ones as they are, bit by bit."""
    trainable = {name: p for name, p in task.named_parameters() if p.requires_grad}
    assert trainable, "no weight of the task is trainable"
    before = {name: value.detach().clone() for name, value in task.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3)
    still = set(trainable)
    for _ in range(STEPS):
        _loss(task, batch, optimizer)
        still -= {name for name in still if (g := trainable[name].grad) is not None and bool(g.count_nonzero())}
        wrong = [name for name, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
        assert not wrong, f"the gradient of {wrong[0]} is not finite"
    assert not still, f"no gradient reaches the trainable weight {min(still)} ({len(still)} in all)"
    frozen = {name for name, p in task.named_parameters() if not p.requires_grad}
    leaked = [name for name, p in task.named_parameters() if name in frozen and p.grad is not None]
    assert not leaked, f"the frozen weight {leaked[0]} got a gradient"
    after = task.state_dict()
    changed = [name for name in frozen if not all(map(torch.equal, parts_of(before[name]), parts_of(after[name])))]
    assert not changed, f"the frozen weight {changed[0]} changed in training"
    stuck = [name for name in trainable if torch.equal(before[name], after[name])]
    assert not stuck, f"the trainable weight {stuck[0]} did not change in training"


def check_overfits(task: NetTask, batch: Batch, steps: int = 40) -> None:
    """Check that the loss of one batch falls by at least a tenth when nothing else is learned."""
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    losses = [_loss(task, batch, optimizer) for _ in range(steps)]
    first, last = float(np.mean(losses[:3])), float(np.mean(losses[-3:]))
    assert last < 0.9 * first, f"the loss of one batch does not fall in {steps} steps: {first:.4g}, then {last:.4g}"


def check_logging(task: NetTask, data: NetDataModule, folder: Path) -> Path:
    """Check that fitting, validating and testing log what they promise.

    Returns:
        The checkpoint of the short run.
    """
    few: dict[str, Any] = {"limit_val_batches": 1, "limit_test_batches": 1, "num_sanity_val_steps": 0, "max_steps": 2}
    silent: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=folder,
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()], **few, **silent,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    assert "train/loss" in trainer.callback_metrics, "fit does not log train/loss"
    checkpoint = folder / "task.ckpt"
    trainer.save_checkpoint(checkpoint)
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        logged = run(task, datamodule=data, verbose=False)[0]
        other = [name for name in logged if not name.startswith(f"{split}/")]
        assert not other, f"{split} logs {other[0]}; names begin with {split}/"
        assert f"{split}/loss" in logged, f"{split} does not log {split}/loss, only {', '.join(logged)}"
        bad = [name for name, value in logged.items() if not np.isfinite(value)]
        assert not bad, f"{bad[0]} is not finite"
        if split == "val":
            names = ", ".join(logged)
            assert task.monitor in logged, f"monitor is {task.monitor}, which validation does not log ({names})"
    return checkpoint


def check_policy(data: NetDataModule, name: str) -> None:
    """Check a baseline on the test split: repeatable, one row a window or episode, every metric there and finite."""
    frame, again = data.episodes(data.policy(name)), data.episodes(data.policy(name))
    assert frame.equals(again), f"policy '{name}' gives other answers when it is run again"
    assert len(frame), f"policy '{name}' gives no rows"
    columns = [metric.column for metric in data.metrics]
    missing = [column for column in ("cluster", *columns) if column not in frame.columns]
    assert not missing, f"policy '{name}': the column {missing[0]} is missing; there are {', '.join(frame.columns)}"
    assert frame["cluster"].dtype.kind in "iu", f"policy '{name}': cluster is no integer"
    for column in columns:
        assert np.isfinite(frame[column].to_numpy(np.float64)).all(), f"policy '{name}': {column} is not finite"
    for key in {"window", "episode"} & set(frame.columns):
        assert frame[key].is_unique, f"policy '{name}': a {key} has more than one row"
    if "window" in frame.columns:
        count = len(data.dataset("test"))
        assert len(frame) == count, f"policy '{name}': {len(frame)} rows for the {count} windows of the test split"


def check_environment(env: Environment, seeds: Sequence[int], act: Act | None = None, limit: int = 10_000) -> None:
    """Check what every simulator promises.

    Episodes repeat with their seeds; a batch of them gives what each alone gives; names, shapes and types of
    observations stay as they are; arrays that were handed out do not change later; rewards are finite; an episode ends
    and stays over.

    Args:
        env: The simulator.
        seeds: Episodes to run, at least two.
        act: Chooses actions (N,) from observations, for each episode from its own row alone; null always takes 0.
        limit: Steps in which all episodes must end.
    """
    assert len(seeds) >= 2, f"give at least 2 seeds, not {len(seeds)}"
    act = act or (lambda observations: np.zeros(len(next(iter(observations.values()))), dtype=np.int64))
    together, again = (_run(env, seeds, act, limit) for _ in range(2))
    _check_steps(together, len(seeds))
    every = range(len(seeds))
    difference = _differs(together, again, every, every)
    assert not difference, f"{difference} differs when the same episodes are run again"
    for place, seed in enumerate(seeds):
        difference = _differs(_run(env, [seed], act, limit), together, [0], [place])
        assert not difference, f"{difference} of seed {seed} differs when the episode is run alone"


def _run(env: Environment, seeds: Sequence[int], act: Act, limit: int) -> list[dict[str, Array]]:
    """Run episodes; return a record for each step: ``alive``, observations, ``reward``, ``over``, and ``info/...``."""
    observations = env.reset(list(seeds))
    steps: list[dict[str, Array]] = []
    kept: list[tuple[Observations, Observations]] = []
    over = np.zeros(len(seeds), dtype=bool)
    while not over.all():
        assert len(steps) < limit, f"after {limit} steps {int((~over).sum())} episodes are not over"
        record = {"alive": ~over} | {f"observation {name}": value for name, value in observations.items()}
        kept.append((observations, {name: _copy(value) for name, value in observations.items()}))
        observations, rewards, now, info = env.step(act(observations))
        assert not (over & ~now).any(), f"an episode was over and goes on at step {len(steps)}"
        over = now
        record |= {"reward": rewards, "over": over} | {f"info {name}": value for name, value in info.items()}
        steps.append(record)
    for given, copy in kept:
        changed = [name for name in copy if not _equal(given[name], copy[name])]
        assert not changed, f"the observation {changed[0]} changed after it was handed out"
    return steps


def _check_steps(steps: list[dict[str, Array]], n: int) -> None:
    """Check names, shapes and types against those of the first step, and that rewards are finite."""
    first = steps[0]
    for number, step in enumerate(steps):
        assert step.keys() == first.keys(), f"step {number} has other names: {min(step.keys() ^ first.keys())}"
        for name, value in step.items():
            assert value.shape[:1] == (n,), f"{name} has shape {value.shape} for {n} episodes"
            same = value.shape == first[name].shape and value.dtype == first[name].dtype
            assert same, f"{name} is {value.dtype} {value.shape} at step {number}, at first {first[name].dtype}"
            if value.dtype == object:
                kinds = {(row.dtype, row.shape[1:]) for row in (first[name][0], *value[step["alive"]])}
                assert len(kinds) == 1, f"{name} holds arrays of different kinds at step {number}: {kinds}"
        assert np.isfinite(step["reward"][step["alive"]]).all(), f"a reward is not finite at step {number}"
        assert step["over"].dtype == np.bool_, f"over is {step['over'].dtype}, not bool"


def _differs(steps: list[dict[str, Array]], others: list[dict[str, Array]], own: Rows, other: Rows) -> str:
    """Name what differs between some episodes of two runs while they are alive; empty if nothing does."""
    alive = [[step["alive"][list(rows)] for step in run] for run, rows in ((steps, own), (others, other))]
    if not np.array_equal(np.sum(alive[0], axis=0), np.sum(alive[1], axis=0)):
        return "the number of steps"
    for step, reference, living in zip(steps, others, alive[0], strict=False):
        for name in step:
            a, b = step[name][list(own)][living], reference[name][list(other)][living]
            if not _equal(a, b):
                return name
    return ""


def _copy(values: Array) -> Array:
    """Copy an array, and the arrays that it holds."""
    out = values.copy()
    if values.dtype == object:
        out[:] = [value.copy() for value in values]
    return out


def _equal(one: Array, two: Array) -> bool:
    """Compare arrays, or arrays that hold arrays, of which types and shapes must agree, too."""
    if one.dtype != object:
        return np.array_equal(one, two, equal_nan=one.dtype.kind == "f")
    return len(one) == len(two) and all(
        a.dtype == b.dtype and a.shape == b.shape and _equal(a, b) for a, b in zip(one, two, strict=True)
    )


def _check_checkpoint(task: NetTask, batch: Batch, path: Path) -> None:
    """Check that a checkpoint holds what learns and nothing else, and gives the same task back."""
    _check_weights(task, read_checkpoint(path))
    _same(task, load_task(path), batch, "a checkpoint")


def _check_weights(task: NetTask, stored: dict[str, Any]) -> None:
    """Check that a checkpoint holds what learns and nothing else."""
    held, wanted = set(stored["state_dict"]), trained_names(task)
    assert held == wanted, f"the checkpoint's weights are not the trainable ones: {min(held ^ wanted)} differs"
    parameters = dict(task.named_parameters())
    frozen = [name for name in held if name in parameters and not parameters[name].requires_grad]
    assert not frozen, f"the checkpoint holds the frozen weight {frozen[0]}"
    assert stored[KEY]["task"] == type(task).__name__, "the checkpoint names another task"


def _check_export(task: NetTask, batch: Batch, checkpoint: Path, folder: Path) -> None:
    """Check that what `export` writes gives the same task back."""
    _same(task, load_task(export(checkpoint, folder)), batch, "an exported folder")


def _check_refusal(task_class: type[NetTask], init_args: dict[str, Any], checkpoint: Path) -> None:
    """Check that a checkpoint is not loaded on other frozen weights of the same shapes."""
    config: BackboneConfig = init_args["backbone"]
    assert not config.pretrained, "check_task needs a backbone with random weights, such as tiny_backbone()"
    other = task_class(**{**init_args, "backbone": replace(config, seed=config.seed + 1)})
    try:
        check_identity(other, read_checkpoint(checkpoint))
    except UserError:
        return
    raise AssertionError("a checkpoint loads on another backbone without an error")


def _same(task: NetTask, loaded: NetTask, batch: Batch, source: str) -> None:
    assert type(loaded) is type(task), f"{source} loads as {type(loaded).__name__}, not {type(task).__name__}"
    error = _difference(_predict(task, batch), _predict(loaded, batch))
    assert error == 0, f"predictions differ after loading from {source} (relative difference {error:.1e})"


def _first(data: NetDataModule) -> Batch:
    batch: Batch = next(iter(data.train_dataloader()))
    return batch


def _size(batch: Batch) -> int:
    return int(next(iter(batch.values())).shape[0])


def _predict(task: NetTask, batch: Batch) -> Sequence[Tensor]:
    """Tensors of a prediction."""
    task.eval()
    with torch.no_grad():
        prediction = task(batch)
    return [prediction] if isinstance(prediction, Tensor) else list(prediction)


def _loss(task: NetTask, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """Take one training step on a batch as it is; return the loss before the step."""
    task.train()
    loss = task.loss(task(batch), batch)
    assert loss.dim() == 0, f"the loss has shape {tuple(loss.shape)}; it must be a scalar"
    assert torch.isfinite(loss), "the loss is not finite"
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _difference(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest value if that is above one.

    Scores of impossible choices count as zero, and so do choices that one of them does not have: padding.
    """
    differences = []
    for a, b in zip(one, two, strict=True):
        a, b = (torch.where(x <= IMPOSSIBLE / 2, 0.0, x.double()) for x in (a, b))
        sizes = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
        a, b = (
            F.pad(x, [n for size, own in zip(sizes[::-1], x.shape[::-1], strict=True) for n in (0, size - own)])
            for x in (a, b)
        )
        differences.append(float((a - b).abs().max() / a.abs().max().clamp_min(1.0)))
    return max(differences)
