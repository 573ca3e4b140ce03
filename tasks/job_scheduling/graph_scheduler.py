"""The same encoder and head without a language model: what equal experience gives a small model."""

import numpy as np
from torch import Tensor
from torchmetrics import MetricCollection

from netllm_pl.acting import Greedy, Objective, OfflineTask, pick
from netllm_pl.data import Batch
from netllm_pl.ragged import LENGTH
from netllm_pl.step_tokens import TokenSet, join_tokens
from netllm_pl.task import OptimizerConfig
from tasks.job_scheduling import model
from tasks.job_scheduling.model import CandidateHead, Scores, StateEncoder


class GraphScheduler(OfflineTask):
    """Graph encoder and head of `JobScheduling`, with nothing between them.

    Args:
        optimizer: AdamW's settings.
        objective: Learn values of candidate decisions, or the actions of the experience.
        d_model: Size of a token.
        width: Size of the graph network's vectors.
        head_width: Size of the head's.
        rollout_every: Validations between two evaluations by rollout.
    """

    monitor = "val/jct_s"
    answer_columns = ("stage", "executors")

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        objective: Objective = "values",
        d_model: int = 128,
        width: int = 64,
        head_width: int = 128,
        rollout_every: int = 1,
    ) -> None:
        super().__init__(None, optimizer)
        self.objective, self.rollout_every = objective, rollout_every
        self.encoder, self.head = StateEncoder(d_model, width), CandidateHead(d_model, head_width)

    def forward(self, batch: Batch) -> Scores:
        """Score the candidates."""
        state = self.encoder(batch)
        tokens = join_tokens([TokenSet(state.stages, batch["stages" + LENGTH]), state.whole])
        scores: Scores = self.head(tokens.values, batch)
        return scores

    def as_policy(self) -> Greedy:
        """Act in an environment."""
        return Greedy(self)

    def choose(self, scores: Scores, batch: Batch, generator: np.random.Generator | None = None) -> Tensor:
        """Choose stages and executors (B, W, 2)."""
        return model.choose(scores, batch, pick(scores.grid.flatten(2), generator))

    def loss(self, prediction: Scores, batch: Batch) -> Tensor:
        """Loss over the real steps."""
        return model.loss(prediction, batch, self.objective)

    def update_metrics(self, metrics: MetricCollection, prediction: Scores, batch: Batch) -> None:
        """Feed the real steps."""
        model.measure(metrics, prediction, batch)
