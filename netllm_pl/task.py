"""A task: encode, one pass of the frozen language model, answer. Subclass it to add a task.

Shapes: B batch, T tokens, A answers, d_model size of a token vector, d_hidden size of a hidden state.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from netllm_pl.backbone import Backbone, BackboneConfig
from netllm_pl.checkpoint import add_identity, check_identity, trained_names
from netllm_pl.data import Batch
from netllm_pl.errors import UserError, at_least
from netllm_pl.processes import averaged


class Prompt(NamedTuple):
    """What the language model reads.

    Attributes:
        tokens: (B, T, d_model) float.
        answers: (A,) int64, the positions whose hidden states the head reads.
        mask: (B, T) bool, True at real tokens; or (B or 1, 1, T, T) bool, which tokens each one sees; None if all are
            real and each sees all earlier ones.
        positions: (B, T) int64 place of each token in its sequence; None counts from the first one.
        places: (samples, K) int64 where the K tokens of each sample lie among the B T, of which ``answers`` then are
            some; None if each sample has a row of its own.
    """

    tokens: Tensor
    answers: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decay of matrices; vectors (norms, biases) are not decayed.
        warmup: Share of all steps in which the rate rises from zero.
        schedule: What follows the warm-up.
        betas: Decay rates of AdamW's moments.
        ema: Decay of an exponential moving average of the weights, such as 0.99; validation, checkpoints and results
            are then the average's (`callbacks.MovingAverage`). Null takes the weights of the last step.
    """

    lr: float = 3e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float | None = None

    def __post_init__(self) -> None:
        at_least(0, "optimizer.", lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"optimizer.ema is {self.ema}; it must be at least 0 and below 1, such as 0.99, or null")


