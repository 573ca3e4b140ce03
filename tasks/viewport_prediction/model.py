"""What every learned viewport predictor shares: angles on the circle, loss, metrics, horizons.

Shapes: B batch, T history samples, H horizon samples; the last axis is (roll, pitch, yaw) in degrees.
"""

from abc import abstractmethod
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from netllm_pl.backbone import BackboneConfig
from netllm_pl.data import Batch
from netllm_pl.errors import UserError
from netllm_pl.processes import mean
from netllm_pl.task import NetTask, OptimizerConfig, check_columns
from tasks.viewport_prediction.windows import Disturbance, held

ANGLES = ("roll", "pitch", "yaw")


def wrap(degrees: Tensor) -> Tensor:
    """Bring angles to [-180, 180)."""
    return (degrees + 180) % 360 - 180


def mirrored(angles: Tensor) -> Tensor:
    """Exchange left and right in angles (..., 3)."""
    roll, pitch, yaw = angles.unbind(-1)
    return torch.stack([-roll, pitch, -yaw], dim=-1)


def unwrapped(angles: Tensor) -> Tensor:
    """Undo the jumps at +-180: (B, T, 3) angles that start at the first sample and change by less than 180 a step."""
    return torch.cat([angles[:, :1], angles[:, :1] + wrap(angles.diff(dim=1)).cumsum(1)], dim=1)


def with_mirror(batch: Batch) -> Batch:
    """Windows (B) and behind them their mirror images, left and right exchanged: (2 B).

    Pictures stay as they are; `frame` says that their yaw y is -y in the mirror.
    """
    history = batch["history"]
    one = torch.ones_like(history[:, 0, 0])
    frame = batch.get("frame", torch.stack([one, torch.zeros_like(one)], dim=-1))
    image = {"history": mirrored(history), "frame": -frame}
    both = {**batch, "frame": frame}
    return {name: torch.cat([value, image.get(name, value)]) for name, value in both.items()}


class CircularError(Metric):
    """Mean error on the circle in degrees over windows, steps and angles.

    Args:
        angle: Index of one angle; None takes all three.
        squared: Root mean square instead of mean absolute.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, angle: int | None = None, squared: bool = False) -> None:
        super().__init__()
        self.angle, self.squared = angle, squared
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add windows (B, H, 3)."""
        error = wrap(prediction - truth)
        error = error if self.angle is None else error[..., self.angle]
        self.total += (error.square() if self.squared else error.abs()).double().sum()
        self.count += error.numel()

    def compute(self) -> Tensor:
        """Return the error so far."""
        mean = self.total / self.count
        return (mean.sqrt() if self.squared else mean).float()


