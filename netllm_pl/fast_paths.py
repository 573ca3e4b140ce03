"""Fast paths of a GPU that `netllm_pl.benchmark` takes where a config leaves them open, and what it compares with."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from netllm_pl.acting import ActingTask
from netllm_pl.backbone import Backbone, checkpoint_activations, compile_layers
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError
from netllm_pl.frozen import inner_model
from netllm_pl.quantize import weight_count
from netllm_pl.speed import decisions, forget_shapes, predictions, training
from netllm_pl.streaming import forget
from netllm_pl.task import NetTask
from netllm_pl.timing import Entry

SMALL = 1_000_000_000
"""Weights of a language model below which a training step is bound by launching kernels."""
FEW = 4
"""Samples of a batch with which a base of 4 bits is trained."""


def hasten(backbone: Backbone, settings: dict[str, Any]) -> Entry:
    """Take the fast paths of a GPU: compiled layers, captured graphs, mixed precision; small models train in graphs.

    Args:
        backbone: Whose configuration changes.
        settings: Of the trainer; gets a precision, if it has none.

    Returns:
        What they are.
    """
    before = backbone.config
    small = sum(map(weight_count, backbone.model.parameters())) < SMALL and not before.checkpointing
    graph = before.training_graph or (small and backbone.causal)
    backbone.config = replace(before, compile=True, graphs=True, training_graph=graph)
    if not before.compile:
        compile_layers(backbone.model)
    if backbone.dtype == torch.bfloat16:
        settings.setdefault("precision", "bf16-mixed")
    chosen = {name: getattr(backbone.config, name) for name in ("compile", "graphs", "training_graph")}
    return chosen | {"checkpointing": before.checkpointing, "precision": settings.get("precision")}


def training_or_plain(
    task: NetTask, data: NetDataModule, repeats: int, quick: bool, settings: Mapping[str, Any]
) -> tuple[Entry, torch.device]:
    """Measure training; where its graph cannot be captured, without one."""
    backbone = task.backbone
    forget_shapes(task)
    try:
        return training(task, data, repeats, quick, settings)
    except RuntimeError as error:
        if backbone is None or not backbone.config.training_graph or isinstance(error, torch.OutOfMemoryError):
            raise
        backbone.config = replace(backbone.config, training_graph=False)
        forget_shapes(task)
        found, device = training(task, data, repeats, quick, settings)
        return found | {"training_graph_failed": str(error).splitlines()[0]}, device


@contextmanager
def nothing_recomputed(task: NetTask) -> Iterator[None]:
    """Keep all activations, as is fastest where they fit."""
    backbone = task.backbone
    if backbone is None or not backbone.config.checkpointing:
        yield
        return
    before = backbone.config
    backbone.config = replace(before, checkpointing=False)
    checkpoint_activations(inner_model(backbone), 0.0)
    try:
        yield
    finally:
        backbone.config = before
        checkpoint_activations(inner_model(backbone), float(before.checkpointing))


def quantised(task: NetTask, data: NetDataModule, repeats: int, quick: bool, settings: Mapping[str, Any]) -> Entry:
    """Measure training and answers with a base of 4 bits, all activations recomputed, in batches of `FEW` samples.

    Args:
        task: Gets another backbone, for which its own is given up.
        data: Its data.
        repeats: Measurements behind each median.
        quick: Measure for a shorter time.
        settings: Of the trainer.

    Returns:
        ``training``, and ``decision`` or ``prediction``; or ``not_measured``, why it cannot be had.
    """
    assert task.backbone is not None
    device, size = task.device, data.batch_size
    config = replace(
        task.backbone.config, quantize="nf4", checkpointing=True, compile=False, training_graph=False, graphs=True
    )
    forget(task)
    forget_shapes(task)
    task.backbone = None
    gc.collect()
    data.batch_size = FEW
    try:
        with device:  # where random weights are drawn, a layer at a time
            task.backbone = Backbone(config)
        found: Entry = {"training": training(task, data, repeats, quick, settings)[0]}
    except (ModuleNotFoundError, UserError) as error:  # no package for it, or layers of a size that it cannot take
        return {"not_measured": str(error)}
    finally:
        data.batch_size = size
    task.to(device).eval()
    if isinstance(task, ActingTask):
        found["decision"] = decisions(task, data, repeats, again=False)["streaming"]
    else:
        found["prediction"] = predictions(task, data, repeats, quick)["single"]
    return found
