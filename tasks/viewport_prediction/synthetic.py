"""The built-in generator: 360-degree scenes whose viewers follow the object that lights up, and their pictures.

Which object is lit changes at random instants, and a viewer turns to it a reaction time later. For that long the past
motion does not tell what comes, and the current picture does. Shapes: V videos, U viewers, S samples, O objects.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netllm_pl.errors import UserError
from tasks.viewport_prediction.scenes import MIN_GAP, Scenes, make_scenes, render
from tasks.viewport_prediction.traces import Traces, assemble
from tasks.viewport_prediction.viewers import watch

RATE = 5.0
"""Viewport samples a second."""


@dataclass(frozen=True)
class Synthetic:
    """Size and character of the generated data.

    Attributes:
        videos: Number of videos; at least 3, as splits share none.
        users: Number of viewers; at least 3. Every viewer watches every video.
        seconds: Length of a video.
        objects: Moving objects in a scene; at least 2.
        picture_height: Pixels from pole to pole.
        picture_width: Pixels around; usually twice the height.
        picture_every: Samples (of 0.2 s) between pictures; with 1 every sample has its own picture.
        gap: Mean seconds between two moments at which another object lights up; at least 4.2.
        distracted: Probability that a viewer notices late, 0.5 to 2.8 s later than else.
        ignore: Probability that a viewer does not turn at all when an object lights up.
        noise: Restlessness of the head in degrees (standard deviation of its slow wandering in yaw).
        seed: Equal seeds give equal data.
    """

    videos: int = 12
    users: int = 16
    seconds: float = 60.0
    objects: int = 4
    picture_height: int = 32
    picture_width: int = 64
    picture_every: int = 1
    gap: float = 6.0
    distracted: float = 0.6
    ignore: float = 0.05
    noise: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that make no data.

        Raises:
            UserError: A value is out of its range.
        """
        shares = ("distracted", "ignore")
        least = {"videos": 3, "users": 3, "seconds": 1, "objects": 2, "picture_height": 8, "picture_width": 8}
        for name, value in (
            least | {"picture_every": 1, "gap": MIN_GAP, "noise": 0, "seed": 0, **dict.fromkeys(shares, 0)}
        ).items():
            if not getattr(self, name) >= value:
                raise UserError(f"synthetic.{name}: {getattr(self, name)} is too small; expected {value} or more")
        for name in shares:
            if getattr(self, name) > 1:
                raise UserError(f"synthetic.{name}: {getattr(self, name)} is a probability; expected 0 to 1")

    @property
    def samples(self) -> int:
        """Samples in a trace."""
        return round(self.seconds * RATE)


def generate(config: Synthetic) -> tuple[Traces, NDArray[np.uint8], float]:
    """Make traces and what the viewers saw.

    Returns:
        The traces, with videos and users called 1, 2, ...; pictures (V, frames, height, width, 3), equirectangular,
        yaw from -180 at the left to 180 at the right, pitch from 90 at the top to -90; and the seconds between
        pictures, the first at 0.
    """
    # Own streams, so that other viewers or another picture size leave the scenes as they are.
    scene_seed, viewer_seed, texture_seed = np.random.SeedSequence(config.seed).spawn(3)
    samples = config.samples
    scenes = make_scenes(
        np.random.default_rng(scene_seed), config.videos, config.objects, np.arange(samples) / RATE, config.gap
    )
    rng = np.random.default_rng(viewer_seed)
    angles = watch(rng, scenes, config.users, 1 / RATE, config.distracted, config.ignore, config.noise)
    pictures = render(
        np.random.default_rng(texture_seed), scenes, config.picture_height, config.picture_width, config.picture_every
    )
    return _as_traces(angles, scenes), pictures, config.picture_every / RATE


def synthetic_splits(config: Synthetic) -> dict[str, dict[str, list[int | str]]]:
    """Share videos and viewers out to train, valid and test, about 60, 15 and 25 percent, none in two of them."""
    videos, users = _shares(config.videos), _shares(config.users)
    return {name: {"videos": videos[name], "users": users[name]} for name in videos}


def _shares(count: int) -> dict[str, list[int | str]]:
    test = max(1, round(0.25 * count))
    valid = max(1, round(0.15 * count))
    train = count - test - valid
    labels: list[int | str] = list(range(1, count + 1))
    return {"train": labels[:train], "valid": labels[train : train + valid], "test": labels[train + valid :]}


def _as_traces(angles: NDArray[np.float32], scenes: Scenes) -> Traces:
    """Turn (V, U, S, 3) angles into traces."""
    videos, users, samples, _ = angles.shape
    video = np.repeat(np.arange(1, videos + 1).astype(np.str_), users * samples)
    user = np.tile(np.repeat(np.arange(1, users + 1).astype(np.str_), samples), videos)
    return assemble(angles.reshape(-1, 3), np.tile(scenes.times, videos * users), video, user)
