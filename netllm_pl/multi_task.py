"""Several tasks trained in one `fit` on one language model: an experiment that takes the tasks' own configurations."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from netllm_pl.backbone import BackboneConfig
from netllm_pl.checkpoint import (
    KEY,
    AtomicCheckpointIO,
    build,
    identity,
    init_args,
    plain,
    read_checkpoint,
    trained_names,
)
from netllm_pl.data import Batch, BatchedDataset, Loader, NetDataModule
from netllm_pl.discovery import find_class
from netllm_pl.errors import UserError
from netllm_pl.plain_yaml import load_yaml
from netllm_pl.processes import averaged
from netllm_pl.shared import share
from netllm_pl.task import NetTask, OptimizerConfig

M = TypeVar("M", LightningModule, LightningDataModule)
SPLITS = {"valid": "val", "test": "test"}


class MultiTask(NetTask):
    """Trains tasks that share a frozen language model; a step takes one batch of each, and adds up their losses.

    `fit` writes a checkpoint of each task beside its own, ``<task>.ckpt``, which `evaluate`, `export` and
    `netllm_pl.shared.load_tasks` take as any other. Validation logs ``val/<task>/loss`` and the tasks' metrics;
    ``val/loss``, the mean of the losses, chooses the best checkpoint. Tasks that act play no episodes in training.

    Args:
        backbone: The language model; it takes the place of those of the tasks.
        tasks: YAML files of the tasks, as `fit` takes them; a task is called as its file. Of each the class and the
            arguments of its model are taken, and of its optimiser nothing.
        changes: Arguments of a task's model to set otherwise, by task, such as ``{viewports: {vision: null}}``.
        optimizer: AdamW's settings, of all tasks together.
        shared_adapter: One adapter for all tasks in place of one each.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        tasks: list[str],
        changes: dict[str, dict[str, Any]] | None = None,
        optimizer: OptimizerConfig | None = None,
        shared_adapter: bool = False,
    ) -> None:
        super().__init__(None, optimizer)
        built: dict[str, NetTask] = {}
        for name, (file, part) in _changed(tasks, "model", changes).items():
            settings = {**part["init_args"], "backbone": plain(backbone)}
            kind = find_class(NetTask, part["class_path"], "task")  # type: ignore[type-abstract]
            if "backbone" not in inspect.signature(kind).parameters:
                raise UserError(f"{file}: {part['class_path']} has no backbone, so there is nothing to share")
            built[name] = _made(NetTask, part["class_path"], settings, "task")
            first = next(iter(built.values()))
            if shared_adapter:
                built[name].backbone = first.backbone
            share(list(built.values()), list(built))
        self.parts = nn.ModuleDict(built)
        self.losses = nn.ModuleDict({f"{split}_{name}": MeanMetric() for split in SPLITS for name in built})

    # What a step does -------------------------------------------------------------------------------------------------

    def forward(self, batch: Any) -> dict[str, Any]:
        """Predict for a batch of each task, by name."""
        return {name: self.part(name)(own) for name, own in batch.items()}

    def loss(self, prediction: dict[str, Any], batch: Any) -> Tensor:
        """Add up the losses of the tasks."""
        return torch.stack([self.part(name).loss(own, batch[name]) for name, own in prediction.items()]).sum()

    def build_metrics(self) -> MetricCollection:
        """None of its own: each task has its metrics."""
        return MetricCollection({})

    def update_metrics(self, metrics: MetricCollection, prediction: Any, batch: Any) -> None:
        """Nothing to feed."""

    def part(self, name: str) -> NetTask:
        """Return the task of that name."""
        task = self.parts[name]
        assert isinstance(task, NetTask)
        return task

    def setup(self, stage: str) -> None:
        """Check that the data are those of the tasks."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, MultiTaskData) or list(data.parts) != list(self.parts):
            found = list(data.parts) if isinstance(data, MultiTaskData) else type(data).__name__
            raise UserError(
                f"model.tasks are {list(self.parts)}, the data are {found}; set data.tasks to the same files"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of all tasks, on a batch of each by name."""
        losses = []
        for name, own in batch.items():
            task = self.part(name)
            own = task.augment(own)
            losses.append(task.loss(task(own), own))
            self.log(f"train/{name}/loss", averaged(losses[-1].detach()))
        loss = torch.stack(losses).sum()
        self.log("train/loss", averaged(loss.detach()), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and metrics of a validation batch of one task."""
        self._take_in("valid", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and metrics of a test batch of one task."""
        self._take_in("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log what was taken in."""
        self._tell("valid")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Log what was taken in."""
        self._tell("test")
        super().on_test_epoch_end()

    def _take_in(self, split: str, batch: Batch, number: int) -> None:
        name = list(self.parts)[number]
        task = self.part(name)
        prediction = task(batch)
        self._loss_of(split, name).update(task.loss(prediction, batch), len(next(iter(batch.values()))))
        task.update_metrics(self._metrics_of(split, name), prediction, batch)

    def _tell(self, split: str) -> None:
        prefix, losses = SPLITS[split], []
        for name in self.parts:
            loss, metrics = self._loss_of(split, name), self._metrics_of(split, name)
            losses.append(loss.compute())
            found = {key.partition("/")[2]: value for key, value in metrics.compute().items()}
            self.log_dict({f"{prefix}/{name}/{key}": value for key, value in (found | {"loss": losses[-1]}).items()})
            loss.reset()
            metrics.reset()
        self.log(f"{prefix}/loss", torch.stack(losses).mean())

    def _loss_of(self, split: str, name: str) -> MeanMetric:
        metric = self.losses[f"{split}_{name}"]
        assert isinstance(metric, MeanMetric)
        return metric

    def _metrics_of(self, split: str, name: str) -> MetricCollection:
        metrics = self.part(name).split_metrics[f"{split}_metrics"]
        assert isinstance(metrics, MetricCollection)
        return metrics

    # What comes out ---------------------------------------------------------------------------------------------------

    def divide(self, checkpoint: Path, data: "MultiTaskData", folder: Path) -> dict[str, Path]:
        """Write a checkpoint of each task.

        Args:
            checkpoint: One of this model.
            data: What it was trained on, noted in each.
            folder: Where to write ``<task>.ckpt``.

        Returns:
            The files by task.
        """
        stored = read_checkpoint(checkpoint)["state_dict"]
        first, files = next(iter(self.parts)), {}
        for name in self.parts:
            task, own = self.part(name), data.parts[name]
            places = {place: f"parts.{name}.{place}" for place in trained_names(task)}
            # An adapter that all share is stored once, as the first task's.
            weights = {
                p: stored[full] if full in stored else stored[f"parts.{first}.{p}"] for p, full in places.items()
            }
            told = {"data": {"class_path": type(own).__name__, "init_args": init_args(own)}}
            files[name] = folder / f"{name}.ckpt"
            AtomicCheckpointIO().save_checkpoint({KEY: identity(task) | told, "state_dict": weights}, files[name])
        return files


class MultiTaskData(NetDataModule):
    """The data of several tasks: in training a batch of each, in validation and test one task after the other.

    An epoch ends with that of the task that has most batches; the others begin again meanwhile.

    Args:
        tasks: YAML files of the tasks, the same as those of the model; their data parts are taken.
        changes: Arguments of a task's data to set otherwise, by task, such as ``{job_scheduling: {window: 2}}``.
        batch_size: Samples of each task in a training batch; null leaves it to the tasks.
        eval_batch_size: Samples in a validation or test batch; null leaves it to the tasks.
    """

    def __init__(
        self,
        tasks: list[str],
        changes: dict[str, dict[str, Any]] | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size or 64, eval_batch_size or 256)
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        given = {name: value for name, value in sizes.items() if value is not None}
        self.parts: dict[str, NetDataModule] = {}
        for name, (_, part) in _changed(tasks, "data", changes, given).items():
            self.parts[name] = _made(NetDataModule, part["class_path"], part["init_args"], "data module")

    def setup(self, stage: str) -> None:
        """Let the tasks' data know the trainer: how many batches all processes evaluate, and who holds weights."""
        for part in self.parts.values():
            part.trainer = self.trainer

    def dataset(self, split: str) -> BatchedDataset:
        """There is no data set of all tasks."""
        raise self._apart()

    def episodes(self, policy: Any, split: str = "test") -> Any:
        """There are no episodes of all tasks."""
        raise self._apart()

    def train_dataloader(self) -> dict[str, Loader]:  # type: ignore[override]
        """Loaders of the training split; Lightning takes a batch of each."""
        return {name: part.train_dataloader() for name, part in self.parts.items()}

    def val_dataloader(self) -> list[Loader]:  # type: ignore[override]
        """Loaders of the validation split, one after the other."""
        return [part.val_dataloader() for part in self.parts.values()]

    def test_dataloader(self) -> list[Loader]:  # type: ignore[override]
        """Loaders of the test split, one after the other."""
        return [part.test_dataloader() for part in self.parts.values()]

    def predict_dataloader(self) -> Loader:
        """Predictions are those of a task."""
        raise self._apart()

    def policy(self, name: str, split: str = "test") -> Any:
        """Policies are those of a task."""
        raise self._apart()

    def _apart(self) -> UserError:
        return UserError(
            f"take a task's own config and the checkpoint that fit wrote for it: {', '.join(self.parts)}.ckpt"
        )


def _named(files: Sequence[str]) -> dict[str, str]:
    """Call tasks as their files."""
    named = {Path(file).stem: file for file in files}
    if not files or len(named) < len(files):
        raise UserError(f"tasks are {', '.join(files) or 'none'}; name at least one file, and each once")
    return named


def _part(file: str, part: str) -> dict[str, Any]:
    """Read the class and arguments of the model or of the data from a task's file."""
    try:
        tree = load_yaml(Path(file).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"tasks: {file} cannot be read ({reason}); give configs such as configs/adaptive_bitrate.yaml"
        ) from error
    own = tree.get(part) if isinstance(tree, dict) else None
    if not isinstance(own, dict) or "class_path" not in own:
        raise UserError(f"tasks: {file} has no {part}.class_path; give the YAML of a task, as `fit` takes it")
    return {"class_path": own["class_path"].rpartition(".")[2], "init_args": own.get("init_args") or {}}


def _changed(
    tasks: Sequence[str], part: str, changes: Mapping[str, Any] | None, given: Mapping[str, Any] | None = None
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Read a part of all tasks, with what is set otherwise; return files and parts by task."""
    files, changes = _named(tasks), changes or {}
    strange = changes.keys() - files.keys()
    if strange:
        raise UserError(f"{part}.changes names {min(strange)}; the tasks are {', '.join(files)}")
    found = {}
    for name, file in files.items():
        own = _part(file, part)
        settings = _merged(own["init_args"] | (given or {}), changes.get(name, {}))
        found[name] = file, {**own, "init_args": settings}
    return found


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Set entries of a nested mapping otherwise."""
    both = {
        name: _merged(tree[name], value) if isinstance(tree.get(name), dict) and isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return {**tree, **both}


def _made(base: type[M], name: str, settings: dict[str, Any], kind: str) -> Any:
    """Build a part; it notes its own arguments, where Lightning's command line has noted those of the whole."""
    part = build(base, name, settings, kind)
    part.hparams.clear()
    part.save_hyperparameters(settings, logger=False)
    return part
