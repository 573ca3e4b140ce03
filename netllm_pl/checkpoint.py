"""Checkpoints that hold only what learns, and loading a task back from one or from an exported folder."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from netllm_pl.errors import UserError
from netllm_pl.paths import atomic

if TYPE_CHECKING:
    from netllm_pl.task import NetTask

KEY = "netllm_pl"
"""Entry of a checkpoint that says which task, configuration and frozen weights it belongs to."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes elsewhere in the same folder and renames: a killed run leaves the old checkpoint whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save, then rename."""
        with atomic(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)


def plain(value: Any) -> Any:
    """Turn hyper-parameters into dicts, lists and scalars, the only things that checkpoints and YAML hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "as_dict"):  # jsonargparse's Namespace
        return plain(value.as_dict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def frozen_fingerprints(task: nn.Module) -> dict[str, str]:
    """Map module names to the fingerprints of their frozen weights."""
    found = task.named_modules(remove_duplicate=False)  # one that is used in two places stands in both
    return {name: str(m.fingerprint) for name, m in found if hasattr(m, "fingerprint")}


def trained_names(task: nn.Module) -> set[str]:
    """Names of weights and buffers that a checkpoint must hold: all but the frozen modules' own."""
    frozen = tuple(f"{name}." for name in frozen_fingerprints(task))
    trainable = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in task.named_parameters()}
    own = {name for name in task.state_dict() if name not in parameters and not name.startswith(frozen or ("\0",))}
    return trainable | own


def init_args(module: Any) -> dict[str, Any]:
    """Return the constructor's arguments of a task or data module, without those that it gave to its base class."""
    known = inspect.signature(type(module)).parameters
    return {name: value for name, value in plain(dict(module.hparams)).items() if name in known}


def identity(task: "NetTask") -> dict[str, Any]:
    """Describe a task so that `load_task` can build it again."""
    from netllm_pl import __version__

    return {
        "version": __version__,
        "task": type(task).__name__,
        "init_args": init_args(task),
        "frozen": frozen_fingerprints(task),
    }


def add_identity(task: "NetTask", checkpoint: dict[str, Any]) -> None:
    """Store the identity of a task, its data's configuration too, in a checkpoint."""
    checkpoint[KEY] = identity(task)
    data = getattr(task._trainer, "datamodule", None)
    if data is not None:
        checkpoint[KEY]["data"] = {"class_path": type(data).__name__, "init_args": init_args(data)}
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if key in checkpoint:
            checkpoint[key] = plain(dict(checkpoint[key]))


def check_identity(task: "NetTask", checkpoint: dict[str, Any]) -> None:
    """Compare a checkpoint with the task it is loaded into.

    Raises:
        UserError: if it is of another task or backbone, or weights are missing, unknown or of another shape.
    """
    stored = checkpoint.get(KEY)
    if stored is None:
        raise UserError("the checkpoint was not written by netllm_pl; give one that `fit` wrote")
    if stored["task"] != type(task).__name__:
        own = type(task).__name__
        raise UserError(f"the checkpoint is of task {stored['task']}, not {own}; change model.class_path")
    for name, fingerprint in frozen_fingerprints(task).items():
        if stored["frozen"].get(name) != fingerprint:
            key = name.rsplit(".", 1)[-1]  # image.vision comes from vision
            was = stored["init_args"].get(key)
            was = was if isinstance(was, dict) else {}
            hint = f"{was.get('name')}, layers {was.get('layers')}, pretrained {was.get('pretrained')}"
            hint += f", quantize {was['quantize']}" if was.get("quantize") else ""
            raise UserError(
                f"the checkpoint belongs to another {key} (fingerprint {stored['frozen'].get(name)}: {hint}); this one "
                f"has {fingerprint}. Set model.{key} to what it was trained with"
            )
    check_weights(task, checkpoint["state_dict"])


