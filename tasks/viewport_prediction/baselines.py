"""Hand-written viewport predictors, and the errors that all policies are judged by.

Shapes: N windows, T samples of history, H samples of horizon, 3 angles (roll, pitch, yaw) in degrees at 5 Hz.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from netllm_pl.errors import UserError

Array = NDArray[np.float64]
Angles = NDArray[np.floating[Any]]


def wrap(angle: Angles) -> Array:
    """Bring degrees into [-180, 180)."""
    return (np.asarray(angle, dtype=np.float64) + 180.0) % 360.0 - 180.0


def unwrap_relative(history: Angles) -> Array:
    """Return (N, T, 3) motion relative to the last sample (zero there), unwrapped: no jump at +-180."""
    steps = wrap(np.diff(np.asarray(history, dtype=np.float64), axis=1))
    to_last = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([-to_last, np.zeros((len(history), 1, history.shape[2]))], axis=1)


def future_relative(history: Angles, future: Angles) -> Array:
    """Return (N, H, 3) motion of the future relative to the last sample of the history, unwrapped step by step."""
    path = np.concatenate([history[:, -1:], future], axis=1).astype(np.float64)
    return np.cumsum(wrap(np.diff(path, axis=1)), axis=1)


def circular_error(prediction: Angles, truth: Angles) -> Array:
    """Return the absolute error in degrees on the circle, elementwise: the least over one turn more, less, or none.

    As in the published metric, a prediction that ran more than one and a half turns away is not brought back:
    policies on unwrapped angles had better wrap what they predict.
    """
    error = np.abs(np.asarray(prediction, dtype=np.float64) - truth)
    return np.minimum(error, np.abs(error - 360.0))


def window_errors(prediction: Angles, truth: Angles) -> dict[str, Array]:
    """Judge predictions.

    Args:
        prediction: (N, H, 3) degrees, wrapped or not.
        truth: (N, H, 3) degrees.

    Returns:
        Columns of one number a window (N,): mean absolute error over steps and angles (``mae_deg``), over steps for
        each angle (``mae_roll_deg``, ``mae_pitch_deg``, ``mae_yaw_deg``), and mean squared error (``mse_deg2``).
    """
    error = circular_error(prediction, truth)
    roll, pitch, yaw = error.mean(axis=1).T
    return {
        "mae_deg": error.mean(axis=(1, 2)),
        "mae_roll_deg": roll,
        "mae_pitch_deg": pitch,
        "mae_yaw_deg": yaw,
        "mse_deg2": np.square(error).mean(axis=(1, 2)),
    }


class Static:
    """Holds the last sample: the baseline to beat."""

    def predict(self, history: Angles, horizon: int) -> Array:
        """Predict (N, horizon, 3) degrees from (N, T, 3) degrees."""
        return np.repeat(history[:, -1:].astype(np.float64), horizon, axis=1)


class LinearRegression:
    """Fits a line in time to each raw angle of the history and extends it, as the published code does.

    Raw angles jump at +-180; that is kept on purpose, as published numbers include it.
    """

    def predict(self, history: Angles, horizon: int) -> Array:
        """Predict (N, horizon, 3) degrees from (N, T, 3) degrees."""
        samples = history.shape[1]
        past = np.stack([np.ones(samples), np.arange(samples)])
        ahead = np.stack([np.ones(horizon), np.arange(samples, samples + horizon)])
        # Least squares is linear in the angles: one (horizon, T) matrix serves all windows.
        weights = ahead.T @ np.linalg.pinv(past.T)
        return np.asarray(weights @ history.astype(np.float64))


class Velocity:
    """Goes on at the mean velocity of the history, on raw angles as the published code does."""

    def predict(self, history: Angles, horizon: int) -> Array:
        """Predict (N, horizon, 3) degrees from (N, T, 3) degrees."""
        raw = history.astype(np.float64)
        velocity = (raw[:, -1:] - raw[:, :1]) / max(1, raw.shape[1] - 1)
        steps = np.arange(1, horizon + 1)[:, None]
        return np.asarray(raw[:, -1:] + steps * velocity)


class Ridge:
    """Linear model from past to future motion, both relative to the last sample and unwrapped; penalised least squares.

    Args:
        penalty: Squared-weight penalty in units of the mean square of a feature, times the number of windows.
    """

    def __init__(self, penalty: float = 1e-3) -> None:
        if penalty < 0:
            raise UserError(f"ridge penalty: {penalty} is negative; expected 0 or more")
        self.penalty = penalty
        self.weights: Array | None = None
        self.samples = 0

    def fit(self, history: Angles, future: Angles) -> Self:
        """Learn from (N, T, 3) history and (N, H, 3) future, degrees."""
        features = self._features(unwrap_relative(history))
        target = future_relative(history, future).reshape(len(future), -1)
        gram = features.T @ features
        scale = np.trace(gram) / max(1, len(gram))
        strength = np.full(len(gram), self.penalty * scale)
        # The constant is not penalised.
        strength[-1] = 0.0
        self.weights = np.asarray(np.linalg.solve(gram + np.diag(strength), features.T @ target), dtype=np.float64)
        self.samples = history.shape[1]
        return self

    def predict(self, history: Angles, horizon: int) -> Array:
        """Predict (N, horizon, 3) wrapped degrees from (N, T, 3) degrees; steps past the fitted horizon are held.

        Raises:
            UserError: Not fitted, or the history is shorter than the one fitted on (a longer one is cut).
        """
        if self.weights is None:
            raise UserError("ridge is not fitted: call fit on training windows first")
        if history.shape[1] < self.samples:
            raise UserError(f"ridge was fitted on {self.samples} samples of history, got {history.shape[1]}")
        recent = history[:, -self.samples :]
        motion = (self._features(unwrap_relative(recent)) @ self.weights).reshape(len(recent), -1, 3)
        steps = np.minimum(np.arange(horizon), motion.shape[1] - 1)
        return wrap(recent[:, -1:].astype(np.float64) + motion[:, steps])

    @staticmethod
    def _features(motion: Array) -> Array:
        """Return (N, 3 (T - 1) + 1): motion without its last sample, which is zero, and a constant."""
        flat = motion[:, :-1].reshape(len(motion), -1)
        return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
