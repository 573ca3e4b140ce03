"""The adapter to take away: a PEFT folder, the encoder and head, and the configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors.torch import load_file, save_file

from netllm_pl.checkpoint import KEY, build, check_identity, identity, is_identity, load_task, trained_names
from netllm_pl.errors import UserError
from netllm_pl.paths import atomic
from netllm_pl.plain_yaml import load_yaml

if TYPE_CHECKING:
    from netllm_pl.task import NetTask

ENCODER_HEAD = "encoder_head.safetensors"
CONFIG = "config.yaml"


def export(checkpoint: Path, out: Path) -> Path:
    """Write a checkpoint as a folder: adapter/ (PEFT), encoder_head.safetensors, config.yaml.

    Args:
        checkpoint: What `fit` wrote.
        out: A folder that does not exist yet or is empty.
    """
    task = load_task(checkpoint)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    adapter = _adapter(task)
    weights = task.state_dict()
    out.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        adapter.save_pretrained(str(out / "adapter"), save_embedding_layers=False)
    rest = {name: weights[name].contiguous() for name in sorted(trained_names(task)) if not _in_adapter(name, adapter)}
    with atomic(out / ENCODER_HEAD) as partial:
        save_file(rest, partial)
    with atomic(out / CONFIG) as partial:  # last: a folder with a config is whole
        partial.write_text(yaml.safe_dump(identity(task), sort_keys=False))
    return out


def load_exported(folder: Path) -> "NetTask":
    """Load a task from the folder that `export` wrote."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from netllm_pl.task import NetTask

    config = folder / CONFIG
    if not config.is_file():
        raise UserError(f"{folder} holds no {CONFIG}; give a folder that `python -m netllm_pl export` wrote")
    stored: dict[str, Any] = _read(config, lambda file: load_yaml(file.read_text()))
    if not is_identity(stored):
        raise UserError(f"{config} is not what `export` wrote; export the checkpoint again")
    task: NetTask = build(NetTask, stored["task"], stored["init_args"], "task")
    adapter = _adapter(task)
    weights: dict[str, Any] = _read(folder / ENCODER_HEAD, load_file)
    if adapter is not None:
        file = folder / "adapter" / "adapter_model.safetensors"
        found: dict[str, Any] = _read(file, load_file)
        wanted = get_peft_model_state_dict(adapter, save_embedding_layers=False)
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
            raise UserError(f"{file} does not fit the adapter that {config} describes")
        set_peft_model_state_dict(adapter, found)
        weights |= {name: value for name, value in task.state_dict().items() if _in_adapter(name, adapter)}
    trained = trained_names(task)
    weights = {name: value for name, value in weights.items() if name in trained}
    check_identity(task, {KEY: stored, "state_dict": weights})
    task.load_state_dict(weights, strict=False)
    return task.eval()


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(file)
    except Exception as error:  # each reader has kinds of its own for missing and broken files
        raise UserError(f"{file} is missing or broken; export the checkpoint again") from error


def _adapter(task: "NetTask") -> Any:
    """Return the PEFT model inside the backbone, if it has one."""
    if task.backbone is None or task.backbone.config.lora is None:
        return None
    return task.backbone.model


def _in_adapter(name: str, adapter: Any) -> bool:
    return adapter is not None and name.startswith("backbone.model.")
