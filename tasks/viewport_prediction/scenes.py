"""Generated 360-degree scenes: objects on smooth paths, which of them is lit, and equirectangular pictures of it.

Shapes: V videos, S samples, O objects. Directions are unit vectors:
x at yaw 0, y at yaw 90 degrees, z up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]

PALETTE = np.array([[200, 40, 40], [40, 160, 60], [50, 70, 200], [160, 50, 170], [30, 150, 160], [180, 110, 40]])
"""Colours of objects, 0 to 255; none is near the colour of light."""

LIGHT = np.array([255.0, 250.0, 200.0])
"""Colour of the lit object."""

RADIUS, LIT_RADIUS = 7.0, 12.0
"""Angular size of an object in degrees (standard deviation of its blob), and when lit."""

STAGE = 220.0
"""Degrees in yaw over which objects start, somewhere around the viewer: videos have a front, another one in each."""

MIN_GAP = 4.2
"""Seconds for which a lit object stays lit at least: longer than any viewer needs to react."""


@dataclass(frozen=True)
class Scenes:
    """What happens in every video.

    Attributes:
        times: (S,) seconds of the viewport samples.
        directions: (V, S, O, 3) unit vectors to the objects.
        lit: (V, S) index of the lit object.
        event: (V, S) number of the event that lit it, 0 for the first.
        since: (V, S) seconds since then.
    """

    times: Array
    directions: Array
    lit: NDArray[np.int64]
    event: NDArray[np.int64]
    since: Array


def make_scenes(rng: Generator, videos: int, objects: int, times: Array, gap: float) -> Scenes:
    """Draw the paths of the objects and the instants at which another one lights up.

    Args:
        rng: Source of randomness.
        videos: Number of scenes.
        objects: Objects in each.
        times: (S,) seconds.
        gap: Mean seconds between two instants.
    """
    directions = _paths(rng, videos, objects, times)
    count = int(times[-1] / MIN_GAP) + 2
    gaps = MIN_GAP + rng.exponential(gap - MIN_GAP, (videos, count))
    # Videos start somewhere inside a lit period, so that events of different videos do not fall together.
    instants = np.cumsum(gaps, axis=1) - rng.uniform(0.0, MIN_GAP, (videos, 1))
    # Each event lights another object than the one before.
    jumps = rng.integers(1, objects, (videos, count + 1))
    order = np.cumsum(jumps, axis=1) % objects
    event = (instants[:, None, :] <= times[None, :, None]).sum(axis=2)
    start = np.take_along_axis(np.concatenate([np.full((videos, 1), -60.0), instants], axis=1), event, axis=1)
    lit = np.take_along_axis(order, event, axis=1)
    return Scenes(times, directions, lit, event, times - start)


def _paths(rng: Generator, videos: int, objects: int, times: Array) -> Array:
    """Let each object drift along its own great circle, not far from the horizon, at a gently changing speed."""
    shape = (videos, objects)
    # Apart from each other, so that lighting up another object asks for a real turn of the head.
    slots = np.argsort(rng.random(shape), axis=1) * (STAGE / objects)
    start = np.radians(slots + rng.normal(0.0, STAGE / objects / 6, shape) + rng.uniform(0.0, 360.0, (videos, 1)))
    speed = np.radians(rng.uniform(1.0, 6.0, shape) * rng.choice([-1.0, 1.0], shape))
    swing = np.radians(rng.uniform(2.0, 8.0, shape))
    pace = 2 * np.pi / rng.uniform(10.0, 25.0, shape)
    tilt = np.radians(rng.uniform(3.0, 25.0, shape))
    node = rng.uniform(0.0, 2 * np.pi, shape)
    clock = times[None, :, None]
    phase = (start - node)[:, None] + speed[:, None] * clock + swing[:, None] * np.sin(pace[:, None] * clock)
    ahead, side = np.cos(phase), np.sin(phase) * np.cos(tilt)[:, None]
    up = np.sin(phase) * np.sin(tilt)[:, None]
    turn_cos, turn_sin = np.cos(node)[:, None], np.sin(node)[:, None]
    return np.stack([ahead * turn_cos - side * turn_sin, ahead * turn_sin + side * turn_cos, up], axis=-1)


def pixel_directions(height: int, width: int) -> Array:
    """Return (height, width, 3) unit vectors of the pixel centres: yaw -180 to 180, pitch 90 to -90."""
    yaw = np.radians((np.arange(width) + 0.5) / width * 360.0 - 180.0)
    pitch = np.radians(90.0 - (np.arange(height) + 0.5) / height * 180.0)[:, None]
    up = np.broadcast_to(np.sin(pitch), (height, width))
    return np.stack([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), up], axis=-1)


def render(rng: Generator, scenes: Scenes, height: int, width: int, every: int) -> NDArray[np.uint8]:
    """Paint every ``every``-th sample.

    Blobs are painted by angular distance, which gives the wrap in yaw and the stretching towards the poles for free.

    Returns:
        (V, frames, height, width, 3) uint8.
    """
    pixels = pixel_directions(height, width).reshape(-1, 3)
    frames = []
    for directions, lit in zip(scenes.directions[:, ::every], scenes.lit[:, ::every], strict=True):
        picture = np.broadcast_to(_background(rng, pixels), (len(directions), len(pixels), 3)).astype(np.float32)
        colours = PALETTE[rng.permutation(len(PALETTE))]
        for number in range(directions.shape[1]):
            _paint(picture, pixels, directions[:, number], RADIUS, 0.85 * colours[number % len(colours)])
        _paint(picture, pixels, directions[np.arange(len(lit)), lit], LIT_RADIUS, LIGHT)
        frames.append(np.rint(picture).astype(np.uint8).reshape(-1, height, width, 3))
    return np.stack(frames)


def _background(rng: Generator, pixels: Array) -> Array:
    """Return a dark (pixels, 3) texture of random waves over the sphere, without a seam."""
    waves = rng.normal(0.0, 4.0, (6, 3))
    tint = rng.uniform(-1.0, 1.0, (6, 3))
    texture = np.sin(pixels @ waves.T + rng.uniform(0.0, 2 * np.pi, 6)) @ tint
    return np.asarray(np.clip(rng.uniform(50.0, 90.0, 3) + 12.0 * texture, 10.0, 140.0))


def _paint(picture: NDArray[np.float32], pixels: Array, direction: Array, radius: float, colour: Array) -> None:
    """Blend one blob a frame into (frames, pixels, 3) in place."""
    sharpness = np.float32(np.degrees(1.0) / radius) ** 2
    cosine = direction.astype(np.float32) @ pixels.T.astype(np.float32)
    # For small angles exp(sharpness (cos - 1)) is a Gaussian; the gain gives the blob a full core.
    opacity = np.minimum(np.float32(1.0), np.float32(1.5) * np.exp(sharpness * (cosine - np.float32(1.0))))
    picture += opacity[..., None] * (colour.astype(np.float32) - picture)
