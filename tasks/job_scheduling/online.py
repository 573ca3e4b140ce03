"""Scheduling with a language model that learns by playing, to compare with learning from experience.

Shapes: R steps; B batch, W steps, K schedulable stages, L numbers of executors of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.decision import LanguageModelPolicy
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ragged import LENGTH
from netllm_pl.rollout import reseed
from netllm_pl.task import OptimizerConfig
from tasks.job_scheduling.model import COLUMNS, Scores, candidates, taken
from tasks.job_scheduling.playing import Played, watched
from tasks.job_scheduling.ppo import PlayingScheduler
from tasks.job_scheduling.task import JobScheduling


class OnlineScheduling(PlayingScheduler, JobScheduling):
    """`JobScheduling` that learns by playing, with PPO, as `Decima` does: scores are logarithms of probabilities.

    Set ``data.experience`` to null: then ``data.batch_size`` is the number of groups in a step, and ``data.sessions``
    that of groups in an epoch. All episodes of a step are played side by side.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
        both_ways: Whether the tokens of a step see each other in both directions; otherwise each sees earlier ones.
        sample: Play with drawn decisions after training, too, as Decima does; otherwise with the likeliest.
        width: Size of the graph network's vectors.
        head_width: Size of the head's.
        rollout_every: Validations between two evaluations by rollout.
        jobs: Jobs of a training episode; its other rules are the data's.
        group: Episodes with the same jobs and arrivals.
        epochs: Passes over the decisions of a step.
        minibatches: Parts of a pass.
        clip: Bound on the change of a probability, as a share.
        horizon_s: Time in which the weight of a later reward falls to 1/e.
        entropy: Weight of the policy's entropy at the start and at the end of training; it falls geometrically.
    """

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig | None = None,
        both_ways: bool = True,
        sample: bool = True,
        width: int = 64,
        head_width: int = 128,
        rollout_every: int = 1,
        jobs: int = 12,
        group: int = 8,
        epochs: int = 3,
        minibatches: int = 20,
        clip: float = 0.2,
        horizon_s: float = 200.0,
        entropy: tuple[float, float] = (0.01, 0.0005),
    ) -> None:
        JobScheduling.__init__(
            self, backbone, optimizer, both_ways=both_ways, sample=sample, width=width, head_width=head_width,
            rollout_every=rollout_every,
        )  # fmt: skip
        self.plays(epochs, minibatches, clip, entropy)
        self.schedules(jobs, group, horizon_s)

    def decide(self, hidden: Tensor, batch: Batch) -> Scores:
        """Score each possible decision once: of candidates that come to the same number of executors, the first."""
        scores = super().decide(hidden, batch)
        counts = candidates(batch, scores.grid.shape[2])
        same = counts[..., None] == counts[..., None, :]
        return scores._replace(grid=scores.grid.masked_fill(same.tril(-1).any(-1), IMPOSSIBLE))

    def play(self, seeds: Sequence[int]) -> Played:
        """Play all episodes side by side."""
        policy = LanguageModelPolicy(self, draw=True)
        reseed(policy, self.global_step)
        return watched(policy, self.environment("train"), seeds, (*COLUMNS, "heights"))

    def chances(self, steps: Batch) -> tuple[Tensor, Tensor]:
        """Those of the softmax of the scores."""
        ragged = {name for name in steps if name + LENGTH in steps}
        batch = {name: value if name in ragged else value[:, None] for name, value in steps.items()}
        batch |= {"step": torch.zeros_like(batch["action"][..., 0], dtype=torch.long), "action": batch["action"].long()}
        scores: Scores = self(batch)
        logs = scores.grid.flatten(2)[:, 0].log_softmax(-1)
        number = taken(scores, batch)[0]
        return logs.gather(-1, number)[:, 0], -(logs.exp() * logs).sum(-1)
