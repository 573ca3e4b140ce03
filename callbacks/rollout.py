"""Evaluation in the loop: plays whole episodes with the task's own policy at the end of validation and of test."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from netllm_pl.backbone import is_sharded
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError, at_least
from netllm_pl.evaluate import joined
from netllm_pl.parts import Shard
from netllm_pl.processes import gathered, rank, world
from netllm_pl.rollout import Array, Observations, Policy
from netllm_pl.timing import now


class RolloutEvaluation(Callback):
    """Logs what the policy under training is worth: ``val/<metric>`` and ``test/<metric>`` of the data's metrics.

    The policy is the task's ``as_policy()``, which decides greedily; the episodes are those of the validation (or test)
    split, the same ones each time. In training the first validation plays, so that there is a best checkpoint from
    then on, and every n-th after it; whoever monitors the values sees the last ones at a validation between two. A
    sanity check plays nothing. Several processes share out the episodes, and all of them know the results; where each
    has a part of the weights (`netllm_pl.sharded`), all play all episodes.

    Args:
        every_n: Play at every n-th validation.

    Attributes:
        keep: Whether to keep what the data's `watch` tells of the validation episodes, for figures.
        kept: What was kept of the last validation; None if it played nothing, or nothing was to be kept.
        decision_ms: Milliseconds of a decision in the last episodes that were played: the policy's time over the
            decisions of all episodes side by side. `benchmark` measures how long a single one takes.
    """

    def __init__(self, every_n: int = 1) -> None:
        at_least(1, "RolloutEvaluation: ", every_n=every_n)
        self.every_n = every_n
        self.keep = False
        self.kept: dict[str, pd.DataFrame] | None = None
        self.decision_ms: float | None = None
        self._validations = 0
        self._last: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a task that cannot act before anything is trained."""
        if not callable(getattr(pl_module, "as_policy", None)):
            raise UserError(
                f"{type(pl_module).__name__} has no as_policy(), so it plays no episodes; "
                "take RolloutEvaluation out of trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a resumed run know the last values, for validations that come before the next episodes."""
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._last.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Play the validation episodes."""
        self.kept = None
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._validations += 1
            if (self._validations - 1) % self.every_n:
                return  # Lightning keeps the last values for callbacks
        self._last = self._play(trainer, pl_module, "valid", "val")
        pl_module.log_dict(self._last, sync_dist=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Play the test episodes."""
        pl_module.log_dict(self._play(trainer, pl_module, "test", "test"), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Return how many validations there were, and the last values."""
        return {"validations": self._validations, "last": dict(self._last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations, self._last = state_dict["validations"], dict(state_dict["last"])

    def _play(self, trainer: Trainer, pl_module: Any, split: str, prefix: str) -> dict[str, float]:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, NetDataModule):
            raise UserError("RolloutEvaluation needs a data module that knows the episodes; give the trainer one")
        policy = pl_module.as_policy()
        policy = Timed(policy) if hasattr(policy, "act") else policy
        watched = self.keep and split == "valid"
        count = 1 if is_sharded(pl_module) else world()
        if count == 1:
            tables = data.watch(policy) if watched else {"episodes": data.episodes(policy, split=split)}
        else:
            tables = joined(gathered(data.share(policy, split, watched, Shard(rank() + 1, count))))
        frame = tables["episodes"]
        if watched:
            self.kept = tables
        if isinstance(policy, Timed) and policy.decisions:
            self.decision_ms = 1000 * policy.seconds / policy.decisions
        means = {metric: float(frame[metric.column].mean()) for metric in data.metrics}
        return {f"{prefix}/{m.name}": float(np.sqrt(mean)) if m.root else mean for m, mean in means.items()}


def evaluation_of(trainer: Trainer) -> RolloutEvaluation | None:
    """Return the evaluation by rollout of a trainer, if it has one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, RolloutEvaluation)), None)


class Timed:
    """A policy whose decisions are timed; in all else the policy itself.

    Args:
        policy: Who decides.

    Attributes:
        seconds: That its decisions took.
        decisions: How many there were, one an episode and step.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds, self.decisions = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)  # what a policy may have beside `act`, such as `sequential`

    def act(self, observations: Observations) -> Array:
        """Decide, and note how long that took."""
        start = now(wait=False)  # the actions are numbers on the CPU, so the device is done
        actions = self.policy.act(observations)
        self.seconds += now(wait=False) - start
        self.decisions += len(actions)
        return actions
