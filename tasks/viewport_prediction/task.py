"""Viewport prediction with a language model: history and pictures in, the whole horizon out in one pass.

Shapes: B batch, T history samples, H horizon samples, P pictures, N patches; angles are (roll, pitch, yaw) in degrees.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.encoders import ImageEncoder, SeriesEncoder, TokenNorm, Tokens, VisionConfig, join
from netllm_pl.errors import UserError
from netllm_pl.heads import RegressionHead
from netllm_pl.task import OptimizerConfig, Prompt
from tasks.viewport_prediction.model import ViewportModel, wrap
from tasks.viewport_prediction.windows import Disturbance

MOTION = 30.0  # degrees: scale of motion within a window
STEP = 5.0  # degrees: scale of motion between two samples
ANGLE = 45.0  # degrees: scale of pitch and roll
FULL = 180.0  # degrees: scale of the published, normalised angles


class ViewportPrediction(ViewportModel):
    """Encoder, frozen language model with LoRA, regression head.

    The history goes through a 1-D CNN, pictures through a frozen ViT; one query token per future step lets a single
    pass answer the whole horizon. The head predicts unwrapped motion relative to the last sample.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
        history: Samples read.
        horizon: Samples predicted in one pass.
        objective: Training loss.
        rotate: Random yaw of up to that many degrees in training.
        mirror: Mirror windows at random in training.
        stretch: Scale motion at random by up to that share in training.
        mirror_average: Average the predictions of a window and its mirror image.
        disturb: Noise and gaps in the histories of training.
        reverse: Run half of the windows backwards in training.
        vision: Vision transformer for pictures; null reads none.
        picture_tokens: Tokens per picture.
        representation: ``relative`` motion, or ``absolute`` angles normalised by 180 degrees as published.
        decoding: ``parallel`` query tokens, or ``autoregressive`` as published (one pass per future step).
        width: Channels of the 1-D CNN.
        head_width: Size of the head's hidden layer; null is a single linear layer.
    """

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig | None = None,
        history: int = 10,
        horizon: int = 20,
        objective: Literal["l1", "mse"] = "l1",
        rotate: float = 180.0,
        mirror: bool = True,
        stretch: float = 0.0,
        mirror_average: bool = False,
        disturb: Disturbance | None = None,
        reverse: bool = False,
        vision: VisionConfig | None = None,
        picture_tokens: int = 4,
        representation: Literal["relative", "absolute"] = "relative",
        decoding: Literal["parallel", "autoregressive"] = "parallel",
        width: int = 128,
        head_width: int | None = 256,
    ) -> None:
        super().__init__(
            backbone, optimizer, history, horizon, objective, rotate, mirror, stretch, mirror_average, disturb,
            reverse,
        )  # fmt: skip
        assert self.backbone is not None
        self.representation, self.decoding = representation, decoding
        self.fixed = vision is None
        d_model, scale = self.backbone.d_model, self.backbone.token_scale
        channels = 8 if representation == "relative" else 3
        # One sample a token where answers are fed back: a wider kernel would show the model what it must predict.
        kernel = 3 if decoding == "parallel" else 1
        self.series = SeriesEncoder(channels, d_model, width, kernel, scale=scale)
        self.image = None if vision is None else ImageEncoder(vision, d_model, picture_tokens, extra=4, scale=scale)
        self.head = RegressionHead(self.backbone.d_hidden, 3, head_width)
        if decoding == "parallel":
            self.queries = nn.Parameter(torch.randn(horizon, d_model))
            self.summary = nn.Linear(d_model, d_model)
            self.glimpse = None if vision is None else nn.Linear(d_model, d_model)
            self.norm = TokenNorm(d_model, scale)

    def encode(self, batch: Batch) -> Prompt:
        """Lay out history, pictures, and one query token per future step."""
        assert self.backbone is not None
        angles, last = self.read(batch)
        context = self._context(angles, last, batch)
        queries = Tokens(self.norm(self.queries + self._summary(context.values)))
        tokens = join([context, queries])
        length = tokens.values.shape[1]
        answers = torch.arange(length - self.horizon, length, device=angles.device)
        return Prompt(tokens.values, answers, tokens.mask)

    def answer(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Turn hidden states (B, H, d_hidden) into angles (B, H, 3)."""
        return self._angles(self.head(hidden), self.read(batch)[1])

    def extrapolate(self, batch: Batch) -> Tensor:
        """Predict (B, horizon, 3) degrees."""
        if self.decoding == "parallel":
            return super().extrapolate(batch)
        if self.training:
            return self._teacher_forced(batch)
        return self._step_by_step(batch)

    def _context(self, angles: Tensor, last: Tensor, batch: Batch) -> Tokens:
        parts = [self.series(self._features(angles, last))]
        if self.image is not None:
            # Samples that are fed back must follow the history at once: there pictures come first.
            parts.insert(0 if self.decoding == "autoregressive" else 1, self._pictures(batch, last))
        return join(parts)

    def _summary(self, context: Tensor) -> Tensor:
        """Sum up the context for the queries: (B, 1, d_model).

        The residual stream brings it to the head at once; the language model refines it, instead of having to learn
        first where to look.
        """
        assert self.backbone is not None
        summary: Tensor = self.summary(context[:, self.history - 1 : self.history] / self.backbone.token_scale)
        if self.glimpse is not None:
            pictures = context[:, self.history :].mean(dim=1, keepdim=True)
            summary = summary + self.glimpse(pictures / self.backbone.token_scale)
        return summary

    def _features(self, angles: Tensor, last: Tensor, before: Tensor | None = None) -> Tensor:
        """Describe unwrapped samples (B, T, 3) by (B, T, channels) numbers; before (B, 1, 3) precedes the first."""
        if self.representation == "absolute":
            return wrap(angles) / FULL
        step = torch.diff(angles, dim=1, prepend=angles[:, :1] if before is None else before)
        return torch.cat([(angles - last) / MOTION, step / STEP, angles[..., :2] / ANGLE], dim=-1)

    def _angles(self, output: Tensor, last: Tensor) -> Tensor:
        return last + output * MOTION if self.representation == "relative" else output * FULL

    def _pictures(self, batch: Batch, last: Tensor) -> Tokens:
        if self.image is None or "pictures" not in batch:
            raise UserError("the model reads pictures but the data has none; set model.vision: null or give pictures")
        pictures = batch["pictures"]
        rows, columns = self.image.grid(pictures.shape[2], pictures.shape[3])
        directions = self._directions(rows, columns, last[:, 0], batch.get("frame"))
        directions = directions[:, None].expand(-1, pictures.shape[1], -1, -1)
        tokens: Tokens = self.image(pictures, batch.get("picture_ids"), directions)
        return tokens

    @staticmethod
    def _directions(rows: int, columns: int, last: Tensor, frame: Tensor | None) -> Tensor:
        """Where each patch of an equirectangular picture lies as seen from the last viewport: (B, N, 4).

        The picture spans yaw -180..180 from left to right and pitch 90..-90 from top to bottom.
        """
        device = last.device
        yaw = (torch.arange(columns, device=device) + 0.5) * (360 / columns) - 180
        pitch = 90 - (torch.arange(rows, device=device) + 0.5) * (180 / rows)
        yaw, pitch = yaw.repeat(rows)[None], pitch.repeat_interleave(columns)[None]
        if frame is not None:
            yaw = frame[:, :1] * yaw + frame[:, 1:]
        right, up = wrap(yaw - last[:, 2:3]), pitch - last[:, 1:2]
        radians = torch.deg2rad(right)
        return torch.stack([radians.sin(), radians.cos(), right / FULL, up / ANGLE], dim=-1)

    def _teacher_forced(self, batch: Batch) -> Tensor:
        """Train all steps at once: each position predicts the next sample from the true earlier ones."""
        assert self.backbone is not None
        angles, last = self.read(batch)
        future = batch["future"][:, : self.horizon - 1]
        steps = wrap(torch.diff(future, dim=1, prepend=wrap(last))).cumsum(1)
        context = self._context(torch.cat([angles, last + steps], dim=1), last, batch)
        hidden = self.backbone(context.values, context.mask)
        return self._angles(self.head(hidden[:, -future.shape[1] - 1 :]), last)

    def _step_by_step(self, batch: Batch) -> Tensor:
        """Feed each predicted sample back: `horizon` passes, the earlier ones in the key/value cache."""
        assert self.backbone is not None
        cache = DynamicCache()
        angles, last = self.read(batch)
        tokens, before, predictions = self._context(angles, last, batch).values, last, []
        for _ in range(self.horizon):
            hidden = self.backbone(tokens, None, cache)[:, -1:]
            sample = self._angles(self.head(hidden), last)
            predictions.append(sample)
            sample = before + wrap(sample - before)
            tokens, before = self.series(self._features(sample, last, before)).values, sample
        return torch.cat(predictions, dim=1)
