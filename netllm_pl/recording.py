"""Experience that is recorded when it is first needed and kept in the cache: no pool has to be collected by hand."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from netllm_pl import __version__
from netllm_pl.collect import collect, parse_mixture
from netllm_pl.errors import UserError, at_least
from netllm_pl.experience import Pool, read_pool
from netllm_pl.paths import cache_dir
from netllm_pl.pool_format import VERSION

if TYPE_CHECKING:
    from netllm_pl.data import NetDataModule


@dataclass(frozen=True)
class Experience:
    """How experience is recorded, as by `collect`.

    Attributes:
        policies: Who acts: NAME[:SHARE],... of baselines and checkpoints.
        episodes: Training episodes.
        eval_episodes: Episodes of validation, and of test; only losses are measured on them.
        explore: Probability of a random action in place of the policy's.
        values: Kind of action values to add to each step, such as hindsight; null adds none.
        seed: Seed of the episodes.
        best_of: Play each training episode so many times, and keep the best.
    """

    policies: str = "bba,robust_mpc"
    episodes: int = 400
    eval_episodes: int = 40
    explore: float = 0.15
    values: str | None = None
    seed: int = 0
    best_of: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that record nothing.

        Raises:
            UserError: A value is out of its range.
        """
        counts = {"episodes": self.episodes, "eval_episodes": self.eval_episodes, "best_of": self.best_of}
        at_least(1, "experience.", **counts)
        if not 0 <= self.explore <= 1:
            raise UserError(f"experience.explore is {self.explore}; it must lie between 0 and 1")


def recorded(data: "NetDataModule", experience: Experience, split: str, content: str) -> Pool:
    """Return a pool of a split, recorded now unless the cache holds it.

    Args:
        data: Data module of a decision task.
        experience: What to record.
        split: Which traces the episodes are drawn from.
        content: What the episodes depend on beside the policies, such as a hash of the traces.
    """
    shares = parse_mixture(experience.policies)
    told = [type(data).__name__, split, content, asdict(experience), data.made_of(shares), VERSION, __version__]
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_dir() / "experience" / key
    if not folder.is_dir():
        collect(
            data,
            shares,
            experience.episodes if split == "train" else experience.eval_episodes,
            folder,
            explore=experience.explore,
            split=split,
            values=experience.values,
            seed=experience.seed,
            best_of=experience.best_of if split == "train" else 1,
            keep_existing=True,
        )
    return read_pool(folder, type(data).__name__)