class NetTask(pl.LightningModule, ABC):
    """Base of every task and learned baseline: optimiser, metrics, adapter-only checkpoints.

    A task overrides `encode` and `answer` (or `forward` as a whole, as learned baselines without a backbone do),
    `loss`, `build_metrics` and `update_metrics`.

    Args:
        backbone: The language model; null for a learned baseline that has none.
        optimizer: AdamW's settings.
    """

    monitor: ClassVar[str] = "val/loss"
    """Metric that chooses the best checkpoint."""
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    answer_columns: ClassVar[tuple[str, ...]] = ("prediction",)
    """Columns of predictions.parquet: what the last axis of a prediction holds, or one name for all of it."""
    published_overlay: ClassVar[str | None] = None
    """Overlay that lays out tokens as NetLLM's published code does, where the defaults do not; `benchmark` names it."""
    fixed = False
    """Whether batches of one shape always take the same operations on the device, and wait for nothing: predictions are
    then captured in a CUDA graph. A cache of features, for one, depends on what is in a batch."""

    def __init__(self, backbone: BackboneConfig | None = None, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.strict_loading = False  # frozen weights are not in checkpoints; check_identity compares what must be
        self.optimizer_config = optimizer or OptimizerConfig()
        self.backbone = None if backbone is None else Backbone(backbone)
        splits = {"train": "train/", "valid": "val/", "test": "test/"}
        self.split_metrics = nn.ModuleDict(
            {f"{split}_metrics": self.build_metrics().clone(prefix=prefix) for split, prefix in splits.items()}
        )
        # Lightning's own mean over processes rounds the numbers of their samples.
        self.split_losses = nn.ModuleDict({f"{split}_loss": MeanMetric() for split in ("valid", "test")})

    # What a task says -------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> Prompt:
        """Turn a batch into the tokens that the language model reads."""
        raise TypeError(f"{type(self).__name__} overrides neither encode() nor forward()")

    def answer(self, hidden: Tensor, batch: Batch) -> Any:
        """Turn hidden states (B, A, d_hidden) into the prediction: a tensor, or a NamedTuple of tensors."""
        raise TypeError(f"{type(self).__name__} overrides neither answer() nor forward()")

    @abstractmethod
    def loss(self, prediction: Any, batch: Batch) -> Tensor:
        """Return the scalar training loss."""

    @abstractmethod
    def build_metrics(self) -> MetricCollection:
        """Return the metrics of one split; called once a split."""

    @abstractmethod
    def update_metrics(self, metrics: MetricCollection, prediction: Any, batch: Batch) -> None:
        """Feed a prediction to the metrics."""

    def augment(self, batch: Batch) -> Batch:
        """Vary a training batch at random; as it is by default."""
        return batch

    # What every task does ---------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Any:
        """Predict in a single pass of the language model."""
        if self.backbone is None:
            raise UserError(f"{type(self).__name__} needs a backbone; set model.backbone.name")
        prompt = self.encode(batch)
        hidden = self.backbone(prompt.tokens, prompt.mask, positions=prompt.positions)
        if prompt.places is not None:
            hidden = hidden.flatten(0, 1)[prompt.places]
        return self.answer(hidden[:, prompt.answers], batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of training."""
        batch = self.augment(batch)
        prediction = self(batch)
        loss = self.loss(prediction, batch)
        self.log("train/loss", averaged(loss.detach()), prog_bar=True)
        self._update("train", each_tensor(prediction, Tensor.detach), batch)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and metrics of a validation batch."""
        self._evaluate("valid", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and metrics of a test batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """Prediction of a batch."""
        from netllm_pl.frozen import predict

        return predict(self, batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        prediction = self(batch)
        size = next(iter(batch.values())).shape[0]
        name = {"valid": "val", "test": "test"}[split]
        mean = self.split_losses[f"{split}_loss"]
        assert isinstance(mean, MeanMetric)
        mean.update(self.loss(prediction, batch), size)
        self.log(f"{name}/loss", mean)
        self._update(split, prediction, batch)

    def _update(self, split: str, prediction: Any, batch: Batch) -> None:
        metrics = self.split_metrics[f"{split}_metrics"]
        assert isinstance(metrics, MetricCollection)
        self.update_metrics(metrics, prediction, batch)
        self.log_dict(metrics, on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        """Keep what frozen encoders computed."""
        self._flush()

    def on_validation_epoch_end(self) -> None:
        """Keep what frozen encoders computed."""
        self._flush()

    def on_test_epoch_end(self) -> None:
        """Keep what frozen encoders computed."""
        self._flush()

    def _flush(self) -> None:
        for module in self.modules():
            flush = getattr(module, "flush", None)
            if callable(flush):
                flush()

    def configure_model(self) -> None:
        """Place frozen weights that were put off, and share out frozen layers; Lightning calls it before all else."""
        from netllm_pl.sharded import prepare

        prepare(self)

    # Optimiser and checkpoints ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the trainable weights; matrices decay, vectors do not; warm-up, then cosine or constant."""
        config = self.optimizer_config
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = adamw(groups, config, fused=all(parameter.is_cuda for parameter in trainable))
        total = self.trainer.estimated_stepping_batches
        if config.schedule == "constant" or total == float("inf"):
            warmup = 0 if total == float("inf") else int(config.warmup * total)
            schedule = get_constant_schedule_with_warmup(optimizer, warmup)
        else:
            schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * total), int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, and let go of the gradients: Lightning would keep them through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Say that weights change: merged copies of them look at their versions, which fused optimisers leave alone."""
        torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])

    def configure_callbacks(self) -> list[pl.Callback]:
        """Average the weights if the optimiser's settings say so."""
        from callbacks.moving_average import MovingAverage

        ema = self.optimizer_config.ema
        return [] if ema is None else [MovingAverage(ema)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what learns, and say what it belongs to."""
        keep = trained_names(self)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        add_identity(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another task, backbone or shape."""
        check_identity(self, checkpoint)


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """Make the optimiser; fused, it takes one kernel for all of the many small weights of adapters."""
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused or None)
    # Else Lightning refuses to clip gradients in mixed precision: this would say that the optimiser unscales them.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def each_tensor(prediction: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a prediction: a tensor, or each one of a NamedTuple."""
    return change(prediction) if isinstance(prediction, Tensor) else type(prediction)(*map(change, prediction))


def check_columns(batch: Batch, names: Sequence[str]) -> None:
    """Refuse data, or experience, without the columns that a task reads."""
    missing = [name for name in names if name not in batch]
    if missing:
        raise UserError(
            f"the data, or the experience, has no column {missing[0]}, which the model reads; take those of its task, "
            f"or a checkpoint of this one. There are {', '.join(batch)}"
        )
