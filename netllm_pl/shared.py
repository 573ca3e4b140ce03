"""One language model for many tasks: each keeps layers and an adapter of its own, the frozen weights exist once.

Every task stays a whole task with a backbone of its own, whose frozen weights are the very tensors of the others. So
nothing is switched between requests, tasks that keep another number of layers or none of an adapter fit in as well, and
whatever works with one task works with each of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netllm_pl.backbone import Backbone, BackboneConfig
from netllm_pl.checkpoint import load_task
from netllm_pl.errors import UserError
from netllm_pl.quantize import parts_of
from netllm_pl.task import NetTask


def load_tasks(paths: Sequence[Path | str]) -> list[NetTask]:
    """Load tasks whose backbones share their frozen weights, ready for prediction.

    They may be of different classes. Their backbones must be of the same language model, type and bits; they may differ
    in the number of layers that they keep, and in their adapters. At most two copies of the weights exist meanwhile.

    Args:
        paths: Checkpoints and folders that `export` wrote.

    Returns:
        The tasks in that order, on the CPU.

    Raises:
        UserError: If one cannot be loaded, or its language model is another one.
    """
    tasks: list[NetTask] = []
    for path in paths:
        tasks.append(load_task(Path(path)))
        share(tasks, [str(path) for path in paths])
    return tasks


def share(tasks: Sequence[NetTask], names: Sequence[str] | None = None) -> None:
    """Let tasks in memory share the frozen weights of their backbones; all of them lie on one device.

    Args:
        tasks: Tasks with a backbone. Their answers stay the same, bit by bit.
        names: What messages call them; the names of their classes by default.

    Raises:
        UserError: If a backbone is of another language model, type or bits, or trains all weights; nothing is shared.
    """
    names = names or [type(task).__name__ for task in tasks]
    backbones = [_backbone(task, name) for task, name in zip(tasks, names, strict=False)]
    pool: dict[str, nn.Parameter] = {}
    for backbone, name in zip(backbones, names, strict=False):
        own = {place: weight for place, _, _, weight in _frozen(backbone)}
        # Those of the model that keeps fewer layers are among those of the other one.
        same = own.keys() <= pool.keys() or pool.keys() <= own.keys()
        if pool and not (same and all(_equal(own[place], pool[place]) for place in own.keys() & pool.keys())):
            raise UserError(
                f"{name} has another language model ({_told(backbone.config)}) than {names[0]} "
                f"({_told(backbones[0].config)}); only tasks of the same one, dtype and quantize can share it"
            )
        pool = own | pool
    for backbone in backbones:
        for place, module, own_name, _ in list(_frozen(backbone)):
            setattr(module, own_name, pool[place])
            if hasattr(module, "quant_state"):  # a 4-bit layer keeps the scales of its weight at hand
                module.quant_state = getattr(pool[place], "quant_state")  # noqa: B009  # not declared


def held_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes that weights and buffers of modules take in memory; what is shared counts once."""
    sizes: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            sizes |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts_of(tensor)}
    return sum(sizes.values())


def _backbone(task: NetTask, name: str) -> Backbone:
    if task.backbone is None:
        raise UserError(f"{name} has no language model, so there is nothing to share; load it apart")
    if task.backbone.config.full:
        raise UserError(f"{name} trained all weights (backbone.full), so it can share none; load it apart")
    return task.backbone


def _frozen(backbone: Backbone) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield the weights of the language model itself: place in it, module, name there, weight."""
    for place, module in backbone.model.named_modules():
        if "lora_" in place:
            continue
        plain = f"{place}.".removeprefix("base_model.model.").replace("base_layer.", "")
        for name, weight in module.named_parameters(recurse=False):
            yield plain + name, module, name, weight


def _equal(one: Tensor, two: Tensor) -> bool:
    if one is two:
        return True
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    parts, others = parts_of(one), parts_of(two)
    return len(parts) == len(others) and all(map(torch.equal, parts, others))


def _told(config: BackboneConfig) -> str:
    told: dict[str, Any] = {"dtype": config.dtype, "quantize": config.quantize, "pretrained": config.pretrained}
    return ", ".join([config.name, *(f"{name} {value}" for name, value in told.items())])
