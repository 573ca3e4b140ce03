"""A small decision task whose choices differ in number from step to step: an example, and what tests train on.

Shapes: N episodes side by side, K candidates of a step, B batch, W steps, R candidates of all steps together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from netllm_pl.acting import Objective, chosen_of, pick
from netllm_pl.backbone import BackboneConfig
from netllm_pl.bootstrap import Metric
from netllm_pl.data import Batch, BatchedDataset, NetDataModule
from netllm_pl.decision import DecisionTask
from netllm_pl.encoders import ScalarEncoder
from netllm_pl.experience import Windows
from netllm_pl.heads import PointerHead
from netllm_pl.ragged import LENGTH, real_of
from netllm_pl.recording import Experience, recorded
from netllm_pl.rollout import Array, Environment, Observations, Policy, rollout
from netllm_pl.step_tokens import StepTokens, TokenSet, join_tokens
from netllm_pl.task import OptimizerConfig

FEATURES = 3
TEST_EPISODES = 64


def hidden_values(features: Array) -> Array:
    """What candidates (K, 3) are worth."""
    values: Array = features[:, 0] - np.abs(features[:, 1])
    return values


@dataclass
class Candidates:
    """An environment: at each step choose one of some candidates, and the gear to take it with.

    Observations are ``features`` (N,) of (K, 3) float32, ``numbers`` (N,) of (K,) int16, ``left`` (N,) steps and
    ``reward`` (N,). An action (N, 2) is the number of a candidate and a gear, 0 or 1. The reward is what the candidate
    is worth, less what the best one is, less 0.5 for a gear other than the sign of its third feature says.

    Attributes:
        most: The most candidates of a step.
        steps: Least and most steps of an episode.
        values: Tell in ``info["values"]`` (N,) of (K,) what the candidates before each step were worth.
    """

    most: int = 7
    steps: tuple[int, int] = (4, 8)
    values: bool = False

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start one episode for each seed."""
        self.shown: list[list[Array]] = []
        for seed in seeds:
            draw = np.random.default_rng(seed)
            counts = draw.integers(1, self.most + 1, draw.integers(self.steps[0], self.steps[1] + 1))
            self.shown.append([draw.normal(size=(count, FEATURES)).astype(np.float32) for count in counts])
        self.lengths = np.array([len(episode) for episode in self.shown])
        self.now = 0
        return self._observe(np.zeros(len(seeds)))

    def step(self, actions: Array) -> tuple[Observations, Array, Array, dict[str, Array]]:
        """Take one candidate in every episode that is not over."""
        features = self._features()
        rewards = np.zeros(len(actions))
        for row in np.nonzero(self.now < self.lengths)[0]:
            values, (number, gear) = hidden_values(features[row]), actions[row]
            wrong = (features[row][number, 2] > 0) != gear
            rewards[row] = values[number] - values.max() - 0.5 * wrong
        info = {"values": _objects([hidden_values(rows) for rows in features])} if self.values else {}
        self.now += 1
        return self._observe(rewards), rewards, self.now >= self.lengths, info

    def sample(self, observations: Observations, rng: np.random.Generator) -> Array:
        """Draw actions (N, 2)."""
        counts = np.array([len(rows) for rows in observations["features"]])
        return np.stack([rng.integers(counts), rng.integers(2, size=len(counts))], axis=1)

    def _features(self) -> list[Array]:
        return [episode[min(self.now, len(episode) - 1)] for episode in self.shown]

    def _observe(self, rewards: Array) -> Observations:
        features = self._features()
        return {
            "features": _objects(features),
            "numbers": _objects([np.arange(len(rows), dtype=np.int16) for rows in features]),
            "left": np.maximum(self.lengths - self.now, 0),
            "reward": rewards,
        }


class BestCandidate:
    """Takes the best candidate in the right gear."""

    def reset(self, n: int) -> None:
        """Begin n episodes."""

    def act(self, observations: Observations) -> Array:
        """Return actions (N, 2)."""
        best = [(k := int(hidden_values(rows).argmax()), rows[k, 2] > 0) for rows in observations["features"]]
        return np.array(best, np.int64)


