"""Viewport prediction by text, to compare with: numbers as words, answered word by word through the LM head.

Shapes: B batch, T history samples, H horizon samples, P words of a prompt, N words in all, V words of the vocabulary.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.errors import UserError
from netllm_pl.task import OptimizerConfig
from netllm_pl.text import words_of
from netllm_pl.writing import write
from tasks.viewport_prediction.model import ViewportModel, wrap

ASKED = {
    "absolute": "Roll, pitch, yaw of a viewer in degrees, five samples a second: ",
    "relative": "Roll, pitch, yaw of a viewer in degrees relative to the last sample, five samples a second: ",
}
NEXT = " Next: "
END = "\n"
WORDS = 16
"""At most so many words for a sample of an answer: digits, signs and separators."""
SAMPLE = re.compile(r"\s*(-?\d{1,3}),\s?(-?\d{1,3}),\s?(-?\d{1,3})")
BEGUN = re.compile(r"\s*-?\d{0,3}(,\s?-?\d{0,3}){0,2}")
"""What may still become a sample."""


class Taught(NamedTuple):
    """What the language model says while it is told the answer.

    Attributes:
        scores: (R, V) of the R words of all answers.
        wanted: (R,) int64, the words.
    """

    scores: Tensor
    wanted: Tensor


class PromptedViewport(ViewportModel):
    """The language model reads the history as text and writes the horizon as text; LoRA learns, nothing else.

    This is the way that the paper argues against. An answer is as long as its text: a few hundred passes of the model,
    with keys and values kept (`netllm_pl.writing`). One that is no list of ``horizon`` samples is invalid; what it says
    until there is taken, and the rest is held, the last sample of the history if it says nothing. Numbers are rounded
    to degrees.

    Args:
        backbone: The language model; it must be causal.
        optimizer: AdamW's settings.
        history: Samples in the prompt.
        horizon: Samples of an answer.
        rotate: Random yaw of up to that many degrees in training.
        mirror: Mirror windows at random in training.
        stretch: Scale motion at random by up to that share in training.
        representation: Angles as they are (``absolute``), or motion relative to the last sample (``relative``).
    """

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig | None = None,
        history: int = 10,
        horizon: int = 20,
        rotate: float = 180.0,
        mirror: bool = True,
        stretch: float = 0.0,
        representation: Literal["absolute", "relative"] = "absolute",
    ) -> None:
        super().__init__(backbone, optimizer, history, horizon, "l1", rotate, mirror, stretch)
        assert self.backbone is not None
        if not self.backbone.causal:
            raise UserError(f"backbone {backbone.name} sees later tokens; to write text it must be a causal model")
        self.representation = representation
        words = words_of(backbone, self.backbone.d_model, self.backbone.token_scale, self.backbone.word_scale)
        self.tokenizer = words.tokenizer
        self.spellings: dict[int, str] = {}
        self.vectors: Tensor
        self.words: Tensor
        self.register_buffer("vectors", words.vectors.to(self.backbone.dtype), persistent=False)
        head = self.vectors if words.head is words.vectors else words.head.to(self.backbone.dtype)
        self.register_buffer("words", head, persistent=False)

    def forward(self, batch: Batch) -> Any:
        """Predict (B, horizon, 3) degrees; in training, say the words of the answer that is told: `Taught`."""
        return self._taught(batch) if self.training else self.extrapolate(batch)

    def extrapolate(self, batch: Batch) -> Tensor:
        """Write the answers, and read them: (B, horizon, 3) degrees."""
        angles, last = self.read(batch)
        written = self._write([self._prompt(one) for one in self._numbers(angles, last).tolist()])
        read = [parse(text, self.horizon) for text in written]
        self.told = {"invalid": np.array([float(len(samples) < self.horizon) for samples in read])}
        held = torch.zeros_like(last) if self.representation == "relative" else last
        answers = [torch.tensor(samples, dtype=last.dtype, device=last.device).reshape(-1, 3) for samples in read]
        whole = [torch.cat([one, (one if len(one) else own)[-1:].expand(self.horizon - len(one), 3)])
                 for one, own in zip(answers, held, strict=True)]  # fmt: skip
        prediction = torch.stack(whole)
        return last + prediction if self.representation == "relative" else prediction

    def loss(self, prediction: Any, batch: Batch) -> Tensor:
        """Cross-entropy of the words in training, else the error in degrees."""
        if isinstance(prediction, Taught):
            return F.cross_entropy(prediction.scores, prediction.wanted)
        return super().loss(prediction, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of training, without metrics: nothing is predicted in it."""
        batch = self.augment(batch)
        loss = self.loss(self(batch), batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    # Text -------------------------------------------------------------------------------------------------------------

    def _numbers(self, angles: Tensor, last: Tensor) -> Tensor:
        """Whole degrees (B, N, 3) of unwrapped angles."""
        shown = angles - last if self.representation == "relative" else wrap(angles)
        return shown.round().long().clamp(-999, 999)

    def _prompt(self, numbers: Sequence[Sequence[int]]) -> list[int]:
        return self.tokenizer.ids(f"{ASKED[self.representation]}{spelt(numbers)}{NEXT}")

    def _taught(self, batch: Batch) -> Taught:
        """Run prompts and answers at once."""
        angles, last = self.read(batch)
        future = batch["future"][:, : self.horizon]
        path = last + wrap(torch.diff(future, dim=1, prepend=wrap(last))).cumsum(1)
        prompts = [self._prompt(one) for one in self._numbers(angles, last).tolist()]
        answers = [self.tokenizer.ids(spelt(one) + END) for one in self._numbers(path, last).tolist()]
        lines = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, lines))
        ids = torch.tensor([line + [0] * (longest - len(line)) for line in lines], device=self.device)
        place = torch.arange(longest, device=self.device)
        starts, ends = (torch.tensor(sizes, device=self.device)[:, None] for sizes in (
            [len(prompt) for prompt in prompts], [len(line) for line in lines],
        ))  # fmt: skip
        assert self.backbone is not None
        hidden = self.backbone(F.embedding(ids, self.vectors))  # nothing sees what fills up the lines behind it
        wanted = (place >= starts) & (place < ends)
        return Taught(self._scores(hidden[:, :-1][wanted[:, 1:]]), ids[wanted])

    def _scores(self, hidden: Tensor) -> Tensor:
        return (hidden.to(self.words.dtype) @ self.words.T).float()

    def _write(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Answer word by word, the likeliest each time, until all answers have ended or cannot be valid any more."""
        assert self.backbone is not None
        written = [""] * len(prompts)

        def goes_on(row: int, word: int) -> bool:
            written[row] += self._spelling(word)
            return hopeful(written[row], self.horizon)

        found = write(self.backbone, self.vectors, self.words, prompts, WORDS * self.horizon, goes_on)
        return [self.tokenizer.text(words) for words in found]

    def _spelling(self, word: int) -> str:
        """Text of a word alone."""
        if word not in self.spellings:
            self.spellings[word] = self.tokenizer.text([word])
        return self.spellings[word]


def spelt(numbers: Sequence[Sequence[int]]) -> str:
    """Write samples as text: ``-3,10,45;-3,11,47;``."""
    return "".join(",".join(map(str, sample)) + ";" for sample in numbers)


def parse(text: str, horizon: int) -> list[tuple[int, int, int]]:
    """Read samples up to the first mistake, and no more than the horizon."""
    found: list[tuple[int, int, int]] = []
    for part in text.split(";")[:-1][:horizon]:
        sample = SAMPLE.fullmatch(part)
        if sample is None:
            break
        found.append((int(sample[1]), int(sample[2]), int(sample[3])))
    return found


def hopeful(text: str, horizon: int) -> bool:
    """Whether an answer goes on, and may become a valid one."""
    *whole, rest = text.split(";")
    if len(whole) >= horizon:
        return False
    # Only the last whole sample is new: earlier ones were looked at before.
    return (not whole or SAMPLE.fullmatch(whole[-1]) is not None) and BEGUN.fullmatch(rest) is not None
