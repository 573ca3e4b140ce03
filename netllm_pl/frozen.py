"""Language models that do not learn now: LoRA merged into the weights, and predictions captured in CUDA graphs.

Shapes: B batch.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from netllm_pl.backbone import Backbone, compile_layers
from netllm_pl.data import Batch
from netllm_pl.graphs import Captured, Places, normal_mode
from netllm_pl.joined import GROUPS, Joined, Part, join_in_place

if TYPE_CHECKING:
    from netllm_pl.task import NetTask

# A copy that shares its weights ---------------------------------------------------------------------------------------


class Merged:
    """The weights of a language model's adapted layers with LoRA merged in, one copy for all that use them.

    Layers that read the same input are joined. Where none of a group is adapted, the weights of the language model
    itself are laid side by side in memory, so that there is no second copy; else the copy holds the whole group.

    Args:
        backbone: Whose model; it may go on learning.
    """

    def __init__(self, backbone: Backbone) -> None:
        inner = inner_model(backbone)
        self.layers: dict[str, Any] = {
            name: module
            for name, module in inner.named_modules()
            if hasattr(module, "get_delta_weight") and _is_plain(getattr(module, "base_layer", None))
        }
        self.weights: dict[str, nn.Parameter] = {}
        self.groups: dict[tuple[str, ...], Joined] = {}
        for place, parent in inner.named_modules():
            for names in GROUPS:
                self._join(place, parent, names)
        for name in self.layers.keys() - self.weights.keys():
            weight = self.layers[name].base_layer.weight.detach().clone()
            self.weights[name] = nn.Parameter(weight, requires_grad=False)
        self.learned = [weight for layer in self.layers.values() for weight in _adapter_weights(layer)]
        self.state: Any = None

    def _join(self, place: str, parent: nn.Module, names: tuple[str, ...]) -> None:
        """Join layers of a part of the model, if it has them and they can be joined."""
        paths = tuple(f"{place}.{name}" for name in names)
        layers: list[Any] = [getattr(parent, name, None) for name in names]
        linear = [layer.base_layer if path in self.layers else layer for path, layer in zip(paths, layers, strict=True)]
        if not all(type(layer) is nn.Linear and _is_plain(layer) for layer in linear):
            return
        weights, biases = [layer.weight for layer in linear], [layer.bias for layer in linear]
        sizes, present = [len(weight) for weight in weights], [bias for bias in biases if bias is not None]
        if len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) > 1 or 0 < len(present) < len(
            biases
        ):
            return
        adapted = any(path in self.layers for path in paths)
        join = torch.cat if adapted else join_in_place
        joined = Joined(join(weights), join(present) if present else None, sizes)
        self.groups[paths] = joined
        for path, part in zip(paths, joined.weight.detach().split(sizes), strict=True):
            if path in self.layers:
                self.weights[path] = nn.Parameter(part, requires_grad=False)

    def refresh(self) -> None:
        """Merge what the adapters have learned since, if they have."""
        state = (
            [weight._version for weight in self.learned],
            [list(layer.active_adapters) for layer in self.layers.values()],
        )
        if state == self.state:
            return
        for name, layer in self.layers.items():
            (adapter,) = layer.active_adapters
            self.weights[name].copy_(layer.base_layer.weight.float() + layer.get_delta_weight(adapter).float())
        self.state = state


def _adapter_weights(layer: nn.Module) -> list[nn.Parameter]:
    return [weight for name, weight in layer.named_parameters() if not name.startswith("base_layer.")]


_MERGED: WeakKeyDictionary[Backbone, tuple[Places, Merged]] = WeakKeyDictionary()


def merged_of(backbone: Backbone) -> Merged:
    """Return the merged weights of a backbone, up to date."""
    known = _MERGED.get(backbone)
    with normal_mode():
        if known is None or not known[0].hold():
            merged = Merged(backbone)  # it may move weights
            known = _MERGED[backbone] = Places(backbone), merged
        known[1].refresh()
    return known[1]


def frozen_copy(backbone: Backbone) -> PreTrainedModel:
    """Copy a language model for inference: all weights are shared, with LoRA merged where it can be."""
    inner, merged = inner_model(backbone), merged_of(backbone)
    shared = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
    model: PreTrainedModel = copy.deepcopy(inner, shared).eval()
    in_groups = {name for names in merged.groups for name in names}
    for name, layer in merged.layers.items():
        if name in in_groups:
            continue
        parent, _, leaf = name.rpartition(".")
        linear = copy.deepcopy(layer.base_layer, shared)
        linear.weight = merged.weights[name]
        setattr(model.get_submodule(parent), leaf, linear)
    for names, joined in merged.groups.items():
        joined = Joined(joined.weight, joined.bias, joined.sizes)
        for index, name in enumerate(names):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Part(joined, index))
    if backbone.config.compile:
        compile_layers(model, dynamic=False)
    return model


def inner_model(backbone: Backbone) -> Any:
    """The model of transformers, with or without layers of PEFT in it."""
    get_base_model: Any = getattr(backbone.model, "get_base_model", None)
    return backbone.model if get_base_model is None else get_base_model()


def _is_plain(layer: Any) -> bool:
    """Whether a linear layer holds plain numbers: quantised weights cannot take an update."""
    return type(layer) in (nn.Linear, Conv1D) and type(layer.weight.data) is Tensor and layer.weight.is_floating_point()


# Predictions ----------------------------------------------------------------------------------------------------------

SEEN = 3
"""A batch of one shape is captured when it comes so often."""
KEPT = 4
"""Shapes that are kept for a task."""


class Predictor:
    """Predicts batches of one shape, encoders, language model and head in one graph.

    Args:
        task: In evaluation mode, and of fixed operations (`NetTask.fixed`).
        batch: The first batch.
        capture: Whether to capture a CUDA graph.
    """

    def __init__(self, task: "NetTask", batch: Batch, capture: bool) -> None:
        assert task.backbone is not None
        with normal_mode():
            self.batch = {name: value.clone() for name, value in batch.items()}
            self.task = ref(task)  # `_PREDICTORS` would else keep what it is the key of
            self.model, self.merged = frozen_copy(task.backbone), merged_of(task.backbone)
            self.places = Places(task)
        self.around: dict[str, Any] = {}
        if capture and task.backbone.config.compile:
            # Encoder and head are many small kernels, which together take as long as several layers.
            self.around = {
                "encode": torch.compile(self._encode, dynamic=False),
                "answer": torch.compile(self._answer, dynamic=False),
            }
        self.run = Captured(self._predict, capture)

    def _predict(self) -> Any:
        task = self.task()
        assert task is not None and task.backbone is not None
        with task.backbone.replaced(self.model), _own_methods(task, self.around):
            return task(self.batch)

    def _encode(self, batch: Batch) -> Any:
        task = self.task()
        assert task is not None
        return type(task).encode(task, batch)

    def _answer(self, hidden: Tensor, batch: Batch) -> Any:
        task = self.task()
        assert task is not None
        return type(task).answer(task, hidden, batch)

    def __call__(self, batch: Batch) -> Any:
        """Predict a batch of the shape of the first one; the result is the caller's."""
        from netllm_pl.task import each_tensor

        with normal_mode():
            self.merged.refresh()
            for name, place in self.batch.items():
                place.copy_(batch[name], non_blocking=True)
            return each_tensor(self.run(), partial(torch.clone))


