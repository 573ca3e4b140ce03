"""A language model writes text: keys and values in fixed places, each word's pass captured in a CUDA graph.

What decisions have (`netllm_pl.streaming`), those who prompt the model have too, so that comparing is fair: LoRA is
merged, and a word costs one replay. On a CPU the same code runs without a graph.

Shapes: N prompts, P places of the longest one, T places in all, V words of the vocabulary.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from netllm_pl.attention import RING, shared_heads
from netllm_pl.backbone import Backbone
from netllm_pl.errors import UserError
from netllm_pl.frozen import frozen_copy, inner_model, merged_of
from netllm_pl.graphs import Captured, Places, normal_mode

WORDS = 4
"""Words between two looks at what was written: for each look the program and the GPU wait for each other."""
UNFIXED = "its attention cannot keep keys and values in fixed places; take an architecture such as llama"
ALIGNED = 256
"""Prompts of about the same length share a graph."""


class Writer:
    """Goes on with N prompts, the likeliest word each time.

    Args:
        backbone: Causal, whole, and of an architecture that lets attention be exchanged.
        vectors: (V, d_model) of words that it reads.
        head: (V, d_hidden) of words that it writes.
        rows: Prompts (N).
        longest: Places for a prompt (P).
        words: Places for what is written.
    """

    def __init__(self, backbone: Backbone, vectors: Tensor, head: Tensor, rows: int, longest: int, words: int) -> None:
        if backbone.sharded or not getattr(inner_model(backbone), "_supports_attention_backend", False):
            reason = "processes share out its layers" if backbone.sharded else UNFIXED
            raise UserError(f"backbone {backbone.config.name} cannot write text: {reason}")
        self.name = backbone.config.name
        self.vectors, self.head, self.shape = vectors, head, (rows, longest, words)
        self.model = frozen_copy(backbone)
        self.groups = shared_heads(self.model)
        device = vectors.device
        size = longest + words + WORDS - 1
        self.size = -(-size // 16) * 16  # attention kernels copy rows of masks that are no multiple of that
        self.prompt = torch.arange(longest, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.word, self.place = (torch.zeros(rows, 1, dtype=torch.long, device=device) for _ in range(2))
        self.written = torch.zeros(rows, self.size, dtype=torch.long, device=device)
        self.mask = torch.full((rows, 1, self.groups, self.size), -math.inf, dtype=backbone.dtype, device=device)
        self.shown = torch.zeros(rows, 1, self.groups, 1, dtype=backbone.dtype, device=device)
        self.layers: list[Any] = [module for module in self.model.modules() if hasattr(module, "layer_idx")]
        for module in self.layers:
            module.ring_size = self.size
        self.model.config._attn_implementation = RING
        self.places = Places(backbone)  # now: merging may have moved weights
        self.step = Captured(self._step, device.type == "cuda" and backbone.config.graphs)

    def fits(self, vectors: Tensor, shape: tuple[int, int, int]) -> bool:
        """Whether this was made for so many prompts of such a length, and for the weights as they lie now."""
        return vectors is self.vectors and shape == self.shape and self.places.hold()

    def write(self, prompts: Sequence[Sequence[int]], goes_on: Callable[[int, int], bool]) -> list[list[int]]:
        """Write until all answers have ended, or there are no places."""
        longest, device = self.shape[1], self.vectors.device
        # Prompts end together: what is written stands behind all of them.
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        begins = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
        ids = torch.tensor(rows, device=device)
        with torch.compiler.set_stance("force_eager"):  # prompts come once
            self._read(ids, begins)
        if self.step.capture and self.step.graph is None:
            try:
                self.step()  # its runs write what is written over now
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.step.capture = False  # some layers wait for the GPU; what they answer is the same
                reason = str(error).partition("\n")[0]
                print(f"note: {self.name} writes without a CUDA graph, which is slower: {reason}", file=sys.stderr)
            with torch.compiler.set_stance("force_eager"):
                self._read(ids, begins)
        found: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        for begin in range(0, self.shape[2], WORDS):
            for number in range(begin, begin + WORDS):
                if number:
                    self.step()
            words = self.written[:, begin : begin + WORDS].tolist()
            still = []
            for row in going:
                for word in words[row]:
                    found[row].append(word)
                    if not goes_on(row, word):
                        break
                else:
                    still.append(row)
            going = still
            if not going:
                break
        return [words[: self.shape[2]] for words in found]

    def _read(self, ids: Tensor, begins: Tensor) -> None:
        """Read all prompts in one pass, and choose the first words."""
        longest, at = self.shape[1], torch.arange(self.size, device=ids.device)
        # A place before a prompt sees itself: nothing at all would be no number.
        seen = ((at <= self.prompt[:, None]) & (at >= begins[..., None])) | (at == self.prompt[:, None])
        seen = seen[:, None].repeat(1, 1, self.groups, 1)
        mask = torch.zeros(seen.shape, dtype=self.mask.dtype, device=ids.device).masked_fill_(~seen, -math.inf)
        self._use(self.prompt)
        self._choose(ids, mask, (self.prompt - begins).clamp_min(0), 0 * self.slot)
        if sum(hasattr(module, "ring_keys") for module in self.layers) < self.model.config.num_hidden_layers:
            raise UserError(f"backbone {self.name} cannot write text: {UNFIXED}")
        self._use(self.slot)
        self.slot.fill_(longest)
        self.place.copy_(longest - begins)
        self.mask.zero_().masked_fill_(((at < begins) | (at >= longest))[:, None, None], -math.inf)

    def _use(self, slots: Tensor) -> None:
        """Say where keys and values of the next pass go."""
        for module in self.layers:
            module.ring_slots = slots

    def _step(self) -> Tensor:
        """Read the last words, and choose the next ones; everything stays in its place."""
        self.mask.index_copy_(3, self.slot, self.shown)
        self._choose(self.word, self.mask, self.place, self.slot - self.shape[1] + 1)
        self.slot.add_(1)
        self.place.add_(1)
        return self.word

    def _choose(self, ids: Tensor, mask: Tensor, places: Tensor, number: Tensor) -> None:
        tokens = F.embedding(ids, self.vectors)
        output = self.model(inputs_embeds=tokens, attention_mask=mask, position_ids=places, use_cache=False)
        hidden = output.last_hidden_state[:, -1].to(self.head.dtype)
        self.word.copy_((hidden @ self.head.T).argmax(-1, keepdim=True))
        self.written.index_copy_(1, number, self.word)


_WRITERS: WeakKeyDictionary[Backbone, Writer] = WeakKeyDictionary()


def write(
    backbone: Backbone,
    vectors: Tensor,
    head: Tensor,
    prompts: Sequence[Sequence[int]],
    words: int,
    goes_on: Callable[[int, int], bool],
) -> list[list[int]]:
    """Go on with prompts, the likeliest word each time, with what the adapters have learned.

    Args:
        backbone: Whose text.
        vectors: (V, d_model) of words that it reads, always the same tensor.
        head: (V, d_hidden) of words that it writes.
        prompts: N of them, in words.
        words: At most so many of an answer.
        goes_on: Told the row and each of its words, whether the answer goes on behind it.

    Returns:
        The words of each answer, the last one included.
    """
    longest = max(map(len, prompts))
    backbone.check_last(longest + words + WORDS)
    if vectors.device.type == "cuda":
        longest = -(-longest // ALIGNED) * ALIGNED
    shape = len(prompts), longest, words
    with normal_mode():
        writer = _WRITERS.get(backbone)
        if writer is None or not writer.fits(vectors, shape):
            writer = None
            _WRITERS.pop(backbone, None)  # its places are free before new ones are taken
            writer = _WRITERS[backbone] = Writer(backbone, vectors, head, *shape)
        merged_of(backbone)
        return writer.write(prompts, goes_on)
