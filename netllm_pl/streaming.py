"""Decisions with keys and values in fixed places, captured in CUDA graphs, LoRA merged into the weights.

A decision of a large model is bound by reading its weights, one of a small model by launching kernels. Here nothing
changes its shape between decisions, so that on a GPU all of one is captured in a graph once and then replayed; on a CPU
the same code runs without one, and a few tokens take `netllm_pl.cpu_decoder`. Answers are those of
`netllm_pl.decision.LanguageModelPolicy` and of training.

Shapes: N episodes side by side, K tokens a pass, T places of keys and values, S state tokens a step.
"""

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor

from netllm_pl.acting import ActingTask, evaluating
from netllm_pl.attention import RING, shared_heads
from netllm_pl.cpu_decoder import decoder_of
from netllm_pl.data import Batch
from netllm_pl.decision import DecisionTask, LanguageModelPolicy
from netllm_pl.frozen import _PREDICTORS, frozen_copy, inner_model, merged_of
from netllm_pl.graphs import Captured, Places, normal_mode
from netllm_pl.rollout import Array, Observations
from netllm_pl.step_tokens import Line, StepTokens, follow, lay_out, visible
from netllm_pl.task import NetTask

FAR = 2**40
"""Empty places hold a step so far back that no context reaches it."""
ALIGNED = 16
"""Rows of masks are a multiple of that long: attention kernels copy others."""


