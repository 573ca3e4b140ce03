"""Random weights of any size: each number is a hash of seed, name and place, so that nothing is drawn before its time.

A weight is the same on a CPU and on a GPU, whole or in shards, and whatever was drawn before it. So a model of any size
is laid out without weights, and each process draws what it keeps, where it keeps it and in its type.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from netllm_pl.late_weights import missing, plain_name

LARGE = 10**9
"""Weights of a model that is drawn like this unless it is said otherwise."""
CHUNK = 2**22
"""Numbers that are drawn at once: what this takes beside the weights are a few times 16 MB."""
BYTES = 4
SPREAD = math.sqrt(BYTES * (256**2 - 1) / 12)
"""Standard deviation of the sum of that many bytes."""


class Draw:
    """The random weights of a model.

    Matrices are nearly normal (sums of four bytes) with the standard deviation of the architecture's configuration,
    biases 0, and what norms have is what the architecture gives them.

    Args:
        model: The architecture; its weights may lie on the meta device.
        seed: Of all weights.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.seed = model, seed
        self.std = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)

    def matrix(self, name: str, weight: Tensor) -> None:
        """Draw a weight where it lies.

        Args:
            name: In the model without LoRA.
            weight: Contiguous, of any floating type.
        """
        flat, keys = weight.detach().view(-1), self._keys(name)
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            places = torch.arange(start, start + len(part), dtype=torch.int32, device=flat.device)
            part.copy_(_numbers(places, keys, self.std))

    def numbers(self, name: str, places: Tensor) -> Tensor:
        """Return the numbers (N,) float32 at places (N,) int32 of a flattened weight."""
        return _numbers(places.to(torch.int32), self._keys(name), self.std)

    def fill(self, part: nn.Module, path: str, device: torch.device, dtype: torch.dtype) -> None:
        """Draw the weights of a module, and of all in it, that it does not have yet (see `late_weights.Source`)."""
        for inner, module in part.named_modules(prefix=path):
            own = missing(module)
            for name, weight in own.items():
                place = torch.empty(weight.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(place, requires_grad=weight.requires_grad))
            self._fill(module, plain_name(inner), list(own))

    @torch.no_grad()
    def _fill(self, module: nn.Module, path: str, names: list[str]) -> None:
        if names and all(module.get_parameter(name).dim() < 2 for name in names) and not isinstance(module, nn.Linear):
            self.model._init_weights(module)  # a norm
            return
        for name in names:
            weight = module.get_parameter(name)
            if weight.dim() < 2:
                weight.zero_()
            else:
                self.matrix(f"{path}.{name}", weight)

    def _keys(self, name: str) -> tuple[int, int]:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return _signed(int.from_bytes(digest[:4], "big")), _signed(int.from_bytes(digest[4:8], "big"))


def _numbers(places: Tensor, keys: tuple[int, int], std: float) -> Tensor:
    """Hash places; a sum of integers and one product are exact alike on all devices."""
    mixed = _mix(places ^ keys[0]).add_(keys[1])
    mixed = _mix(mixed)
    total = mixed & 255
    for byte in range(1, BYTES):
        total += (mixed >> (8 * byte)) & 255
    return total.sub_(255 * BYTES // 2).float().mul_(std / SPREAD)


def _mix(values: Tensor) -> Tensor:
    """MurmurHash3's last step on (N,) int32, which is changed: a bijection in which each bit depends on all others."""
    values ^= (values >> 16) & 0xFFFF
    values *= _signed(0x85EBCA6B)
    values ^= (values >> 13) & 0x7FFFF
    values *= _signed(0xC2B2AE35)
    values ^= (values >> 16) & 0xFFFF
    return values


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
