"""Learned baselines without a language model, trained through the same command line.

Shapes: B batch, T history samples, H horizon samples, P pictures; angles are (roll, pitch, yaw) in degrees.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from netllm_pl.data import Batch
from netllm_pl.task import OptimizerConfig
from tasks.viewport_prediction.model import ViewportModel, wrap
from tasks.viewport_prediction.windows import Disturbance

MOTION = 30.0  # degrees: scale of inputs and outputs


class ViewportGRU(ViewportModel):
    """A gated recurrent network reads motion relative to the last sample; a linear layer gives the whole horizon.

    Args:
        optimizer: AdamW's settings.
        history: Samples read.
        horizon: Samples predicted.
        objective: Training loss.
        rotate: Random yaw in training; without effect here, the input is relative.
        mirror: Mirror windows at random in training.
        stretch: Scale motion at random by up to that share in training.
        mirror_average: Average the predictions of a window and its mirror image.
        disturb: Noise and gaps in the histories of training.
        reverse: Run half of the windows backwards in training.
        width: Size of the recurrent state.
        layers: Recurrent layers.
    """

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        history: int = 10,
        horizon: int = 20,
        objective: Literal["l1", "mse"] = "l1",
        rotate: float = 180.0,
        mirror: bool = False,
        stretch: float = 0.0,
        mirror_average: bool = False,
        disturb: Disturbance | None = None,
        reverse: bool = False,
        width: int = 128,
        layers: int = 1,
    ) -> None:
        super().__init__(
            None, optimizer, history, horizon, objective, rotate, mirror, stretch, mirror_average, disturb, reverse
        )
        self.gru = nn.GRU(8, width, layers, batch_first=True)
        self.out = nn.Linear(width, 3 * horizon)

    def extrapolate(self, batch: Batch) -> Tensor:
        """Predict (B, horizon, 3) degrees."""
        angles, last = self.read(batch)
        step = torch.diff(angles, dim=1, prepend=angles[:, :1])
        features = torch.cat([(angles - last) / MOTION, step / 5, angles[..., :2] / 45], dim=-1)
        _, state = self.gru(features)
        motion: Tensor = self.out(state[-1]).unflatten(-1, (self.horizon, 3)) * MOTION
        return last + motion


class ViewportTRACK(ViewportModel):
    """TRACK (Romero Rondon et al., IEEE TPAMI 2022, arXiv:2007.00379): a position LSTM and a saliency LSTM, fused.

    The encoder reads positions and saliency of the past; the decoder feeds each predicted position back. Unlike the
    published re-implementation it never sees the true first future sample. Positions are unit vectors of yaw and
    pitch; roll, which TRACK does not model, moves with a linear layer of its own. Saliency is the contrast of the
    picture at the last sample, and zero where there is none.

    Args:
        optimizer: AdamW's settings.
        history: Samples read.
        horizon: Samples predicted.
        objective: Training loss.
        rotate: Random yaw of up to that many degrees in training.
        mirror: Mirror windows at random in training.
        stretch: Scale motion at random by up to that share in training.
        mirror_average: Average the predictions of a window and its mirror image.
        disturb: Noise and gaps in the histories of training.
        reverse: Run half of the windows backwards in training.
        width: Size of the LSTMs' states.
        saliency: Rows and columns of the saliency map, centred on the viewer's yaw.
    """

    def __init__(
        self,
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
        width: int = 128,
        saliency: tuple[int, int] = (16, 32),
    ) -> None:
        super().__init__(
            None, optimizer, history, horizon, objective, rotate, mirror, stretch, mirror_average, disturb, reverse
        )
        self.saliency = saliency
        self.position = nn.LSTM(4, width, batch_first=True)
        self.content = nn.LSTM(saliency[0] * saliency[1], width, batch_first=True)
        self.fuse = nn.LSTM(2 * width, width, batch_first=True)
        self.out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def extrapolate(self, batch: Batch) -> Tensor:
        """Predict (B, horizon, 3) degrees, one step after another."""
        angles, last = self.read(batch)
        saliency = self._saliency(batch, last)
        _, content = self.content(saliency[:, None])
        states, position = self.position(self._vector(angles, last))
        _, fused = self.fuse(torch.cat([states, content[0][-1][:, None].expand_as(states)], dim=-1))
        sample, predictions = last, []
        for _ in range(self.horizon):
            state, position = self.position(self._vector(sample, last), position)
            seen, content = self.content(saliency[:, None], content)
            joint, fused = self.fuse(torch.cat([state, seen], dim=-1), fused)
            sample = sample + self.out(joint) * 5  # degrees a step at the scale of head motion
            predictions.append(sample)
        return torch.cat(predictions, dim=1)

    @staticmethod
    def _vector(angles: Tensor, last: Tensor) -> Tensor:
        """Unit vector of (yaw relative to the last sample, pitch), and roll: (B, T, 4)."""
        yaw, pitch = torch.deg2rad(angles[..., 2] - last[..., 2]), torch.deg2rad(angles[..., 1])
        vector = [pitch.cos() * yaw.cos(), pitch.cos() * yaw.sin(), pitch.sin(), angles[..., 0] / 45]
        return torch.stack(vector, dim=-1)

    def _saliency(self, batch: Batch, last: Tensor) -> Tensor:
        """Contrast to the picture's mean colour on a grid centred on the viewer: (B, rows * columns)."""
        rows, columns = self.saliency
        if "pictures" not in batch:
            return last.new_zeros(last.shape[0], rows * columns)
        picture = batch["pictures"][:, -1].float() / 255
        contrast = (picture - picture.mean(dim=(1, 2), keepdim=True)).abs().mean(-1)
        yaw = torch.linspace(-180, 180, columns + 1, device=last.device)[:-1] + last[:, 0, 2:3]
        frame = batch.get("frame")
        if frame is not None:
            yaw = frame[:, :1] * (yaw - frame[:, 1:])  # back to the picture's own yaw
        x = wrap(yaw)[:, None].expand(-1, rows, -1) / 180
        y = torch.linspace(-1, 1, rows, device=last.device)[None, :, None].expand_as(x)
        grid = torch.stack([x, y], dim=-1)
        seen = torch.nn.functional.grid_sample(contrast[:, None], grid, align_corners=False, padding_mode="border")
        return seen.flatten(1)