@contextmanager
def _own_methods(task: "NetTask", methods: dict[str, Any]) -> Iterator[None]:
    """Let a task have other methods for a while."""
    task.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del task.__dict__[name]


_PREDICTORS: "WeakKeyDictionary[NetTask, dict[Any, int | Predictor]]" = WeakKeyDictionary()


def predict(task: "NetTask", batch: Batch) -> Any:
    """Predict a batch, on a GPU by a CUDA graph if such a batch has come before."""
    backbone = task.backbone
    if (
        backbone is None
        or not backbone.config.graphs
        or task.device.type != "cuda"
        or not task.fixed
        or backbone.sharded
        or task.training
        or torch.is_grad_enabled()
    ):
        return task(batch)
    known = _PREDICTORS.setdefault(task, {})
    mixed = torch.is_autocast_enabled("cuda")  # the same weights then give other numbers
    shape = mixed, tuple((name, value.shape, value.dtype) for name, value in batch.items())
    found = known.get(shape, 0)
    if isinstance(found, Predictor) and found.places.hold():
        return found(batch)
    seen = found + 1 if isinstance(found, int) else SEEN
    known[shape] = seen if seen < SEEN or not backbone.causal else Predictor(task, batch, capture=True)
    for oldest in list(known)[: max(0, len(known) - KEPT)]:
        del known[oldest]
    ready = known[shape]
    return ready(batch) if isinstance(ready, Predictor) else task(batch)
