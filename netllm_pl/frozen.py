"""Language models that do not learn now: LoRA merged into the weights, and predictions captured in CUDA graphs.

Shapes: B batch.
"""

import copy
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from netllm_pl.backbone import Backbone, compile_layers
from netllm_pl.data import Batch
from netllm_pl.graphs import Captured, Places, normal_mode

if TYPE_CHECKING:
    from netllm_pl.task import NetTask

# A copy that shares its weights ---------------------------------------------------------------------------------------


class Merged:
    """The weights of a language model's adapted layers with LoRA merged in, one copy for all that use them.

    Args:
        backbone: Whose model; it may go on learning.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.layers: dict[str, Any] = {
            name: module
            for name, module in inner_model(backbone).named_modules()
            if hasattr(module, "get_delta_weight") and _is_plain(getattr(module, "base_layer", None))
        }
        weights = {name: layer.base_layer.weight.detach() for name, layer in self.layers.items()}
        self.weights = {name: nn.Parameter(weight.clone(), requires_grad=False) for name, weight in weights.items()}
        self.learned = [weight for layer in self.layers.values() for weight in _adapter_weights(layer)]
        self.state: Any = None

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
            known = _MERGED[backbone] = Places(backbone), Merged(backbone)
        known[1].refresh()
    return known[1]


def frozen_copy(backbone: Backbone) -> PreTrainedModel:
    """Copy a language model for inference: all weights are shared, with LoRA merged where it can be."""
    inner, merged = inner_model(backbone), merged_of(backbone)
    shared = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
    model: PreTrainedModel = copy.deepcopy(inner, shared).eval()
    for name, layer in merged.layers.items():
        parent, _, leaf = name.rpartition(".")
        linear = copy.deepcopy(layer.base_layer, shared)
        linear.weight = merged.weights[name]
        setattr(model.get_submodule(parent), leaf, linear)
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
            self.task, self.batch = task, {name: value.clone() for name, value in batch.items()}
            self.model, self.places = frozen_copy(task.backbone), Places(task)
        self.run = Captured(self._predict, capture)

    def _predict(self) -> Any:
        assert self.task.backbone is not None
        with self.task.backbone.replaced(self.model):
            return self.task(self.batch)

    def __call__(self, batch: Batch) -> Any:
        """Predict a batch of the shape of the first one; the result is the caller's."""
        from netllm_pl.task import each_tensor

        assert self.task.backbone is not None
        with normal_mode():
            merged_of(self.task.backbone)
            for name, place in self.batch.items():
                place.copy_(batch[name], non_blocking=True)
            return each_tensor(self.run(), partial(torch.clone))


_PREDICTORS: "WeakKeyDictionary[NetTask, dict[Any, int | Predictor]]" = WeakKeyDictionary()


def predict(task: "NetTask", batch: Batch) -> Any:
    """Predict a batch, on a GPU by a CUDA graph if such a batch has come before."""
    backbone = task.backbone
    if (
        backbone is None
        or not backbone.config.graphs
        or task.device.type != "cuda"
        or not task.fixed
        or task.training
        or torch.is_grad_enabled()
    ):
        return task(batch)
    known = _PREDICTORS.setdefault(task, {})
    shape = tuple((name, value.shape, value.dtype) for name, value in batch.items())
    found = known.get(shape, 0)
    if isinstance(found, Predictor) and found.places.hold():
        return found(batch)
    seen = found + 1 if isinstance(found, int) else SEEN
    known[shape] = seen if seen < SEEN or not backbone.causal else Predictor(task, batch, capture=True)
    for oldest in list(known)[: max(0, len(known) - KEPT)]:
        del known[oldest]
    ready = known[shape]
    return ready(batch) if isinstance(ready, Predictor) else task(batch)
