"""Frozen layers shared out over the processes of a run (FSDP2): each keeps 1/n of the weights, for models of any size.

What learns (LoRA, encoder, head) is small: each process has all of it, and gradients are averaged after the backward
pass. So optimiser, clipping, moving average and checkpoints are what they are in one process.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from netllm_pl.backbone import Backbone, backbones_of, layers_of, placed
from netllm_pl.checkpoint import trained_names
from netllm_pl.errors import UserError

NAME = "sharded"
"""What ``--trainer.strategy`` calls `Sharded`."""
BUCKET = 2**25
"""Numbers whose gradients are sent at once."""


def shard(backbone: Backbone, mesh: DeviceMesh, device: torch.device) -> None:
    """Leave a process its share of each frozen layer; layers are put together while they compute, and again backward.

    All other weights stay whole, on all processes. Weights that were put off come now, a layer at a time.

    Args:
        backbone: Not sharded yet; afterwards all processes must run it equally often.
        mesh: One-dimensional, of the processes.
        device: Of this process.

    Raises:
        UserError: The weights learn, or are quantised, or the architecture has no layers that could be told apart.
    """
    config = backbone.config
    settings = {"full": config.full, "quantize": config.quantize, "training_graph": config.training_graph}
    if wrong := [name for name, value in settings.items() if value]:
        raise UserError(f"trainer.strategy {NAME} shares out frozen weights of float types; drop backbone.{wrong[0]}")
    layers = layers_of(backbone.model)
    if not layers:
        raise UserError(f"trainer.strategy {NAME} knows no layers in backbone {config.name}; take strategy ddp")
    for layer in layers:
        backbone.place(device, layer)
        layer.to(device)
        fully_shard(layer, mesh=mesh, ignored_params={each for each in layer.parameters() if each.requires_grad})
        if config.compile:
            # Without the hooks that put a layer together, around which a compiled one would be in pieces.
            layer._compiled_call_impl = None
            layer.forward = torch.compile(layer.forward)
    backbone.place(device)
    backbone.model.to(device)
    # The layers know each other by what is around them; the next one is sent for before one computes.
    inside = {weight for layer in layers for weight in layer.parameters()}
    fully_shard(backbone.model, mesh=mesh, ignored_params=set(backbone.model.parameters()) - inside)
    for layer, following in pairwise(layers):
        assert isinstance(layer, FSDPModule) and isinstance(following, FSDPModule)
        layer.set_modules_to_forward_prefetch([following])
    backbone.sharded = True


class Sharded(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` for frozen backbones: ``--trainer.strategy sharded``.

    All processes of all nodes share out the layers. Checkpoints are those of one process, which can go on with them, as
    can any number of processes.

    Args:
        process_group_backend: Of torch.distributed; null is nccl on GPUs and gloo on CPUs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Join the other processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Begin with the same weights everywhere."""
        super().setup(trainer)
        for tensor in _whole(self._task):
            dist.broadcast(tensor, 0)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of a step."""
        if not self._task.trainer.fit_loop._should_accumulate():
            average_gradients(weight for weight in self._task.parameters() if weight.requires_grad)

    @property
    def _task(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    # Checkpoints: the parent's would put the frozen layers together ---------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights that learn are whole, and can be loaded at any time."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimiser's state is whole too."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what learns; nothing is sent."""
        names = trained_names(self._task)
        return {name: value for name, value in self._task.state_dict().items() if name in names}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimiser."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what learns."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimisers' states."""
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file, in one process."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file, in each process."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)


StrategyRegistry.register(NAME, Sharded, description="frozen layers shared out over all processes (FSDP2)")


def prepare(task: pl.LightningModule) -> None:
    """Place frozen weights that were put off, and share out frozen layers if the trainer's strategy is to do so.

    Args:
        task: In `configure_model`, or without a trainer.

    Raises:
        UserError: The strategy does not fit the task.
    """
    strategy = None if task._trainer is None else task.trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        placed(task, torch.get_default_device() if strategy is None else strategy.root_device)
        return
    if not isinstance(strategy, Sharded):
        raise UserError(f"trainer.strategy ModelParallelStrategy would save weights in pieces; set it to {NAME}")
    if not backbones_of(task):
        raise UserError(f"{type(task).__name__} has no backbone that trainer.strategy {NAME} could share out; take ddp")
    for backbone in (each for each in backbones_of(task) if not each.sharded):
        shard(backbone, strategy.device_mesh["data_parallel"], strategy.root_device)


@torch.no_grad()
def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes, many at a time; where there is none, it is 0."""
    for bucket in _buckets(weights):
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat.div_(dist.get_world_size()))
        parts = flat.split([weight.numel() for weight in bucket])
        for weight, gradient, mean in zip(bucket, gradients, parts, strict=True):
            weight.grad = gradient.copy_(mean.view_as(gradient))


def _buckets(weights: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group weights, in order, by type and up to `BUCKET` numbers."""
    bucket: list[nn.Parameter] = []
    for weight in weights:
        full = sum(each.numel() for each in bucket) + weight.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != weight.dtype):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _whole(task: nn.Module) -> Iterator[Tensor]:
    """Weights and buffers that each process has as a whole and that learn or change."""
    names = trained_names(task)
    yield from (value for name, value in task.state_dict().items() if name in names)
