"""Records experience: runs a mixture of policies in the simulator of a decision task and writes a pool."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from netllm_pl import __version__
from netllm_pl.errors import UserError
from netllm_pl.parts import Parts, Shard
from netllm_pl.pool_format import MANIFEST, PoolWriter, refuse_existing
from netllm_pl.pool_join import join_pools
from netllm_pl.progress import progress, say, status
from netllm_pl.rollout import Array, Environment, Observations, Policy, acting, reseed, rollout

if TYPE_CHECKING:
    from netllm_pl.data import NetDataModule

Sample = Callable[[Observations, np.random.Generator], Array]

POOL = "pool"
"""Folder of the pool that holds the rounds of a section."""


class Explore:
    """Acts like another policy, but at random with some probability.

    Args:
        policy: Who acts otherwise.
        probability: How often an action is random.
        sample: Draws an action (N,) for every episode from those that are possible.
        seed: Seed of the draws.
    """

    def __init__(self, policy: Policy, probability: float, sample: Sample, seed: int | Sequence[int] = 0) -> None:
        self.policy, self.probability, self.sample = policy, probability, sample
        self.sequential: bool = getattr(policy, "sequential", False)
        self.seed = [seed] if isinstance(seed, int) else list(seed)
        self._random = np.random.default_rng(self.seed)

    def reseed(self, number: int) -> None:
        """Draw what belongs to one of many batches of episodes."""
        self._random = np.random.default_rng([*self.seed, number])
        reseed(self.policy, number)

    def watch(self, env: Environment) -> None:
        """Pass on the simulator to a policy that looks into it."""
        if hasattr(self.policy, "watch"):
            self.policy.watch(env)

    def reset(self, n: int) -> None:
        """Begin n episodes."""
        self.policy.reset(n)

    def act(self, observations: Observations) -> Array:
        """Return the policy's actions (N,), some of them replaced."""
        chosen = np.asarray(self.policy.act(observations))
        drawn = np.asarray(self.sample(observations, self._random))
        replaced = self._random.random(len(chosen)) < self.probability
        return np.where(replaced.reshape(-1, *[1] * (chosen.ndim - 1)), drawn, chosen)

    def finish(self, observations: Observations) -> None:
        """Pass on the last observation."""
        if hasattr(self.policy, "finish"):
            self.policy.finish(observations)


def parse_mixture(text: str) -> dict[str, float]:
    """Read ``NAME[:SHARE],...`` into shares that sum to one; a share that is left out is 1.

    A checkpoint's path is a name too: only a number behind the last colon is a share.
    """
    shares: dict[str, float] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        name, _, share = part.rpartition(":")
        try:
            weight = float(share) if name else 1.0
        except ValueError:
            name, weight = part, 1.0
        name = name or part
        if name in shares or not 0 < weight < float("inf"):
            raise UserError(f"policy '{part}': name each once, with a share above 0, such as bba:1,robust_mpc:3")
        shares[name] = weight
    if not shares:
        raise UserError(f"policy is '{text}'; name at least one, such as bba:1,robust_mpc:3")
    return {name: weight / sum(shares.values()) for name, weight in shares.items()}


