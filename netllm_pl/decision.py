"""Decision tasks: a frozen language model reads a window of experience and decides at every step of it.

Shapes: B batch, W steps of a window, K tokens a step, S state tokens a step, C choices, N episodes side by side.
"""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from netllm_pl.acting import Objective, OfflineTask, check_columns, evaluating
from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.encoders import TokenNorm
from netllm_pl.errors import UserError
from netllm_pl.heads import IMPOSSIBLE, ChoiceHead
from netllm_pl.rollout import Array, Observations
from netllm_pl.task import OptimizerConfig, Prompt


class DecisionTask(OfflineTask):
    """Base of tasks that decide: offline, from recorded experience.

    The tokens of a step are, in this order: the return that is still wanted (if ``returns``), the state, and the
    action that was taken (if ``actions``). The last state token answers. A token sees the steps of the last
    ``context``, its own included: in a long training window through a band mask, in use through a key/value cache from
    which older steps are dropped; both give the same answers.

    A task overrides `state`, and `decide` if a `ChoiceHead` is not what it needs.

    Args:
        backbone: The language model; it must be causal.
        optimizer: AdamW's settings.
        choices: Actions to choose from (C).
        context: Steps that a decision sees, the current one included.
        objective: Learn action values of the pool (``values``), or its actions (``imitation``).
        returns: Condition on the return to go (Chen et al., 2021, arXiv:2106.01345).
        actions: Show earlier actions as tokens of their own.
        target_return: Return that is asked for in use; received rewards are subtracted from it.
        return_scale: Returns are divided by it, and cut to -2 to 2.
        sample: Draw actions from the softmax of the scores instead of taking the best.
        head_width: Hidden layer of the head; null is a single linear layer.
        rollout_every: Validations between two evaluations by rollout.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: OptimizerConfig | None = None,
        choices: int = 6,
        context: int = 20,
        objective: Objective = "values",
        returns: bool = False,
        actions: bool = False,
        target_return: float = 0.0,
        return_scale: float = 1.0,
        sample: bool = False,
        head_width: int | None = 256,
        rollout_every: int = 1,
    ) -> None:
        super().__init__(backbone, optimizer)
        assert self.backbone is not None
        if not self.backbone.causal:
            raise UserError(f"backbone {backbone.name} sees later tokens; a decision task needs a causal model")
        if context < 1:
            raise UserError(f"context is {context}; it must be at least 1, the current step")
        if return_scale <= 0:
            raise UserError(f"return_scale is {return_scale}; it must be above 0")
        self.context, self.objective, self.sample = context, objective, sample
        self.target_return, self.return_scale, self.rollout_every = target_return, return_scale, rollout_every
        d_model, scale = self.backbone.d_model, self.backbone.token_scale
        self.wanted = nn.Sequential(nn.Linear(1, d_model), TokenNorm(d_model, scale)) if returns else None
        self.taken = nn.Sequential(nn.Embedding(choices, d_model), TokenNorm(d_model, scale)) if actions else None
        self.head = ChoiceHead(self.backbone.d_hidden, choices, head_width)

    # What a task says -------------------------------------------------------------------------------------------------

    @abstractmethod
    def state(self, batch: Batch) -> Tensor:
        """Encode the observations of every step: (B, W, S, d_model)."""

    def decide(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Score the choices (B, W, C) from the states (B, W, d_hidden) of the answering tokens."""
        scores: Tensor = self.head(hidden, batch.get("allowed"))
        return scores

    # Training ---------------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> Prompt:
        """Lay out the tokens of all steps; which tokens a token sees is said by a band mask."""
        tokens, answer = self._tokens(batch)
        steps, per_step = tokens.shape[1:3]
        step = torch.arange(steps, device=tokens.device).repeat_interleave(per_step)
        mask = None if steps <= self.context else self.visible(step, step)
        answers = torch.arange(steps, device=tokens.device) * per_step + answer
        offsets = torch.arange(per_step, device=tokens.device)
        positions = (batch["step"].unsqueeze(-1) * per_step + offsets).flatten(1)
        return Prompt(tokens.flatten(1, 2), answers, mask, positions)

    def answer(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Score the choices at every step."""
        return self.decide(hidden, batch)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Say which tokens a token sees: not later ones, nor those of steps that lie `context` or more back.

        Args:
            queries: (Q,) steps of the tokens that look.
            keys: (T,) steps of all tokens; the last Q are the queries.

        Returns:
            (1, 1, Q, T) bool.
        """
        order = torch.arange(len(keys), device=keys.device)
        causal = order[None] <= order[len(keys) - len(queries) :, None]
        near = keys[None] > queries[:, None] - self.context
        return (causal & near)[None, None]

    def _tokens(self, batch: Batch) -> tuple[Tensor, int]:
        """All tokens (B, W, K, d_model), and which of a step's tokens answers."""
        read = {"step": True, "return_to_go": self.wanted is not None, "action": self.taken is not None}
        check_columns(batch, [name for name, needed in read.items() if needed])
        parts = [self.state(batch)]
        if self.wanted is not None:
            parts.insert(0, self._wanted(batch["return_to_go"]))
        answer = sum(part.shape[2] for part in parts) - 1
        if self.taken is not None:
            parts.append(self._taken(batch["action"]))
        return torch.cat(parts, dim=2), answer

    def _wanted(self, returns: Tensor) -> Tensor:
        assert self.wanted is not None
        # A long outage costs thousands; how many does not matter.
        scaled = (returns / self.return_scale).clamp(-2, 2).float().unsqueeze(-1).unsqueeze(-1)
        tokens: Tensor = self.wanted(scaled)
        return tokens

    def _taken(self, actions: Tensor) -> Tensor:
        assert self.taken is not None
        tokens: Tensor = self.taken(actions.long().unsqueeze(-1))
        return tokens

    # Use --------------------------------------------------------------------------------------------------------------

    def as_policy(self, streaming: bool = True) -> "LanguageModelPolicy":
        """Act in an environment.

        Args:
            streaming: Keep earlier tokens in a key/value cache; False runs all of the episode again at every step.
        """
        return LanguageModelPolicy(self, streaming)


class LanguageModelPolicy:
    """Runs a decision task in an environment, many episodes side by side.

    Args:
        task: The adapted language model.
        streaming: Run new tokens only, with the earlier ones in a key/value cache.
    """

    def __init__(self, task: DecisionTask, streaming: bool = True) -> None:
        self.task, self.streaming = task, streaming
        self.generator = np.random.default_rng(0)

    def reset(self, n: int) -> None:
        """Begin n episodes."""
        self.step = 0
        self.wanted = np.full(n, self.task.target_return)
        self.cache = DynamicCache()
        self.cached = torch.empty(0, dtype=torch.long, device=self.task.device)  # step of each token in the cache
        self.pending: Tensor | None = None  # action token of the last step, which was chosen after its pass
        self.history: list[Batch] = []

    @torch.inference_mode()
    def act(self, observations: Observations) -> Array:
        """Decide for every episode."""
        if self.task.wanted is not None:
            if "reward" not in observations:
                raise UserError("observations have no 'reward' of the last step, which returns: true needs")
            self.wanted = self.wanted - observations["reward"]
        batch = self.task.observe(observations | {"return_to_go": self.wanted}, self.step)
        with evaluating(self.task):
            scores = self._stream(batch) if self.streaming else self._recompute(batch)
        actions = self._choose(scores.float().cpu().numpy())
        taken = torch.as_tensor(actions, device=self.task.device).unsqueeze(1)
        if self.streaming and self.task.taken is not None:
            self.pending = self.task._taken(taken)[:, 0]
        if not self.streaming:
            self.history[-1]["action"] = taken
        self.step += 1
        return actions

    def _stream(self, batch: Batch) -> Tensor:
        """Run the last action's token and the new ones; then forget what no later token sees."""
        task, step, device = self.task, self.step, self.task.device
        assert task.backbone is not None
        parts = [task.state(batch)[:, 0]]
        if task.wanted is not None:
            parts.insert(0, task._wanted(batch["return_to_go"])[:, 0])
        new = sum(part.shape[1] for part in parts)
        per_step = new + (task.taken is not None)
        positions = step * per_step + torch.arange(new, device=device)
        steps = torch.full((new,), step, device=device)
        if self.pending is not None:
            parts.insert(0, self.pending)
            positions = torch.cat([positions[:1] - 1, positions])
            steps = torch.cat([steps[:1] - 1, steps])
        self.cached = torch.cat([self.cached, steps])
        visible = task.visible(steps, self.cached)
        tokens = torch.cat(parts, dim=1)
        hidden = task.backbone(tokens, visible, self.cache, positions[None].expand(len(tokens), -1))
        # The token of this step's action comes with the next pass and sees as far back as this step does.
        horizon = step - task.context + (task.taken is None)
        self._forget(int((self.cached > horizon).sum()))
        return task.decide(hidden[:, -1:], batch)[:, 0]

    def _forget(self, keep: int) -> None:
        """Keep the last tokens of the cache."""
        self.cached = self.cached[len(self.cached) - keep :]
        layers: list[Any] = self.cache.layers  # of several kinds; a DynamicCache of attention layers holds one
        for layer in layers:
            start = layer.keys.shape[-2] - keep
            layer.keys, layer.values = layer.keys[..., start:, :], layer.values[..., start:, :]

    def _recompute(self, batch: Batch) -> Tensor:
        """Run the whole episode so far."""
        batch["action"] = torch.zeros_like(batch["step"])  # its token comes behind the answer, which cannot see it
        self.history.append(batch)
        whole = {name: torch.cat([step[name] for step in self.history], dim=1) for name in batch}
        scores: Tensor = self.task(whole)[:, -1]
        return scores

    def _choose(self, scores: Array) -> Array:
        if not self.task.sample:
            best: Array = scores.argmax(-1)
            return best
        # Gumbel-max: the softmax need not be computed.
        noise = self.generator.gumbel(size=scores.shape)
        drawn: Array = np.where(scores > IMPOSSIBLE / 2, scores + noise, scores).argmax(-1)
        return drawn
