"""Learned baselines without a language model, trained through the same command line.

Shapes: N episodes side by side, T steps of an episode, R steps of all of them, J jobs, K schedulable stages.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from netllm_pl.data import Batch, NetDataModule
from netllm_pl.encoders import pack_graphs, padded
from netllm_pl.encoders.graph import sum_by
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ppo import PlayingTask, advantages, clipped, standardized
from netllm_pl.ragged import LENGTH, group_of, starts_of, take
from netllm_pl.rollout import Policy
from netllm_pl.task import OptimizerConfig
from tasks.job_scheduling.decima import DecimaNet, DecimaPolicy, load_decima
from tasks.job_scheduling.playing import Played, Players, centred, joined, play
from tasks.job_scheduling.simulator import JOB_FEATURES, Simulator


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
        smoothing_s: Time in which the generalised advantage estimate goes over from rewards to what the critic expects;
            null takes rewards alone, without a critic.
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
        jobs: int = 60,
        workers: int = 0,
        group: int = 8,
        epochs: int = 3,
        minibatches: int = 10,
        clip: float = 0.2,
        horizon_s: float = 200.0,
        smoothing_s: float | None = None,
        entropy: tuple[float, float] = (0.04, 0.001),
    ) -> None:
        optimizer = optimizer or OptimizerConfig(lr=1e-3, weight_decay=0.0)
        super().__init__(optimizer, epochs, minibatches, clip, entropy)
        for name, value, least in (("jobs", jobs, 1), ("workers", workers, 0), ("group", group, 2)):
            if value < least:
                raise UserError(f"Decima: {name} is {value}; it must be at least {least}")
        if horizon_s <= 0 or (smoothing_s is not None and smoothing_s <= 0):
            raise UserError(f"Decima: horizon_s is {horizon_s}, smoothing_s {smoothing_s}; they must be above 0")
        self.net = DecimaNet(size, width, head_width)
        self.critic = None if smoothing_s is None else Critic()
        self.start, self.sample, self.jobs, self.workers = start, sample, jobs, workers
        self.group, self.horizon_s, self.smoothing_s = group, horizon_s, smoothing_s
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
        self.log_dict(dict(zip(("train/entropy", "train/kl", "train/critic"), means, strict=True)))
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
        """Tell what is known of each step before the policy changes: probability, advantage, target of the critic."""
        taken = played.alive.T
        parts = torch.arange(len(columns["action"]), device=self.device).chunk(self.minibatches)
        seen = [take(columns, part) for part in parts]
        chances = torch.cat([chances_of(self.net, part)[0] for part in seen])
        values = np.zeros(taken.shape)
        if self.critic is not None:
            values[taken] = torch.cat([self.critic(part) for part in seen]).double().cpu().numpy()
        waits = torch.from_numpy(np.diff(played.times, axis=0))
        rewards, expected = torch.from_numpy(played.rewards / self.horizon_s), torch.from_numpy(values.T)
        smoothing = 1.0 if self.smoothing_s is None else (-waits / self.smoothing_s).exp()
        gains = advantages(rewards, expected, (-waits / self.horizon_s).exp(), smoothing).numpy()
        known = {
            "gain": centred(gains, played.times, played.alive, self.group).T[taken],
            "target": (gains.T + values)[taken],
        }
        found = {name: torch.from_numpy(value).float().to(self.device) for name, value in known.items()}
        return {"chance": chances, "target": found["target"], "gain": standardized(found["gain"])}

    def _surrogate(self, steps: Batch, weight: float, told: list[Tensor]) -> Tensor:
        """PPO's clipped objective, the entropy, and the critic's error, of some steps; tells of them, too."""
        chances, entropies = chances_of(self.net, steps)
        entropy = entropies.mean()
        loss = clipped(chances, steps["chance"], steps["gain"], self.clip) - weight * entropy
        critic = chances.new_zeros(())
        if self.critic is not None:
            critic = nn.functional.smooth_l1_loss(self.critic(steps), steps["target"])
            loss = loss + 0.5 * critic
        change = chances.detach() - steps["chance"]
        told.append(torch.stack([entropy.detach(), (change.exp() - 1 - change).mean(), critic.detach()]))
        return loss


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
    logs = [
        scores.float().masked_fill(~real, IMPOSSIBLE).log_softmax(1),
        net.executor_scores(graphs, embedded, job, steps["caps"].long()[job]).log_softmax(1),
    ]
    chance = logs[0].gather(1, k[:, None])[:, 0] + logs[1].gather(1, executors[:, None] - 1)[:, 0]
    entropy = torch.stack([-(log.exp() * log).sum(1) for log in logs]).sum(0)
    return chance, entropy


class Critic(nn.Module):
    """Expects the returns of steps, as the mean number of jobs to come, from what is known of the active jobs.

    Args:
        width: Size of the hidden layers.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.job = nn.Sequential(nn.Linear(2 * len(JOB_FEATURES), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.value = nn.Sequential(nn.Linear(width + 2, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, steps: Batch) -> Tensor:
        """Expected returns (R,); steps have the ragged column ``jobs``."""
        jobs, counts = steps["jobs"], steps["jobs" + LENGTH]
        small = jobs.clamp_min(0).log1p()
        group = group_of(counts, len(jobs))
        summed = sum_by(self.job(torch.cat([small, jobs / (jobs + 100)], dim=1)), group, len(counts)) / 10
        value: Tensor = self.value(torch.cat([summed, counts[:, None] / 10, queue(jobs[:, 4], group, counts)], dim=1))
        return value[:, 0]


def queue(work: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Log of the time that jobs would wait in all, were they run one after another, the least work first (R, 1)."""
    order = work.argsort(descending=True)
    order = order[group[order].argsort(stable=True)]
    rank = torch.arange(1, len(work) + 1, device=work.device) - starts_of(counts)[group]
    return sum_by((work[order] * rank)[:, None], group, len(counts)).log1p()
