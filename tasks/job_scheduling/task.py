"""Cluster job scheduling with a language model: which stage gets executors next, and how many?

Shapes: B batch, W steps, K schedulable stages, L numbers of executors of each.
"""

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from netllm_pl.acting import Objective, pick
from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.decision import DecisionTask
from netllm_pl.encoders import ScalarEncoder
from netllm_pl.errors import at_least
from netllm_pl.ragged import LENGTH
from netllm_pl.step_tokens import StepTokens, TokenSet, join_tokens
from netllm_pl.task import OptimizerConfig
from tasks.job_scheduling import model
from tasks.job_scheduling.model import CandidateHead, Scores, StateEncoder


class JobScheduling(DecisionTask):
    """Graph encoder, frozen language model with LoRA, and a head that points at stages and sizes their executors.

    The tokens of a step are the schedulable stages, in any number, and one for all that is there, which decides. One
    pass gives both parts of a decision.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
        context: Steps that a decision sees, the current one included. The state says all that matters; 1 is fastest.
        objective: Learn values of candidate decisions (``values``), or the actions of the experience (``imitation``).
        returns: Condition on the return to go.
        actions: Show earlier actions as tokens of their own.
        target_return: Return (negative job-seconds) that is asked for in use.
        return_scale: Returns are divided by it.
        both_ways: Whether the tokens of a step see each other in both directions; otherwise each sees earlier ones.
        stage_head: ``pointer`` scores the stages' own states; ``fixed``, as published, gives one score to each place
            in a list of `most_stages`, beyond which no stage can be chosen.
        most_stages: Length of that list.
        sample: Draw decisions from the softmax of the scores instead of taking the best.
        width: Size of the graph network's vectors.
        head_width: Size of the head's.
        rollout_every: Validations between two evaluations by rollout.
    """

    monitor = "val/jct_s"
    answer_columns: ClassVar[tuple[str, ...]] = ("stage", "executors")
    action_shape = (2,)

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig | None = None,
        context: int = 1,
        objective: Objective = "values",
        returns: bool = False,
        actions: bool = False,
        target_return: float = -10_000.0,
        return_scale: float = 10_000.0,
        both_ways: bool = True,
        stage_head: Literal["pointer", "fixed"] = "pointer",
        most_stages: int = 100,
        sample: bool = False,
        width: int = 64,
        head_width: int = 128,
        rollout_every: int = 1,
    ) -> None:
        super().__init__(
            backbone, optimizer, None, context, objective, returns, actions, target_return, return_scale, sample,
            head_width, rollout_every,
        )  # fmt: skip
        at_least(1, most_stages=most_stages)
        assert self.backbone is not None
        self.both_ways = both_ways
        self.encoder = StateEncoder(self.backbone.d_model, width, self.backbone.token_scale)
        self.head = CandidateHead(self.backbone.d_hidden, head_width, most_stages if stage_head == "fixed" else None)
        self.taken = ScalarEncoder(2, self.backbone.d_model, width, self.backbone.token_scale) if actions else None

    def state(self, batch: Batch) -> StepTokens:
        """A token for each schedulable stage, and one for all that is there."""
        state = self.encoder(batch)
        return join_tokens([TokenSet(state.stages, batch["stages" + LENGTH]), state.whole], self.both_ways)

    def decide(self, hidden: Tensor, batch: Batch) -> Scores:
        """Score the candidates."""
        assert self.head is not None
        scores: Scores = self.head(hidden, batch)
        return scores

    def choose(self, scores: Scores, batch: Batch, generator: np.random.Generator | None = None) -> Tensor:
        """Choose stages and executors (B, W, 2)."""
        return model.choose(scores, batch, pick(scores.grid.flatten(2), generator))

    def action_tokens(self, batch: Batch, state: StepTokens) -> Tensor:
        """The chosen stage's token, with the number of executors added; with none chosen, the first's and a mark."""
        assert self.taken is not None
        number, count = batch["action"].unbind(-1)
        index = number.clamp_min(0)[..., None, None].expand(*number.shape, 1, state.values.shape[-1])
        told = torch.stack([torch.log1p(count.float().clamp_min(0)), (number < 0).float()], dim=-1)
        tokens: Tensor = state.values.gather(2, index) + self.taken(told).values.unsqueeze(2)
        return tokens

    def loss(self, prediction: Scores, batch: Batch) -> Tensor:
        """Loss over the real steps."""
        return model.loss(prediction, batch, self.objective)

    def update_metrics(self, metrics: MetricCollection, prediction: Scores, batch: Batch) -> None:
        """Feed the real steps."""
        model.measure(metrics, prediction, batch)