class ViewportModel(NetTask):
    """Base of the task and its learned baselines: predicts (B, horizon, 3) degrees from (B, T, 3) degrees.

    Args:
        backbone: The language model; null for a baseline.
        optimizer: AdamW's settings.
        history: Samples read; a longer history is cut to its end, a shorter one is extended by its first sample.
        horizon: Samples predicted in one pass; beyond them the last prediction is held.
        objective: Training loss in degrees on the circle: mean absolute (l1) or mean squared (mse) error.
        rotate: Training turns each window by a random yaw of up to that many degrees.
        mirror: Training mirrors windows left to right at random.
        stretch: Training scales the motion of each window by a random factor in [1 - stretch, 1 + stretch].
        mirror_average: Outside training, predict each window and its mirror image, in one pass of a doubled batch, and
            take the mean; it costs twice the computation.
        disturb: Noise and gaps in the histories of training; null leaves them as they are.
        reverse: Training runs half of the windows without pictures backwards in time.
    """

    monitor = "val/mae_deg"
    answer_columns = ("roll", "pitch", "yaw")

    def __init__(
        self,
        backbone: BackboneConfig | None = None,
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
    ) -> None:
        super().__init__(backbone, optimizer)
        if history < 2 or horizon < 1:
            raise UserError(f"model: history is {history} and horizon {horizon}; at least 2 and 1 are needed")
        self.history, self.horizon = history, horizon
        self.objective, self.rotate, self.mirror, self.stretch = objective, rotate, mirror, stretch
        self.mirror_average = mirror_average
        self.disturb, self.reverse = disturb, reverse
        self.told: dict[str, npt.NDArray[np.float64]] = {}
        """Columns (B,) about the last prediction, for episodes.parquet: such as whether it was valid."""

    @abstractmethod
    def extrapolate(self, batch: Batch) -> Tensor:
        """Predict (B, horizon, 3) degrees; by the language model if a task does not say otherwise."""
        predicted: Tensor = super().forward(batch)
        return predicted

    def forward(self, batch: Batch) -> Tensor:
        """Predict (B, horizon, 3) degrees; outside training, with `mirror_average`, as the mean of two views."""
        check_columns(batch, ("history",))
        if self.training or not self.mirror_average:
            return self.extrapolate(batch)
        seen, reflected = self.extrapolate(with_mirror(batch)).chunk(2)
        return seen + wrap(mirrored(reflected) - seen) / 2

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the unwrapped history (B, history, 3) and its last sample (B, 1, 3)."""
        angles = batch["history"]
        short = self.history - angles.shape[1]
        if short > 0:
            angles = torch.cat([angles[:, :1].expand(-1, short, -1), angles], dim=1)
        angles = unwrapped(angles[:, -self.history :])
        return angles, angles[:, -1:]

    def future(self, prediction: Tensor, steps: int) -> Tensor:
        """Cut or extend a prediction to a number of steps; the last one is held."""
        if steps <= prediction.shape[1]:
            return prediction[:, :steps]
        return torch.cat([prediction, prediction[:, -1:].expand(-1, steps - prediction.shape[1], -1)], dim=1)

    def predict(self, batch: Batch, horizon: int) -> Tensor:
        """Predict (B, horizon, 3) degrees, whatever horizon the model was trained for."""
        return self.future(self(batch), horizon)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Error on the circle over the steps that both have."""
        steps = min(prediction.shape[1], batch["future"].shape[1])
        error = wrap(prediction[:, :steps] - batch["future"][:, :steps])
        return mean(error.abs() if self.objective == "l1" else error.square())

    def build_metrics(self) -> MetricCollection:
        """Mean absolute error overall and per angle, and root mean square error, in degrees."""
        each: dict[str, Metric] = {f"mae_{name}_deg": CircularError(i) for i, name in enumerate(ANGLES)}
        metrics: dict[str, Metric] = {"mae_deg": CircularError(), **each, "rmse_deg": CircularError(squared=True)}
        return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]  # dict is invariant there

    def update_metrics(self, metrics: MetricCollection, prediction: Tensor, batch: Batch) -> None:
        """Compare with the whole future."""
        metrics.update(self.future(prediction, batch["future"].shape[1]), batch["future"])

    @staticmethod
    def _motion(angles: Tensor, last: Tensor, name: str) -> Tensor:
        """Unwrapped motion relative to the last history sample, of the history or of the future."""
        if name == "history":
            angles = unwrapped(angles)
            return angles - angles[:, -1:]
        return unwrapped(torch.cat([last, angles], dim=1))[:, 1:] - last

    def augment(self, batch: Batch) -> Batch:
        """Turn windows around the vertical axis and mirror them, pictures with them; reverse and disturb them.

        `frame` (B, 2) keeps what was done: a picture's yaw y becomes sign * y + turn.
        """
        check_columns(batch, ("history",))
        if self.reverse and "pictures" not in batch:  # a picture would be of another time
            batch = self._reversed(batch)
        history = batch["history"]
        size, device = history.shape[0], history.device
        turn = (torch.rand(size, device=device) * 2 - 1) * self.rotate
        sign = torch.ones(size, device=device)
        if self.mirror:
            sign = torch.where(torch.rand(size, device=device) < 0.5, sign, -sign)
        factor = torch.stack([sign, torch.ones_like(sign), sign], dim=-1)[:, None]
        shift = torch.stack([0 * turn, 0 * turn, turn], dim=-1)[:, None]
        last = history[:, -1:]
        gain = 1 + (torch.rand(size, 1, 1, device=device) * 2 - 1) * self.stretch
        turned = {
            name: wrap((last + gain * self._motion(batch[name], last, name)) * factor + shift)
            for name in ("history", "future")
        }
        if self.disturb is not None:
            turned["history"] = self._disturbed(turned["history"], self.disturb)
        return {**batch, **turned, "frame": torch.stack([sign, turn], dim=-1)}

    @staticmethod
    def _reversed(batch: Batch) -> Batch:
        path, seen = torch.cat([batch["history"], batch["future"]], dim=1), batch["history"].shape[1]
        backwards = torch.rand(len(path), 1, 1, device=path.device) < 0.5
        path = torch.where(backwards, path.flip(1), path)
        return {**batch, "history": path[:, :seen], "future": path[:, seen:]}

    @staticmethod
    def _disturbed(history: Tensor, disturb: Disturbance) -> Tensor:
        def strength(largest: float) -> Tensor:  # (B, 1)
            drawn = torch.rand(2, len(history), 1, device=history.device)
            return torch.where(drawn[0] < disturb.share, largest * drawn[1], 0.0)

        noise = strength(disturb.noise_deg).unsqueeze(-1) * torch.randn_like(history)
        there = torch.rand_like(history[..., 0]) >= strength(disturb.missing)
        return held(wrap(history + noise), there)
