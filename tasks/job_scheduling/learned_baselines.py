"""Decima as a baseline without a language model, trained through the same command line.

Shapes: R steps of all episodes together.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from netllm_pl.data import Batch
from netllm_pl.encoders import pack_graphs, padded
from netllm_pl.errors import at_least
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ragged import LENGTH, starts_of
from netllm_pl.rollout import Policy
from netllm_pl.task import OptimizerConfig
from tasks.job_scheduling.decima import DecimaNet, DecimaPolicy, load_decima
from tasks.job_scheduling.playing import Played, Players, joined, play
from tasks.job_scheduling.ppo import PlayingScheduler


class Decima(PlayingScheduler):
    """Decima's network (Mao et al., SIGCOMM 2019), trained by playing: PPO in episodes of few jobs.

    Args:
        optimizer: AdamW's settings.
        start: Published weights to start from, an ``.npz`` file; null starts from random ones.
        size: Size of an embedding.
        width: Hidden layer of the encoder's networks.
        head_width: Hidden layers of the heads.
        sample: Play with drawn actions, as published; otherwise with the likeliest.
        jobs: Jobs of a training episode; its other rules are the data's.
        workers: Processes that play; 0 plays here, all episodes at once.
        group: Episodes with the same jobs and arrivals.
        epochs: Passes over the decisions of a step.
        minibatches: Parts of a pass.
        clip: Bound on the change of a probability, as a share.
        horizon_s: Time in which the weight of a later reward falls to 1/e.
        entropy: Weight of the policy's entropy at the start and at the end of training; it falls geometrically.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        start: str | None = None,
        size: int = 16,
        width: int = 32,
        head_width: int = 64,
        sample: bool = True,
        jobs: int = 40,
        workers: int = 0,
        group: int = 8,
        epochs: int = 3,
        minibatches: int = 30,
        clip: float = 0.2,
        horizon_s: float = 200.0,
        entropy: tuple[float, float] = (0.003, 0.0001),
    ) -> None:
        optimizer = optimizer or OptimizerConfig(lr=3e-3, weight_decay=0.0)
        super().__init__(optimizer, epochs, minibatches, clip, entropy)
        self.schedules(jobs, group, horizon_s)
        at_least(0, "Decima: ", workers=workers)
        self.net = DecimaNet(size, width, head_width)
        self.start, self.sample, self.workers = start, sample, workers
        self._players: Players | None = None

    def as_policy(self) -> Policy:
        """Draw actions, or take the likeliest."""
        return DecimaPolicy(self.net, self.sample)

    def setup(self, stage: str) -> None:
        """Read the weights to start from; those of a checkpoint come later and replace them."""
        if stage == "fit" and self.start is not None:
            self.net.load_state_dict(load_decima(Path(self.start)).state_dict())

    def teardown(self, stage: str) -> None:
        """End the processes that play."""
        if self._players is not None:
            self._players.close()
            self._players = None

    def play(self, seeds: Sequence[int]) -> Played:
        """Play here, or in other processes."""
        draws = torch.randint(2**62, (len(seeds),)).tolist()
        env = self.environment("train")
        if self.workers == 0:
            return play(self.net, env, seeds, draws)
        if self._players is None:
            self._players = Players(env, copy.deepcopy(self.net).cpu(), self.workers)
        return joined(self._players.play(self.net, seeds, draws))

    def chances(self, steps: Batch) -> tuple[Tensor, Tensor]:
        """Those of the network."""
        return chances_of(self.net, steps)


def chances_of(net: DecimaNet, steps: Batch) -> tuple[Tensor, Tensor]:
    """Logarithms of the probabilities of actions, and the policy's entropies.

    The entropy of an action is that of the stage and that of the executors for the stage that was chosen.

    Args:
        net: The network.
        steps: What was seen, as ragged columns with lengths (R,), and ``action`` (R, 2).

    Returns:
        (R,) and (R,).
    """
    graphs, counts, (k, executors) = pack_graphs(steps), steps["stages" + LENGTH], steps["action"].long().T
    embedded, stages = net.embed(graphs), graphs.numbers(steps["stages"], counts)
    scores, real = padded(net.stage_scores(graphs, embedded, stages), counts)
    assert real is not None
    job = graphs.job[stages[starts_of(counts) + k]]
    of_stages = scores.float().masked_fill(~real, IMPOSSIBLE).log_softmax(1)
    of_executors = net.executor_scores(graphs, embedded, job, steps["caps"].long()[job]).log_softmax(1)
    chance = of_stages.gather(1, k[:, None])[:, 0] + of_executors.gather(1, executors[:, None] - 1)[:, 0]
    return chance, -(of_stages.exp() * of_stages).sum(1) - (of_executors.exp() * of_executors).sum(1)
