"""Adaptive bitrate streaming with a language model: which level should the next chunk have?

Shapes: B batch, W steps, S state tokens a step, L levels, H samples of history, A chunks ahead.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from netllm_pl.acting import Objective
from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.decision import DecisionTask
from netllm_pl.encoders import ScalarEncoder, SeriesEncoder
from netllm_pl.errors import UserError, at_least
from netllm_pl.task import OptimizerConfig, check_columns

OBSERVED = ("level", "buffer_s", "throughput", "delay_s", "next_bytes", "chunks_left")
"""Columns of the observation that are read."""


class AdaptiveBitrate(DecisionTask):
    """Encoders, frozen language model with LoRA, and a head that scores the levels of the next chunk.

    Measured throughput and download times go through a 1-D CNN; buffer, last level, chunks left and the sizes of the
    next chunks through a scalar encoder.

    Args:
        backbone: The language model.
        optimizer: AdamW's settings.
        levels: Levels of the bitrate ladder (L).
        history: Samples of history in an observation (H), as the data gives them.
        lookahead: Chunks whose sizes are seen (A), as the data gives them; 0, and the published tokens, see the next.
        rescale: In training, standard deviation of the log of a random factor on throughput and sizes, one for a
            window: the session is the same, the chunks are larger for their nominal bitrate, as in other videos.
        noise: In training, in half of the windows, random factors on what is measured, as ``data.noise`` of tests; the
            standard deviation of their log is drawn for each of these windows between 0 and this.
        context: Steps that a decision sees, the current one included.
        objective: Learn hindsight values (``values``), or the actions of the experience (``imitation``).
        tokens: ``compact``: one token for the series, one for the rest. ``published``: as NetLLM, one token each for
            level, buffer, throughput, download times, sizes and chunks left.
        returns: Condition on the return to go.
        actions: Show earlier actions as tokens of their own.
        target_return: Return (sum of rewards) that is asked for in use.
        return_scale: Returns are divided by it.
        sample: Draw levels from the softmax of the scores instead of taking the best.
        width: Size of the encoders' hidden layers.
        head_width: Hidden layer of the head; null is a single linear layer.
        rollout_every: Validations between two evaluations by rollout.
    """

    monitor = "val/qoe"
    monitor_mode = "max"
    published_overlay = "configs/overlays/adaptive_bitrate/published_tokens.yaml"

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig | None = None,
        levels: int = 6,
        history: int = 10,
        lookahead: int = 5,
        rescale: float = 0.2,
        noise: float = 0.0,
        context: int = 20,
        objective: Objective = "values",
        tokens: Literal["compact", "published"] = "compact",
        returns: bool = False,
        actions: bool = False,
        target_return: float = 60.0,
        return_scale: float = 60.0,
        sample: bool = False,
        width: int = 128,
        head_width: int | None = 256,
        rollout_every: int = 1,
    ) -> None:
        super().__init__(
            backbone, optimizer, levels, context, objective, returns, actions, target_return, return_scale, sample,
            head_width, rollout_every,
        )  # fmt: skip
        assert self.backbone is not None
        self.levels, self.history, self.layout = levels, history, tokens
        at_least(0, "model.", noise=noise)
        self.rescale, self.noise = rescale, noise
        self.lookahead = lookahead if tokens == "compact" else 0
        d_model, scale = self.backbone.d_model, self.backbone.token_scale

        def series(channels: int, length: int) -> SeriesEncoder:
            return SeriesEncoder(channels, d_model, width, stride=length, scale=scale)

        def scalar(features: int) -> ScalarEncoder:
            return ScalarEncoder(features, d_model, width, scale)

        if tokens == "compact":
            self.encoders = nn.ModuleList([series(3, history), scalar((1 + max(1, lookahead)) * levels + 4)])
        else:
            self.encoders = nn.ModuleList(
                [scalar(levels), scalar(2), series(2, history), series(2, history), series(1, levels), scalar(2)]
            )

    def augment(self, batch: Batch) -> Batch:
        """Vary how large chunks are for their nominal bitrate, and what is measured."""
        return mismeasured(rescaled(batch, self.rescale), self.noise)

    def state(self, batch: Batch) -> Tensor:
        """Encode the observations of every step: (B, W, S, d_model)."""
        rows, shape = describe(batch, self.levels, self.history, self.lookahead), batch["level"].shape
        if self.layout == "compact":
            parts = [torch.cat([rows["throughput"], rows["delay"][..., :1]], dim=-1)]
            scalars = ("buffer", "level", "left")
            parts.append(torch.cat([*(rows[name] for name in scalars), rows["sizes"].flatten(1)], dim=-1).unsqueeze(1))
        else:
            parts = [rows["level"].unsqueeze(1), rows["buffer"].unsqueeze(1), rows["throughput"], rows["delay"]]
            parts += [rows["sizes"].transpose(1, 2), rows["left"].unsqueeze(1)]
        tokens = [encoder(part).values for encoder, part in zip(self.encoders, parts, strict=True)]
        joined: Tensor = torch.cat(tokens, dim=1).unflatten(0, shape)
        return joined


def describe(batch: Batch, levels: int, history: int, lookahead: int) -> dict[str, Tensor]:
    """Scale observations (B, W, ...) to numbers near one, rows (R = B W) first.

    Returns:
        ``level`` (R, L) one-hot; ``buffer`` (R, 2), the second one for what is left of the first 8 s, where stalls
        begin; ``throughput`` (R, H, 2), its logarithm, 0 at 1 Mbit/s, and which samples are real; ``delay`` (R, H, 2)
        likewise; ``sizes`` (R, A or 1, L) MB; ``left`` (R, 2), of 48 chunks and of the last 6.
    """
    check_columns(batch, OBSERVED)
    if lookahead and "upcoming_mb" not in batch:
        raise UserError(
            f"the data has no column upcoming_mb, the sizes of the chunks ahead; set data.lookahead to {lookahead}, or "
            "train with model.lookahead 0"
        )
    found = {"levels": batch["next_bytes"].shape[-1], "history": batch["throughput"].shape[-1]}
    found |= {"lookahead": batch["upcoming_mb"].shape[-2]} if lookahead else {}
    for name, value in {"levels": levels, "history": history, "lookahead": lookahead}.items():
        if found.get(name, value) != value:
            raise UserError(
                f"the data has {name} {found[name]}, the model {value}; train one with model.{name} {found[name]}"
            )
    flat = {name: batch[name].flatten(0, 1).float() for name in OBSERVED}
    real = (flat["throughput"] > 0).float()
    throughput = 0.5 * torch.log(8 * flat["throughput"] + 1e-3) * real  # MB/s to Mbit/s; links differ by factors
    delay = (flat["delay_s"] / 10).clamp(max=3.0)
    buffer, left = flat["buffer_s"], flat["chunks_left"]
    next_mb = (flat["next_bytes"] / 1e6).unsqueeze(1)
    return {
        "level": nn.functional.one_hot(flat["level"].long(), levels).float(),
        "buffer": torch.stack([buffer / 10, (buffer / 8 - 1).clamp(max=0.0)], dim=-1),
        "throughput": torch.stack([throughput, real], dim=-1),
        "delay": torch.stack([delay, real], dim=-1),
        "sizes": batch["upcoming_mb"].flatten(0, 1).float() if lookahead else next_mb,
        "left": torch.stack([left / 48, (left / 6).clamp(max=1.0)], dim=-1),
    }


def rescaled(batch: Batch, deviation: float) -> Batch:
    """Multiply throughput and sizes of each window (B, W, ...) by one random factor: nothing takes longer for it."""
    sized = [name for name in ("throughput", "next_bytes", "upcoming_mb") if name in batch]
    factor = torch.exp(deviation * torch.randn(len(batch["level"]), device=batch["level"].device))
    return batch | {name: batch[name] * factor.view(-1, *[1] * (batch[name].dim() - 1)) for name in sized}


def mismeasured(batch: Batch, largest: float) -> Batch:
    """Multiply the throughputs of half of the windows (B, W, H), and divide the times, by random factors.

    A chunk keeps its factor in all observations of the window that remember it.
    """
    if not largest:
        return batch
    windows, steps, history = batch["throughput"].shape
    drawn = torch.rand(2, windows, 1, device=batch["throughput"].device)
    deviation = torch.where(drawn[0] < 0.5, largest * drawn[1], 0.0)
    logs = deviation * torch.randn(windows, steps + history - 1, device=deviation.device)
    factor = torch.exp(logs).unfold(1, history, 1)
    return batch | {"throughput": batch["throughput"] * factor, "delay_s": batch["delay_s"] / factor}
