"""Throughput prediction with a language model. Shapes: B windows; history and future in Mbit/s."""

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MetricCollection

from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.encoders import SeriesEncoder
from netllm_pl.heads import RegressionHead
from netllm_pl.task import NetTask, OptimizerConfig, Prompt

HISTORY, HORIZON, INTERVAL_S = 8, 5, 5.0  # eight intervals of 5 s are read, five predicted


class ThroughputPrediction(NetTask):
    """The history goes through a 1-D CNN; one pass of the language model, whose last token answers the horizon.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
    """

    monitor = "val/mae_mbps"

    def __init__(self, backbone: BackboneConfig, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__(backbone, optimizer)
        assert self.backbone is not None
        self.series = SeriesEncoder(2, self.backbone.d_model, scale=self.backbone.token_scale)
        self.head = RegressionHead(self.backbone.d_hidden, HORIZON)

    def encode(self, batch: Batch) -> Prompt:
        """Lay out one token an interval, which tells the shape of the history and its height; the last one answers."""
        history = batch["history"]
        shape = history / history.mean(1, keepdim=True).clamp_min(0.01) - 1
        values = torch.stack([shape, (history + 0.01).log()], dim=-1)
        return Prompt(self.series(values).values, torch.tensor([HISTORY - 1]))

    def answer(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Turn the hidden state (B, 1, d_hidden) into throughput (B, HORIZON): the last value and a change."""
        history = batch["history"]
        mbps: Tensor = history[:, -1:] + history.mean(1, keepdim=True) * self.head(hidden)[:, 0]
        return mbps if self.training else mbps.clamp_min(0)  # below 0 the loss must still have a gradient

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Mean absolute error."""
        return nn.functional.l1_loss(prediction, batch["future"])

    def build_metrics(self) -> MetricCollection:
        """Mean absolute error."""
        return MetricCollection({"mae_mbps": MeanAbsoluteError()})

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Batch) -> None:
        """Add a batch."""
        metrics.update(prediction, batch["future"])
