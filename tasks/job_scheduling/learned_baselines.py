"""Learned baselines without a language model, trained through the same command line.

Shapes: N episodes side by side, T steps of an episode, R steps of all of them.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from netllm_pl.data import Batch, NetDataModule
from netllm_pl.encoders import pack_graphs, padded
from netllm_pl.errors import UserError, at_least
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ppo import PlayingTask, advantages, clipped, standardized
from netllm_pl.ragged import LENGTH, starts_of, take
from netllm_pl.rollout import Policy
from netllm_pl.task import OptimizerConfig
from tasks.job_scheduling.decima import DecimaNet, DecimaPolicy, load_decima
from tasks.job_scheduling.playing import Played, Players, centred, joined, play
from tasks.job_scheduling.simulator import Simulator


class Decima(PlayingTask):
    """Decima's network (Mao et al., SIGCOMM 2019), trained by playing: PPO in episodes of few jobs.

    A training step plays groups of episodes with equal jobs and arrivals, and learns from them for some epochs. Only
    how an episode does against its group at the same time counts: arrivals are most of what returns differ by (Mao et
    al., ICLR 2019, arXiv:1807.02264). Time is continuous: steps are discounted by the seconds between them. Set
    ``data.experience`` to null: then ``data.batch_size`` is the number of groups in a step, and ``data.sessions`` that
    of groups in an epoch.

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

    monitor = "val/jct_s"

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
        at_least(0, "Decima: ", workers=workers)
        at_least(1, "Decima: ", jobs=jobs)
        at_least(2, "Decima: ", group=group)
        if horizon_s <= 0:
            raise UserError(f"Decima: horizon_s is {horizon_s}; it must be above 0")
        self.net = DecimaNet(size, width, head_width)
        self.start, self.sample, self.jobs, self.workers = start, sample, jobs, workers
        self.group, self.horizon_s = group, horizon_s
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

    def environment(self, split: str) -> Simulator:
        """Return a split's simulator, with short episodes."""
        data = getattr(self.trainer, "datamodule", None)
        env = data.simulator(split) if isinstance(data, NetDataModule) else None
        if not isinstance(env, Simulator):
            raise UserError("Decima learns by playing; give it JobSchedulingData")
        stream = "counted" if env.rules.stream == "published" else env.rules.stream
        rules = replace(env.rules, jobs=min(self.jobs, env.rules.jobs), stream=stream)
        return Simulator(env.workload, rules, env.first_seed)

    # Training ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Play, then improve the policy; one step of the trainer."""
        played = self._play(np.repeat(self.sessions(batch), self.group).tolist())
        columns = {name: torch.from_numpy(value).to(self.device) for name, value in played.columns.items()}
        columns |= self._before(columns, played)
        told: list[Tensor] = []
        loss = self.improve(
            len(columns["action"]), lambda part, weight: self._surrogate(take(columns, part), weight, told)
        )
        jct = -played.rewards.sum() / (played.rewards.shape[1] * self.environment("train").rules.jobs)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/jct_s", jct, prog_bar=True)
        means = torch.stack(told).mean(0).tolist()
        self.log_dict(dict(zip(("train/entropy", "train/kl"), means, strict=True)))
        return loss

    def _play(self, seeds: list[int]) -> Played:
        draws = torch.randint(2**62, (len(seeds),)).tolist()
        env = self.environment("train")
        if self.workers == 0:
            return play(self.net, env, seeds, draws)
        if self._players is None:
            self._players = Players(env, copy.deepcopy(self.net).cpu(), self.workers)
        return joined(self._players.play(self.net, seeds, draws))

    @torch.no_grad()
    def _before(self, columns: Batch, played: Played) -> Batch:
        """Tell what is known of each step before the policy changes: its probability and its advantage."""
        taken = played.alive.T
        parts = torch.arange(len(columns["action"]), device=self.device).chunk(self.minibatches)
        chances = torch.cat([chances_of(self.net, take(columns, part))[0] for part in parts])
        waits, rewards = torch.from_numpy(np.diff(played.times, axis=0)), torch.from_numpy(played.rewards)
        returns = advantages(rewards, torch.zeros_like(rewards), (-waits / self.horizon_s).exp(), 1.0)
        gains = centred(returns.numpy(), played.times, played.alive, self.group).T[taken]
        return {"chance": chances, "gain": standardized(torch.from_numpy(gains).float().to(self.device))}

    def _surrogate(self, steps: Batch, weight: float, told: list[Tensor]) -> Tensor:
        """PPO's clipped objective and the entropy of some steps; tells the entropy and how far the policy has moved."""
        chances, entropies = chances_of(self.net, steps)
        entropy = entropies.mean()
        change = chances.detach() - steps["chance"]
        told.append(torch.stack([entropy.detach(), (change.exp() - 1 - change).mean()]))
        return clipped(chances, steps["chance"], steps["gain"], self.clip) - weight * entropy


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
