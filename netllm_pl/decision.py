"""Decision tasks: a frozen language model reads a window of experience and decides at every step of it.

Shapes: B batch, W steps of a window, K tokens a step, S state tokens a step, C choices, N episodes side by side.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from netllm_pl.acting import Objective, OfflineTask, evaluating
from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.encoders import TokenNorm
from netllm_pl.errors import UserError
from netllm_pl.heads import ChoiceHead
from netllm_pl.ragged import join_steps
from netllm_pl.rollout import Array, Observations
from netllm_pl.step_tokens import BEHIND, Line, Part, StepTokens, follow, lay_out, pack, visible
from netllm_pl.task import OptimizerConfig, Prompt, check_columns, each_tensor


class DecisionTask(OfflineTask):
    """Base of tasks that decide: offline, from recorded experience.

    The tokens of a step are, in this order: the return that is still wanted (if ``returns``), the state, and the
    action that was taken (if ``actions``). The last state token answers. A token sees the steps of the last
    ``context``, its own included: in a long training window through a band mask, in use through a key/value cache from
    which older steps are dropped; both give the same answers. With a context of 1 each step is a sequence of its own.

    A task overrides `state`. One whose candidates differ in number from step to step returns `StepTokens` from it, sets
    ``choices`` to None, and brings `decide` (with a `PointerHead`), `choose`, and for ``actions`` `action_tokens`;
    where actions have a shape, `action_shape`.

    Args:
        backbone: The language model; it must be causal.
        optimizer: AdamW's settings.
        choices: Actions to choose from (C); None where they differ from step to step.
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

    action_shape: ClassVar[tuple[int, ...]] = ()
    """Shape of one action."""

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: OptimizerConfig | None = None,
        choices: int | None = 6,
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
        self.actions = actions
        self.fixed = choices is not None  # every step has the same tokens and choices
        self.taken: nn.Module | None = None
        self.head: nn.Module | None = None
        if choices is not None:
            self.taken = nn.Sequential(nn.Embedding(choices, d_model), TokenNorm(d_model, scale)) if actions else None
            self.head = ChoiceHead(self.backbone.d_hidden, choices, head_width)

    # What a task says -------------------------------------------------------------------------------------------------

    @abstractmethod
    def state(self, batch: Batch) -> Tensor | StepTokens:
        """Encode the observations of every step: (B, W, S, d_model), or `StepTokens` where S differs between steps."""

    def decide(self, hidden: Tensor, batch: Batch) -> Any:
        """Score the choices of every step, as `choose` and `loss` read them.

        Args:
            hidden: (B, W, S, d_hidden) states of all state tokens, of which the last one decides.
            batch: The observations.
        """
        assert self.head is not None, f"{type(self).__name__} has no fixed choices, and no decide() of its own"
        return self.head(hidden[:, :, -1], batch.get("allowed"))

    def action_tokens(self, batch: Batch, state: StepTokens) -> Tensor:
        """Encode the actions ``batch["action"]`` (B, W, ...) that were taken.

        Args:
            batch: Observations and actions.
            state: What `state` made of them.

        Returns:
            (B, W, 1, d_model).
        """
        assert self.taken is not None, f"{type(self).__name__} has no fixed choices, and no action_tokens() of its own"
        tokens: Tensor = self.taken(batch["action"].long().unsqueeze(-1))
        return tokens

    # Training ---------------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> Prompt:
        """Lay out the tokens of all steps."""
        read = {"step": True, "return_to_go": self.wanted is not None, "action": self.remembers_actions}
        check_columns(batch, [name for name, needed in read.items() if needed])
        state = self.state_tokens(batch)
        parts = self.before(batch, state)
        count = state.values.shape[2]
        own = sum(part.values.shape[2] for part in parts) - count + torch.arange(count, device=state.values.device)
        if self.remembers_actions:
            parts.append(self.after(batch, state))
        if self.context == 1:
            parts = [part.apart() for part in parts]
        line = lay_out(parts)
        steps = parts[0].values.shape[1]
        # The model's own causal mask will do if all steps are seen.
        alike = line.real is None and not state.both_ways and steps <= self.context
        answers = (torch.arange(steps, device=own.device)[:, None] * (len(line) // steps) + own).flatten()
        if line.real is None:
            return Prompt(line.values, answers, None if alike else visible(line, line, self.context), line.positions)
        packed = pack(line, self.context)
        return Prompt(packed.values, answers, packed.seen, packed.positions, packed.places)

    def answer(self, hidden: Tensor, batch: Batch) -> Any:
        """Score the choices at every step."""
        return self.decide(hidden.reshape(*batch["step"].shape, -1, hidden.shape[-1]), batch)

    @property
    def remembers_actions(self) -> bool:
        """Whether a later step sees tokens of earlier actions."""
        return self.actions and self.context > 1

    def state_tokens(self, batch: Batch) -> StepTokens:
        """The state tokens of every step."""
        state = self.state(batch)
        return StepTokens(state) if isinstance(state, Tensor) else state

    def before(self, batch: Batch, state: StepTokens) -> list[Part]:
        """Tokens of every step up to its decision: the wanted return if there is one, and the state."""
        device, count = state.values.device, state.values.shape[2]
        order = torch.arange(count, device=device)
        ranks = torch.full_like(order, count - 1) if state.both_ways else order
        places = order if state.places is None else state.places.to(device)
        first = int(self.wanted is not None)
        parts = [Part(state.values, state.mask, ranks, self._positions(batch, state, first + places))]
        if self.wanted is not None:
            start = torch.zeros(1, dtype=torch.long, device=device)
            wanted, positions = self._wanted(batch["return_to_go"]), self._positions(batch, state, start)
            parts.insert(0, Part(wanted, None, start - 1, positions))
        return parts

    def after(self, batch: Batch, state: StepTokens) -> Part:
        """The token of every step's action."""
        place = torch.full((1,), int(self.wanted is not None) + state.width, device=state.values.device)
        rank = torch.full_like(place, BEHIND)
        return Part(self.action_tokens(batch, state), None, rank, self._positions(batch, state, place))

    def _positions(self, batch: Batch, state: StepTokens, places: Tensor) -> Tensor:
        """Positions (B, W, K) in the episode of tokens at places (K,) of their steps."""
        per_step = int(self.wanted is not None) + state.width + self.actions
        step = torch.zeros_like(batch["step"]) if self.context == 1 else batch["step"]
        return step.unsqueeze(-1) * per_step + places

    def _wanted(self, returns: Tensor) -> Tensor:
        assert self.wanted is not None
        # A long outage costs thousands; how many does not matter.
        scaled = (returns / self.return_scale).clamp(-2, 2).float().unsqueeze(-1).unsqueeze(-1)
        tokens: Tensor = self.wanted(scaled)
        return tokens

    # Use --------------------------------------------------------------------------------------------------------------

    def as_policy(self, streaming: bool = True, static: bool | None = None) -> "LanguageModelPolicy":
        """Act in an environment.

        Args:
            streaming: Keep earlier tokens in a key/value cache; False runs all of the episode again at every step.
            static: Keep them in fixed places, with LoRA merged into the weights (`netllm_pl.streaming`): the same
                answers, on a GPU from captured CUDA graphs. None does so on a GPU if ``backbone.graphs`` is on, and on
                a CPU for few episodes side by side.
        """
        assert self.backbone is not None
        whole = not self.backbone.sharded  # LoRA cannot be merged into a part of a weight
        gpu = whole and self.device.type == "cuda" and self.backbone.config.graphs
        cpu = whole and self.device.type == "cpu"
        if streaming and (gpu or cpu if static is None else static):
            from netllm_pl.streaming import StaticPolicy

            return StaticPolicy(self, capture=gpu, few=cpu and static is None)
        return LanguageModelPolicy(self, streaming)


class LanguageModelPolicy:
    """Runs a decision task in an environment, many episodes side by side.

    Args:
        task: The adapted language model.
        streaming: Run new tokens only, with the earlier ones in a key/value cache.
        draw: Draw actions from the softmax of the scores, whatever the task says.
    """

    def __init__(self, task: DecisionTask, streaming: bool = True, draw: bool = False) -> None:
        self.task, self.streaming, self.draw = task, streaming, draw or task.sample
        self.reseed(0)

    def reseed(self, number: int) -> None:
        """Draw what belongs to one of many batches of episodes."""
        self.generator = np.random.default_rng(number)

    def reset(self, n: int) -> None:
        """Begin n episodes."""
        self.step = 0
        self.wanted = np.full(n, self.task.target_return)
        self.cache = DynamicCache()
        self.cached: Line | None = None  # the tokens of the cache
        self.pending: Line | None = None  # the last step's action, which was chosen after its pass
        self.history: list[Batch] = []

    @torch.inference_mode()
    def act(self, observations: Observations) -> Array:
        """Decide for every episode."""
        task = self.task
        if task.wanted is not None:
            if "reward" not in observations:
                raise UserError("observations have no 'reward' of the last step, which returns: true needs")
            self.wanted = self.wanted - observations["reward"]
        with evaluating(task):
            chosen = self._decide(observations | {"return_to_go": self.wanted})
        self.step += 1
        actions: Array = chosen[:, 0].cpu().numpy()
        return actions

    def _decide(self, seen: Observations) -> Tensor:
        """Actions (N, 1, ...) of this step."""
        batch = self.task.observe(seen, self.step)
        return self._stream(batch) if self.streaming and self.task.context > 1 else self._recompute(batch)

    def _stream(self, batch: Batch) -> Tensor:
        """Run the last action's token and the new ones; then forget what no later token sees."""
        task = self.task
        assert task.backbone is not None
        state = task.state_tokens(batch)
        new = lay_out(task.before(batch, state), self.step)
        if self.pending is not None:
            new = follow([self.pending, new])
        seen = new.without_values()
        self.cached = seen if self.cached is None else follow([self.cached, seen])
        mask = visible(new, self.cached, task.context)
        hidden = task.backbone(new.values, mask, self.cache, new.positions)
        # The token of this step's action comes with the next pass and sees as far back as this step does.
        horizon = self.step - task.context + (not task.actions)
        self._forget(int((self.cached.steps > horizon).sum()))
        chosen = self._choose(task.decide(hidden[:, None, -state.values.shape[2] :], batch), batch)
        if task.actions:
            self.pending = lay_out([task.after(batch | {"action": chosen}, state)], self.step)
        return chosen

    def _forget(self, keep: int) -> None:
        """Keep the last tokens of the cache."""
        assert self.cached is not None
        self.cached = self.cached.last(keep)
        layers: list[Any] = self.cache.layers  # of several kinds; a DynamicCache of attention layers holds one
        for layer in layers:
            start = layer.keys.shape[-2] - keep
            layer.keys, layer.values = layer.keys[..., start:, :], layer.values[..., start:, :]

    def _recompute(self, batch: Batch) -> Tensor:
        """Run the whole episode so far, or what of it is seen, through the pass of training."""
        # The token of this step's action comes behind the answer, which cannot see it.
        shape = (*batch["step"].shape, *self.task.action_shape)
        batch["action"] = torch.zeros(shape, dtype=torch.long, device=self.task.device)
        self.history = [*self.history, batch] if self.task.context > 1 else [batch]
        scores = each_tensor(self.task(join_steps(self.history)), lambda part: part[:, -1:])
        chosen = self._choose(scores, batch)
        batch["action"] = chosen
        return chosen

    def _choose(self, scores: Any, batch: Batch) -> Tensor:
        """Actions (N, 1, ...) of the last step."""
        return self.task.choose(scores, batch, self.generator if self.draw else None)
