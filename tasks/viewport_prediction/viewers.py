"""Generated viewers: heads that turn to the lit object a reaction time later, with the inertia of real ones.

Shapes: V videos, U viewers, S samples.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.viewport_prediction.scenes import Array, Scenes

REACTION = (0.3, 1.2)
"""Shortest and longest time in seconds between a cue and the start of the turn."""

DISTRACTED = (0.5, 2.8)
"""Seconds that a distracted viewer takes longer; reaction and this together stay below ``scenes.MIN_GAP``."""

SUBSTEPS = 10
"""Steps of the head's motion a sample: at 50 Hz the motion is stable up to its top speed."""

GLANCE_RATE, GLANCE_SECONDS = 0.04, (0.8, 3.0)
"""Looks away from the object: how often a second, and how long."""


def watch(
    rng: Generator, scenes: Scenes, users: int, interval: float, distracted: float, ignore: float, noise: float
) -> NDArray[np.float32]:
    """Let viewers watch all videos.

    Args:
        rng: Source of randomness.
        scenes: What happens.
        users: Viewers; each has the same character in all videos.
        interval: Seconds between samples.
        distracted: Probability of noticing a cue late.
        ignore: Probability of not following a cue at all.
        noise: Standard deviation of the slow wandering in yaw, degrees.

    Returns:
        (V, U, S, 3) roll, pitch, yaw in degrees, yaw in [-180, 180).
    """
    focus = _focus(rng, scenes, users, distracted, ignore)
    aim_yaw, aim_pitch = _aims(rng, scenes, focus, interval, noise)
    swiftness = rng.uniform(4.0, 7.0, (1, users))
    yaw, velocity = _follow(aim_yaw, swiftness, rng.uniform(120.0, 200.0, (1, users)), interval, turning=True)
    pitch, _ = _follow(aim_pitch, swiftness, np.full((1, users), 90.0), interval, turning=False)
    # Heads lean into a turn; each viewer by another amount, around another rest position.
    lean = rng.normal(0.06, 0.02, (1, users, 1))
    rest = rng.normal(0.0, 2.0, (len(focus), users, 1))
    roll = rest - lean * velocity + _wander(rng, yaw.shape, interval, 0.5 * noise, 2.0)
    tremor = rng.normal(0.0, 0.05 * noise, (*yaw.shape, 3))
    angles = np.stack([roll, pitch, yaw], axis=-1) + tremor
    angles[..., 1] = np.clip(angles[..., 1], -90.0, 90.0)
    angles[..., 2] = (angles[..., 2] + 180.0) % 360.0 - 180.0
    return angles.astype(np.float32)


def _focus(rng: Generator, scenes: Scenes, users: int, distracted: float, ignore: float) -> NDArray[np.int64]:
    """Return (V, U, S) the object that each viewer attends to: the lit one, after a reaction time, if not ignored."""
    videos, samples = scenes.lit.shape
    events = int(scenes.event.max()) + 1
    habit = rng.uniform(*REACTION, (1, users, 1))
    delay = np.clip(habit + rng.normal(0.0, 0.15, (videos, users, events)), *REACTION)
    late = rng.random(delay.shape) < distracted
    delay += late * rng.uniform(*DISTRACTED, delay.shape)
    follows = rng.random((videos, users, events)) >= ignore
    follows[..., 0] = True
    event = np.broadcast_to(scenes.event[:, None], (videos, users, samples))
    waiting = scenes.since[:, None] < np.take_along_axis(delay, event, axis=2)
    # An event lasts longer than a reaction, so a viewer who still waits attends to the event before, if followed.
    noticed = np.maximum(event - waiting, 0)
    last = np.maximum.accumulate(np.where(follows, np.arange(events), 0), axis=2)
    attended = np.take_along_axis(last, noticed, axis=2)
    return np.take_along_axis(
        np.broadcast_to(_object_of(scenes, events)[:, None], (videos, users, events)), attended, 2
    )


