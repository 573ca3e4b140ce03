"""Several processes of one run: how many there are, and means over what all of them have."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    """Return how many processes train or evaluate together: 1 before the process group is there."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


def mean(values: Tensor, real: Tensor | None = None) -> Tensor:
    """Average values for a loss, so that a step of several processes is that of one with all their samples.

    Gradients are averaged over processes, each as much as the others, whatever it has: of 3 windows with 20 real steps
    and 5 of another process a step must not count more where there are fewer. So in a step of training the sum is
    divided by the number of values of all processes, per process; their mean then is the mean of all values.

    Args:
        values: Any shape; there may be none.
        real: Of the same shape, which of them count; null takes all. Picking them out would make a GPU and the program
            wait for each other in every step.

    Returns:
        (); the mean of this process's values outside training, 0 if there are none.
    """
    if real is not None:
        values, count = torch.where(real, values, 0), real.sum().float()
    else:
        count = torch.full((), float(values.numel()), device=values.device)
    if world() == 1 or not torch.is_grad_enabled():
        return values.mean() if real is None and values.numel() else values.sum() / count.clamp_min(1.0)
    dist.all_reduce(count)
    return values.sum() * (world() / count.clamp_min(1.0))


def averaged(value: Tensor) -> Tensor:
    """Return the mean of a number () over processes, all of which must come here."""
    if world() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world()


def gathered(value: T) -> list[T]:
    """Return what each process has, in their order; all of them must come here."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def first_only(make: Callable[[], T]) -> T:
    """Let the first process make something for all of them; all of them must come here."""
    if world() == 1:
        return make()
    held: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(held)
    made: T = held[0]
    return made
