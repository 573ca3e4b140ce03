"""Frozen weights that come late: a model is laid out without, and a process puts those it keeps where they belong.

Until then a weight has its shape and type, but takes no memory: no copy in the machine's memory is made on the way to a
GPU, and of a model whose layers are shared out over processes none of them ever holds more than one layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor, nn

_PUT_OFF: ContextVar[bool] = ContextVar("put_off", default=False)


@contextmanager
def put_off() -> Iterator[None]:
    """Let backbones that are built inside get their weights later, by `Backbone.place`, where they will be used."""
    token = _PUT_OFF.set(True)
    try:
        yield
    finally:
        _PUT_OFF.reset(token)


def is_put_off() -> bool:
    """Whether backbones are to get their weights later."""
    return _PUT_OFF.get()


class Source(Protocol):
    """Where frozen weights come from: `Stored`, or `netllm_pl.random_weights.Draw`."""

    def fill(self, part: nn.Module, path: str, device: torch.device, dtype: torch.dtype) -> None:
        """Give a module, and all in it, the weights that they do not have yet.

        Args:
            part: Of the model.
            path: Its name in the model; empty for the model itself. LoRA's layers in it do not count.
            device: Where the weights go.
            dtype: Their type.
        """


class Stored:
    """Weights as they lie in a file, of which nothing is read before it is needed.

    Args:
        model: As transformers has loaded it, in the type of the file; its weights are taken out of it.
        dtype: Type that the weights are to have.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._weights = {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad))
        blank(model, dtype)

    def fill(self, part: nn.Module, path: str, device: torch.device, dtype: torch.dtype) -> None:
        """Give a module, and all in it, the weights that they do not have yet."""
        for inner, module in part.named_modules(prefix=path):
            for name, weight in missing(module).items():
                value = self._weights.pop(f"{plain_name(inner)}.{name}".lstrip(".")).to(device, dtype)
                setattr(module, name, nn.Parameter(value, requires_grad=weight.requires_grad))


def blank(model: nn.Module, dtype: torch.dtype) -> None:
    """Give weights of the meta device a place in memory of one number each, of their shape and not to be written to.

    Unlike on the meta device, what is built upon them, such as LoRA, gets weights of its own.
    """
    for module in model.modules():
        for name, weight in missing(module).items():
            if weight.numel() > 1:  # of a single number nothing could tell that it is missing
                empty = torch.zeros((), dtype=dtype, device="cpu").expand(weight.shape)
                setattr(module, name, nn.Parameter(empty, requires_grad=weight.requires_grad))


def missing(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own weights that have no numbers yet, by name."""
    return {name: weight for name, weight in module.named_parameters(recurse=False) if is_missing(weight)}


def is_missing(weight: Tensor) -> bool:
    """Whether a weight has no numbers yet, see `blank`."""
    return weight.is_meta or (weight.numel() > 1 and not any(weight.stride()))


def plain_name(name: str) -> str:
    """Name of a part or weight in the model without LoRA, whose layers wrap the model's own."""
    return name.replace(".base_layer", "")