class CandidateData(NetDataModule):
    """Episodes of `Candidates`.

    Args:
        experience: What to record.
        window: Steps of a window of experience.
        batch_size: Windows in a training batch.
        seed: Seed of the training order.
    """

    baselines: ClassVar[dict[str, Callable[[], Any]]] = {"best": BestCandidate}
    metrics = (Metric("reward", "reward", better="max"),)

    def __init__(
        self,
        experience: Experience = Experience(policies="best", episodes=200, explore=0.2, values="true"),  # noqa: B008
        window: int = 4,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed=seed)
        self.experience, self.window = experience, window

    def simulator(self, split: str, mode: str = "fixed") -> Candidates:
        """Return the environment."""
        return Candidates()

    def label(self, env: Environment, values: str) -> Environment:
        """Add what the candidates are worth."""
        return Candidates(values=True)

    def dataset(self, split: str) -> BatchedDataset:
        """Return windows of recorded episodes."""
        return Windows(recorded(self, self.experience, split, "candidates"), self.window)

    def episodes(self, policy: Any, split: str = "test") -> pd.DataFrame:
        """Play; a row has the mean reward of a step."""
        acting: Policy = policy.as_policy() if hasattr(policy, "as_policy") else policy
        seeds = 2**40 + np.arange(TEST_EPISODES)
        played = rollout(self.simulator(split), acting, seeds.tolist())
        mean = played.returns / played.alive.sum(0)
        return pd.DataFrame({"episode": seeds, "cluster": np.arange(TEST_EPISODES), "reward": mean})


class CandidateScores(NamedTuple):
    """Scores of the parts of a decision.

    Attributes:
        candidates: (B, W, K), impossible behind the last one.
        gears: (B, W, K, 2), for each candidate that may be chosen.
    """

    candidates: Tensor
    gears: Tensor


class CandidateTask(DecisionTask):
    """Points at a candidate, and says for each one the gear to take it with.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
        context: Steps that a decision sees.
        objective: Learn values or imitate.
        returns: Condition on the return to go.
        actions: Show earlier actions.
        sample: Draw actions.
        both_ways: Whether candidates see each other in both directions.
    """

    action_shape = (2,)
    monitor = "val/reward"
    answer_columns = ("candidate", "gear")
    monitor_mode = "max"

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: OptimizerConfig | None = None,
        context: int = 1,
        objective: Objective = "values",
        returns: bool = False,
        actions: bool = False,
        sample: bool = False,
        both_ways: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, None, context, objective, returns, actions, sample=sample)
        assert self.backbone is not None
        self.both_ways = both_ways
        sizes: dict[str, Any] = {"d_model": self.backbone.d_model, "width": 32, "scale": self.backbone.token_scale}
        self.candidate, self.query = ScalarEncoder(FEATURES, **sizes), ScalarEncoder(1, **sizes)
        self.pointer = PointerHead(self.backbone.d_hidden, 32)
        self.gear = nn.Linear(self.backbone.d_hidden, 2)
        self.taken = nn.Embedding(2, self.backbone.d_model) if actions else None

    def state(self, batch: Batch) -> StepTokens:
        """A token for each candidate, at one place, and one that decides."""
        rows = self.candidate(batch["features"].unsqueeze(0)).values[0]
        query = self.query(batch["left"].float().unsqueeze(-1) / 8).values.unsqueeze(2)
        return join_tokens([TokenSet(rows, batch["features" + LENGTH]), query], self.both_ways)

    def decide(self, hidden: Tensor, batch: Batch) -> CandidateScores:
        """Score the candidates by their own states."""
        candidates, query = hidden[:, :, :-1], hidden[:, :, -1:]
        real = real_of(batch["features" + LENGTH], candidates.shape[2])
        scores = self.pointer(query.flatten(0, 1), candidates.flatten(0, 1), real.flatten(0, 1))
        return CandidateScores(scores.squeeze(1).unflatten(0, hidden.shape[:2]), self.gear(candidates))

    def choose(self, scores: CandidateScores, batch: Batch, generator: np.random.Generator | None = None) -> Tensor:
        """Choose a candidate, then its gear: (B, W, 2)."""
        chosen = pick(scores.candidates, generator)
        return torch.stack([chosen, pick(chosen_of(scores.gears, chosen), generator)], dim=-1)

    def action_tokens(self, batch: Batch, state: StepTokens) -> Tensor:
        """The candidate's token, and its gear added."""
        assert self.taken is not None
        number, gear = batch["action"].long().unbind(-1)
        token: Tensor = chosen_of(state.values, number) + self.taken(gear)
        return token.unsqueeze(2)

    def loss(self, prediction: CandidateScores, batch: Batch) -> Tensor:
        """Loss of the candidates' scores, and of the gear of the one that was taken."""
        number, gear = batch["action"].unbind(-1)
        real, taken = batch["mask"], chosen_of(prediction.gears, number)
        candidates = super().loss(prediction.candidates, batch | {"action": number})
        return candidates + F.cross_entropy(taken[real], gear[real])

    def update_metrics(self, metrics: MetricCollection, prediction: CandidateScores, batch: Batch) -> None:
        """Feed the candidates' scores."""
        super().update_metrics(metrics, prediction.candidates, batch | {"action": batch["action"][..., 0]})


def _objects(arrays: Sequence[Array]) -> npt.NDArray[np.object_]:
    out = np.empty(len(arrays), object)
    out[:] = arrays
    return out