class Parcel:
    """Brings arrays to the device in one copy, always to the same places.

    Args:
        arrays: (N, ...) by name; later ones have the same shapes and types.
        device: Where they go.

    Attributes:
        batch: (N, 1, ...) tensors by name, windows of one step.
    """

    def __init__(self, arrays: Mapping[str, Array], device: torch.device) -> None:
        begins, total = [], 0
        for array in arrays.values():
            begins.append(total)
            total += -(-array.nbytes // 16) * 16  # so that every type finds its alignment
        gpu = device.type == "cuda"
        self.sent = torch.zeros(total, dtype=torch.uint8, pin_memory=gpu)
        self.received = torch.zeros(total, dtype=torch.uint8, device=device) if gpu else self.sent
        self.host: dict[str, Array] = {}
        self.batch: Batch = {}
        for (name, array), begin in zip(arrays.items(), begins, strict=True):
            part = slice(begin, begin + array.nbytes)
            self.host[name] = self.sent.numpy()[part].view(array.dtype).reshape(array.shape)
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            self.batch[name] = self.received[part].view(dtype).view(array.shape).unsqueeze(1)
        self.send(arrays)

    def send(self, arrays: Mapping[str, Array]) -> None:
        """Write over what came before."""
        for name, place in self.host.items():
            np.copyto(place, arrays[name], casting="no")
        if self.received is not self.sent:
            self.received.copy_(self.sent, non_blocking=True)


# Keys and values in fixed places --------------------------------------------------------------------------------------


class Stream:
    """Decides for N episodes side by side, step by step, with nothing that changes its shape.

    Keys and values of the last steps lie in a ring: the tokens of step s go where those of step s - C were, C steps
    being all that any token sees. They are stored as they are seen, turned by their absolute positions, so their order
    in memory does not matter.

    Args:
        task: The adapted language model.
        arrays: What is seen at the first step, (N, ...) by name.
        capture: Whether to capture CUDA graphs.
        few: Whether this is of use only for few tokens on a CPU (`netllm_pl.cpu_decoder`).
    """

    def __init__(self, task: DecisionTask, arrays: Observations, capture: bool, few: bool = False) -> None:
        assert task.backbone is not None
        self.device, self.capture = task.device, capture
        self.mixed = torch.is_autocast_enabled(self.device.type)
        self._task = ref(task)  # `_STREAMS` would else keep what it is the key of
        self.parcel = Parcel(arrays, self.device)
        self.shapes = shapes_of(arrays)
        state = task.state_tokens(self.parcel.batch)
        new = lay_out(task.before(self.parcel.batch, state))
        self.remembers = task.remembers_actions
        # An action's token is run at the next step, and sees as far back as its own step does.
        self.steps_kept = task.context + self.remembers
        self.tokens = len(new) + self.remembers
        size = -(-self.steps_kept * self.tokens // ALIGNED) * ALIGNED
        self.slots, ranks, steps = (self._integers(length) for length in (self.tokens, size, size))
        self.ring = Line(new.values.new_zeros(1, size, 0), None, ranks, steps.fill_(-FAR), self._integers(1, size))
        if self.remembers:
            self.chosen = self._integers(len(state.values), 1, *task.action_shape)
            self.pending = task.after(self.parcel.batch | {"action": self.chosen}, state)
        self.decoder = decoder_of(task.backbone, len(new.values), self.tokens, size)
        if self.decoder is None and not few:
            self.model = frozen_copy(task.backbone)
            self._prepare_layers(size)
        self.places = Places(task)  # now: merging may have moved weights
        # Encoders are many small kernels, which take a twelfth of a large model's decision if they are not compiled.
        compiled = capture and task.backbone.config.compile
        self.read = torch.compile(self._read, dynamic=False) if compiled else self._read
        self.decide = Captured(self._decide, capture)
        remember = torch.compile(self._remember, dynamic=False) if compiled else self._remember
        self.remember = Captured(remember, capture)
        self.usable = state.mask is None and (self.decoder is not None or (not few and self._first_pass()))

    @property
    def task(self) -> DecisionTask:
        """The adapted language model, which outlives its streams."""
        task = self._task()
        assert task is not None
        return task

    def _integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    def _prepare_layers(self, size: int) -> None:
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                module.ring_size, module.ring_slots = size, self.slots  # type: ignore[assignment]  # read above
        self.model.config._attn_implementation = RING
        self.shared_heads = shared_heads(self.model)

    def _first_pass(self) -> bool:
        """Allocate the ring; tell whether all layers use it, as those of some architectures do not."""
        with torch.compiler.set_stance("force_eager"):
            self._decide()
        layers = sum(hasattr(module, "ring_keys") for module in self.model.modules())
        return bool(layers == self.model.config.num_hidden_layers)

    def fits(self, arrays: Observations) -> bool:
        """Whether this was made for such observations and such precision, and for the weights as they lie now."""
        alike = shapes_of(arrays) == self.shapes and torch.is_autocast_enabled(self.device.type) == self.mixed
        return alike and self.places.hold()

    def restart(self) -> None:
        """Begin new episodes, with what the adapters have learned since."""
        assert self.task.backbone is not None
        if self.decoder is None or self.decoder.merges:
            merged_of(self.task.backbone)
        self.ring.steps.fill_(-FAR)

    def scores(self, arrays: Observations) -> Any:
        """Run the last action's token and the new ones; return the scores of a step of every episode."""
        self.parcel.send(arrays)
        return self.decide()[0]

    def act(self, chosen: Tensor) -> None:
        """Note what was done at this step (N, 1, ...)."""
        if self.remembers:
            self.chosen.copy_(chosen)
            self.remember()

    def _decide(self) -> tuple[Any, Tensor]:
        tokens, mask, positions, self.state = self.read()
        if self.decoder is not None:
            hidden = self.decoder(tokens, mask, positions, self.slots)
        else:
            output = self.model(inputs_embeds=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            hidden = output.last_hidden_state.float()
        count = self.state.values.shape[2]
        return self.task.decide(hidden[:, None, -count:], self.parcel.batch), self.state.values

    def _read(self) -> tuple[Tensor, Tensor, Tensor, StepTokens]:
        """Encode what is seen, and find its tokens their places.

        Returns:
            (N, K, d_model) the tokens; (1, 1, K, T), or of all heads that share keys and values (1, 1, G K, T), which
            places each one sees, as the model takes it; (N, K) where they stand; and the state among them.
        """
        task, batch = self.task, self.parcel.batch
        state = task.state_tokens(batch)
        step = batch["step"][0, 0]
        new = lay_out(task.before(batch, state))
        new = Line(new.values, None, new.ranks, new.steps + step, new.positions)
        if self.remembers:
            last = lay_out([self.pending])
            before = torch.where(step > 0, step - 1, -FAR)  # nobody sees the action before the first step
            new = follow([Line(last.values, None, last.ranks, last.steps + before, last.positions), new])
        places = step % self.steps_kept * self.tokens + torch.arange(self.tokens, device=self.device)
        self.slots.copy_(places)
        self.ring.steps.index_copy_(0, self.slots, new.steps)
        self.ring.ranks.index_copy_(0, self.slots, new.ranks)
        seen = visible(new, self.ring, task.context)
        if self.decoder is not None:
            return new.values, seen, new.positions, state
        assert task.backbone is not None
        dtype = task.backbone.dtype
        seen = seen.repeat(1, 1, self.shared_heads, 1)
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -math.inf)
        return new.values.to(dtype), mask, new.positions, state

    def _remember(self) -> Tensor:
        token = self.task.after(self.parcel.batch | {"action": self.chosen}, self.state)
        self.pending.positions.copy_(token.positions)
        return self.pending.values.copy_(token.values)


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay the same from step to step."""
    return {name: (tuple(array.shape), array.dtype) for name, array in arrays.items()}


class StaticPolicy(LanguageModelPolicy):
    """Decides as `LanguageModelPolicy` does, by `Stream`; what does not fit there is decided as it does.

    Args:
        task: The adapted language model.
        capture: Whether to capture CUDA graphs.
        few: Whether to do so only for few tokens on a CPU, where this is faster without graphs, too.
    """

    def __init__(self, task: DecisionTask, capture: bool, few: bool = False) -> None:
        super().__init__(task)
        self.capture, self.few = capture, few
        self.stream: Stream | None = None

    def _decide(self, seen: Observations) -> Tensor:
        with normal_mode():
            numbers = {name: value for name, value in seen.items() if value.dtype != object}
            if self.step == 0:
                size = len(next(iter(seen.values())))
                arrays = numbers | {"step": np.zeros(size, np.int64)}
                whole = len(numbers) == len(seen)
                self.stream = stream_of(self.task, arrays, self.capture, self.few) if whole else None
            if self.stream is None:
                return super()._decide(seen)
            arrays = numbers | {"step": np.full(len(self.stream.parcel.host["step"]), self.step)}
            self._check_places(self.stream)
            scores = self.stream.scores(arrays)
            chosen = self._choose(scores, self.stream.parcel.batch)
            self.stream.act(chosen)
            return chosen

    def _check_places(self, stream: Stream) -> None:
        """Refuse sessions that are longer than a model with learned positions can read."""
        backbone = self.task.backbone
        if backbone is not None and backbone.places is not None:
            per_step = stream.state.width + int(self.task.wanted is not None) + self.task.actions
            step = self.step if self.task.context > 1 else 0
            backbone.check_last(step * per_step + per_step - 1 - self.task.actions)


_STREAMS: WeakKeyDictionary[DecisionTask, list[Stream]] = WeakKeyDictionary()
KEPT = 2
"""Numbers of episodes side by side for which a task keeps its stream: compiling and capturing takes a while."""


def stream_of(task: DecisionTask, arrays: Observations, capture: bool, few: bool = False) -> Stream | None:
    """Return a stream at its beginning, an earlier one if it fits; None if this task has no fixed shapes."""
    if not can_stream(task):
        return None
    streams = [stream for stream in _STREAMS.get(task, []) if stream.fits(arrays) and stream.capture == capture]
    if streams:
        streams[0].restart()
        return streams[0]
    with evaluating(task):
        stream = Stream(task, arrays, capture, few)
        if not stream.usable:
            return None
        stream.restart()
        stream.parcel.send(arrays)
        if capture:
            stream.decide()  # now, in evaluation mode; it is run again for the first step
            stream.restart()
    _STREAMS[task] = [stream, *_STREAMS.get(task, [])][:KEPT]
    return stream


def forget(task: NetTask) -> None:
    """Free what was compiled and captured of a task's decisions and predictions."""
    _PREDICTORS.pop(task, None)
    if isinstance(task, DecisionTask):
        _STREAMS.pop(task, None)


def can_stream(task: DecisionTask) -> bool:
    """Whether every step of a task has the same shape, and its language model lets attention be exchanged."""
    if task.backbone is None or not task.fixed or type(task).observe is not ActingTask.observe:
        return False
    return bool(getattr(inner_model(task.backbone), "_supports_attention_backend", False))
