"""Linear layers that read the same input, multiplied at once: a decision reads its weights in fewer, larger pieces.

Shapes: n inputs, m outputs of all layers of a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers with one input, in Llama and all that follow it."""


class Joined(nn.Module):
    """The product of an input with the weights of all layers of a group, until each layer has taken its part.

    Args:
        weight: (m, n) of all layers, one below the other.
        bias: (m) or None.
        sizes: Outputs of each layer, m in all.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.sizes = list(sizes)
        self.source: Tensor | None = None
        self.parts: dict[int, Tensor] = {}

    def take(self, part: int, values: Tensor) -> Tensor:
        """Return one layer's outputs; those of the others are kept for as long as they read the same tensor."""
        if self.source is not values or part not in self.parts:
            outputs = nn.functional.linear(values, self.weight, self.bias)
            self.source, self.parts = values, dict(enumerate(outputs.split(self.sizes, -1)))
        taken = self.parts.pop(part)
        if not self.parts:
            self.source = None
        return taken


class Part(nn.Module):
    """Stands for one linear layer of a group.

    Args:
        joined: The group.
        index: Which one of its layers.
    """

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined, self.index = joined, index

    def forward(self, values: Tensor) -> Tensor:
        """Apply the layer (..., n)."""
        return self.joined.take(self.index, values)


def join_in_place(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors one behind the other in memory if they are not; return all of them as one that shares it.

    Args:
        tensors: Of one type, equal but for their first axis. They stay the same objects of the same values.
    """
    first, total = tensors[0], sum(len(tensor) for tensor in tensors)
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    starts = [tensor.data_ptr() for tensor in tensors[1:]]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if len(storages) > 1 or starts != ends[:-1] or not all(tensor.is_contiguous() for tensor in tensors):
        whole = torch.cat([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = part
    return first.detach().as_strided((total, *first.shape[1:]), first.stride())