def _object_of(scenes: Scenes, events: int) -> NDArray[np.int64]:
    """Return (V, events) which object each event lights."""
    table = np.zeros((len(scenes.lit), events), dtype=np.int64)
    table[np.arange(len(scenes.lit))[:, None], scenes.event] = scenes.lit
    return table


def _aims(
    rng: Generator, scenes: Scenes, focus: NDArray[np.int64], interval: float, noise: float
) -> tuple[Array, Array]:
    """Return (V, U, S) where each head wants to point, yaw and pitch: near its object, or away in a glance."""
    directions = np.moveaxis(scenes.directions, 2, 1)
    target = np.take_along_axis(directions, focus[..., None], axis=1)
    shape = focus.shape
    yaw = np.degrees(np.arctan2(target[..., 1], target[..., 0]))
    # The eyes do part of the work up and down, so heads stay nearer to the horizon than what they look at.
    gain = rng.uniform(0.5, 0.8, (1, shape[1], 1))
    pitch = gain * np.degrees(np.arcsin(np.clip(target[..., 2], -1.0, 1.0)))
    habit = rng.normal(0.0, 3.0, (2, 1, shape[1], 1))
    yaw += habit[0] + _wander(rng, shape, interval, noise, 1.5) + _glances(rng, shape, interval)
    pitch += habit[1] + _wander(rng, shape, interval, 0.6 * noise, 1.5)
    return yaw, pitch


def _glances(rng: Generator, shape: tuple[int, ...], interval: float) -> Array:
    """Return (V, U, S) degrees in yaw that a viewer looks aside: zero but for short whiles."""
    starts = rng.random(shape) < GLANCE_RATE * interval
    length = rng.integers(round(GLANCE_SECONDS[0] / interval), round(GLANCE_SECONDS[1] / interval) + 1, shape)
    aside = rng.uniform(20.0, 60.0, shape) * rng.choice([-1.0, 1.0], shape)
    clock = np.arange(shape[-1])
    begun = np.maximum.accumulate(np.where(starts, clock, -1), axis=-1)
    place = np.maximum(begun, 0)
    lasting = (begun >= 0) & (clock - begun < np.take_along_axis(length, place, axis=-1))
    return np.where(lasting, np.take_along_axis(aside, place, axis=-1), 0.0)


def _wander(rng: Generator, shape: tuple[int, ...], interval: float, deviation: float, memory: float) -> Array:
    """Return Ornstein-Uhlenbeck noise along the last axis; standard deviation in degrees, memory in seconds."""
    keep = np.exp(-interval / memory)
    fresh = rng.normal(0.0, deviation, shape)
    fresh[..., 1:] *= np.sqrt(1.0 - keep**2)
    for sample in range(1, shape[-1]):
        fresh[..., sample] += keep * fresh[..., sample - 1]
    return fresh


def _follow(aim: Array, swiftness: Array, top_speed: Array, interval: float, turning: bool) -> tuple[Array, Array]:
    """Move heads after their aims: critically damped, with a top speed.

    Args:
        aim: (V, U, S) degrees.
        swiftness: (1, U) natural frequency of the head, rad/s; it lags a moving target by 2 / swiftness seconds.
        top_speed: (1, U) degrees a second.
        interval: Seconds between samples.
        turning: The angle is on the circle: take the shorter way.

    Returns:
        (V, U, S) angle (not wrapped) and velocity.
    """
    step = interval / SUBSTEPS
    angle, speed = aim[..., 0].copy(), np.zeros_like(aim[..., 0])
    angles, speeds = [], []
    for sample in range(aim.shape[-1]):
        angles.append(angle.copy())
        speeds.append(speed.copy())
        for _ in range(SUBSTEPS):
            offset = aim[..., sample] - angle
            if turning:
                offset = (offset + 180.0) % 360.0 - 180.0
            speed += step * (swiftness**2 * offset - 2.0 * swiftness * speed)
            speed = np.clip(speed, -top_speed, top_speed)
            angle += step * speed
    return np.stack(angles, axis=-1), np.stack(speeds, axis=-1)