def check_weights(task: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless the weights are exactly those that the task learns, shape by shape."""
    trained = trained_names(task)
    own = {name: value for name, value in task.state_dict().items() if name in trained}
    if own.keys() != weights.keys():
        odd = sorted(map(str, own.keys() ^ weights.keys()))
        raise UserError(f"the checkpoint's weights do not fit: {len(odd)} missing or unknown, such as {odd[0]}")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise UserError(
                f"the checkpoint's weight {name} has shape {tuple(weights[name].shape)}, the model needs "
                f"{tuple(value.shape)}; use the model settings it was trained with"
            )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file; nothing in it is executed."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; `fit` writes best.ckpt and last.ckpt into its run folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken files
        raise UserError(f"checkpoint {path} cannot be read: it is broken or no checkpoint of netllm_pl") from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise UserError(f"{path} was not written by netllm_pl; give a checkpoint that `fit` wrote")
    weights = checkpoint.get("state_dict")
    tensors = isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values())
    if not is_identity(checkpoint[KEY]) or not tensors:
        raise UserError(f"checkpoint {path} is broken: what it says of its task and weights is not whole")
    return checkpoint


def is_identity(stored: Any) -> bool:
    """Whether something can be what `identity` tells of a task."""
    kinds = {"task": str, "init_args": dict, "frozen": dict}
    return isinstance(stored, dict) and all(isinstance(stored.get(key), kind) for key, kind in kinds.items())


def _refuse_code(settings: Mapping[str, Any], kind: Any) -> None:
    """Refuse stored settings that name a class, whose module would be imported, or a file in place of settings."""
    hints = typing.get_type_hints(kind.__init__)
    for name, value in settings.items():
        kinds = (hints.get(str(name)), *typing.get_args(hints.get(str(name))))
        config = next((each for each in kinds if dataclasses.is_dataclass(each)), None)
        if config is not None and isinstance(value, Mapping):
            _refuse_code(value, config)
        if name == "class_path" or (config is not None and not isinstance(value, Mapping | None)):
            raise UserError(f"refused: the stored setting {name} is {value!r:.80}, which is not data")


def build(base: type, name: str, init_args: dict[str, Any], kind: str) -> Any:
    """Build a class from plain arguments, checked against the types of its constructor."""
    from jsonargparse import ArgumentError, ArgumentParser

    from netllm_pl.discovery import find_class

    parser = ArgumentParser(exit_on_error=False)
    cls: type = find_class(base, name, kind)
    _refuse_code(init_args, cls)
    parser.add_class_arguments(cls, "it")
    try:
        return parser.instantiate(parser.parse_object({"it": init_args})).it
    except UserError:
        raise
    # settings of any size and kind: RuntimeError is torch's for what does not fit into memory
    except (ArgumentError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the stored settings do not fit {name} of this version: {first}") from error


def load_failure(path: Path | str) -> tuple["NetTask", Any]:
    """Load what training left behind when its loss was not finite, see `callbacks.finite`.

    Args:
        path: The checkpoint, ``nonfinite-step<N>.ckpt`` in the run's folder.

    Returns:
        The task in training mode, and the batch: ``task.training_step(batch, 0)`` gives the loss again, as torch's
        generator is set to what it was.

    Raises:
        UserError: It is no such checkpoint.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    if not {"batch", "random"} <= checkpoint.keys():
        raise UserError(f"{path} holds no batch; give the nonfinite-step<N>.ckpt that a failed `fit` wrote")
    task = load_task(path).train()
    torch.set_rng_state(checkpoint["random"])
    return task, checkpoint["batch"]


def load_task(path: Path, device: torch.device | str = "cpu") -> "NetTask":
    """Load a task from a checkpoint or from the folder that `export` wrote, ready for prediction.

    Args:
        path: The checkpoint or folder.
        device: Where it goes; frozen weights go there at once.

    Raises:
        UserError: if the path holds neither, or it belongs to frozen weights that this machine does not have.
    """
    from netllm_pl.backbone import placed
    from netllm_pl.late_weights import put_off

    with put_off():
        task = _load(path)
    placed(task, device)
    return task.to(device)


def _load(path: Path) -> "NetTask":
    from netllm_pl.task import NetTask

    if path.is_dir():
        from netllm_pl.export import load_exported

        return load_exported(path)
    checkpoint = read_checkpoint(path)
    stored = checkpoint[KEY]
    try:
        task: NetTask = build(NetTask, stored["task"], stored["init_args"], "task")
        check_identity(task, checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    task.load_state_dict(checkpoint["state_dict"], strict=False)
    return task.eval()