def collect(
    data: "NetDataModule",
    shares: Mapping[str, float],
    episodes: int,
    out: Path,
    *,
    explore: float = 0.0,
    split: str = "train",
    values: str | None = None,
    seed: int = 0,
    parallel: int = 64,
    best_of: int = 1,
    keep_existing: bool = False,
    shard: Shard | None = None,
    merge: bool = False,
) -> None:
    """Run a mixture of policies in random episodes of a split and write what happened as an experience pool.

    Episode number i is drawn from ``seed * 2**32 + i``. Policies take turns so that any run of episodes holds their
    shares; within a round of ``parallel`` episodes those of one policy are neighbours. What is drawn in a round does
    not depend on earlier rounds: the same call goes on behind those that an interrupted one has left in ``OUT.parts``.

    Args:
        data: Data module of a decision task.
        shares: Policies, as `NetDataModule.policy` knows them, and their shares, which sum to one.
        episodes: How many episodes.
        out: Folder of the pool; it must not exist.
        explore: Probability of a random action in place of the policy's.
        split: Which traces the episodes are drawn from.
        values: Kind of action values to add to each step, as `NetDataModule.label` knows them.
        seed: Seed of episodes and exploration.
        parallel: Episodes side by side.
        best_of: Play each episode so many times, and keep the time with the highest return. Exploration, and what a
            policy draws by itself, is what differs between them.
        keep_existing: Whether a pool that another process has written there meanwhile is kept without an error.
        shard: Play only this share of the rounds, and leave them in ``OUT.parts`` for a call that merges them.
        merge: Play nothing, and write the pool of what other calls have left.

    Raises:
        UserError: An argument is wrong, the task is no decision task, or parts to be merged are missing.
    """
    for name, number, low, high in (
        ("episodes", episodes, 1, 2**31), ("parallel", parallel, 1, 2**20), ("explore", explore, 0, 1),
        ("best_of", best_of, 1, 2**20),
        ("seed", seed, 0, 2**31 - 1),
    ):  # fmt: skip
        if not low <= number <= high:
            raise UserError(f"{name} is {number}; it must lie between {low} and {high}")
    made_by = {
        "data": {"class_path": type(data).__name__, "init_args": dict(data.hparams)}, "shares": dict(shares),
        "explore": explore, "split": split, "values": values, "seed": seed, "parallel": parallel,
        "best_of": best_of,
    }  # fmt: skip
    size = max(1, parallel // best_of)
    rounds = range(-(-episodes // size))
    if shard is not None and shard.count > len(rounds):
        raise UserError(
            f"shard is {shard.number}/{shard.count}, but {episodes} episodes are {len(rounds)} round(s) of {size}; take"
            " fewer shards, or a smaller --parallel for all of them"
        )
    env = data.simulator(split, "random")
    policies = {name: acting(data.policy(name, split)) for name in shares}
    sequential = [name for name, policy in policies.items() if getattr(policy, "sequential", False)]
    if shard is not None and sequential:
        raise UserError(f"policy '{sequential[0]}' plays one episode after the other; leave it, or --shard, out")
    if explore:
        if not hasattr(env, "sample"):
            raise UserError(f"{type(env).__name__} cannot draw random actions: it has no sample(); leave explore at 0")
        for number, name in enumerate(policies):
            policies[name] = Explore(policies[name], explore, env.sample, (seed, number))
    if values is not None:
        env = data.label(env, values)
    depends = {**made_by, "episodes": episodes, "content": data.fingerprint(split)}
    depends |= {"weights": data.made_of(shares), "version": __version__}
    cure = "play them with --shard i/n, or all that is left by the same command without --merge"
    parts = Parts(out.with_name(f"{out.name}.parts"), depends, "collection", cure)
    if not parts.complete(len(rounds)):  # else the pool was written, and the call ended before it cleared away
        refuse_existing(out, keep_existing)
    turns = _turns(list(shares.values()), episodes)

    def play(number: int, writer: PoolWriter) -> None:
        start = number * size
        turn = turns[start : start + size]
        for place, name in enumerate(shares):
            seeds = seed * 2**32 + start + np.nonzero(turn == place)[0]
            if seeds.size:
                reseed(policies[name], number)
                played = rollout(env, policies[name], seeds.repeat(best_of).tolist(), True, advance)
                writer.add(played.best(best_of) if best_of > 1 else played, name, seeds)

    with parts.claimed(shared=shard is not None, wait=keep_existing):
        if out.exists():
            parts.forget()
            return
        if sequential and parts.missing(rounds) != [rounds]:
            parts.forget()  # they cannot be gone on from in the middle
        gaps = [] if merge else parts.missing(rounds if shard is None else shard.of(len(rounds)))
        left = sum(min(size, episodes - number * size) for gap in gaps for number in gap)
        if gaps and left < episodes and shard is None:
            say(f"going on: {episodes - left} of {episodes} episodes are in {parts.folder}")
        began = monotonic()
        with progress("episodes played", left * best_of) as advance:
            for gap in gaps:
                start = gap.start
                while start < gap.stop:
                    with parts.section(start) as section:
                        with PoolWriter(section.folder / POOL, type(data).__name__, made_by) as writer:
                            while section.stop < gap.stop and not (section.due and section.stop > start):
                                play(section.stop, writer)
                                section.stop += 1
                        start = section.stop
        if shard is not None:
            took = f"{monotonic() - began:.2f} s of playing"
            print(f"wrote shard {shard.number} of {shard.count} in {parts.folder} ({took})")
        else:
            pools = [folder / POOL for folder in parts.whole(len(rounds))]
            join_pools(pools, out, type(data).__name__, made_by, keep_existing)
            parts.forget()


def convert(data: "NetDataModule", file: Path, out: Path, policy: str = "published") -> None:
    """Write a published pool of a task as one of ours.

    Args:
        data: Data module of the task; its `convert` reads the file.
        file: The published pool.
        out: Folder of the pool; it must not exist.
        policy: Who acted in it, if you know.
    """
    with PoolWriter(out, type(data).__name__, {"converted_from": file.name}) as writer, status(f"reading {file}"):
        for episodes in data.convert(file):
            writer.add(episodes, policy)


def summary(folder: Path) -> str:
    """Say in words what a pool holds and where it lies."""
    manifest = json.loads((folder / MANIFEST).read_text())
    lines = [
        f"{name}: {about['episodes']} episodes, {about['steps']} steps, return {about['return']['mean']:.3f}"
        f" ({about['return']['min']:.3f} to {about['return']['max']:.3f})"
        for name, about in manifest["policies"].items()
    ]
    return "\n".join([*lines, f"wrote {manifest['episodes']} episodes, {manifest['steps']} steps in {folder}"])


def _turns(shares: list[float], episodes: int) -> Array:
    """Number of the policy of each episode: always the one furthest behind its share."""
    taken = np.zeros(len(shares))
    turns = np.empty(episodes, np.int64)
    for episode in range(episodes):
        turns[episode] = np.argmax(np.asarray(shares) * (episode + 1) - taken)
        taken[turns[episode]] += 1
    return turns
